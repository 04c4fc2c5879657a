"""Batches: a pure function of (seed, epoch), the same bits for every number of processes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microglia.core.errors import DataError
from microglia.data import Augmentation, Batches, ImageSet, Normalization

HALF = Normalization.named("half")


def numbered(count, height=6, width=6):
    """Images whose content is their number: the label says it, and so does every pixel (up to 255)."""
    images = torch.arange(count).view(-1, 1, 1, 1).expand(count, 3, height, width).to(torch.uint8)
    return ImageSet(images.clone(), torch.arange(count))


def noisy(count):
    images = torch.randint(0, 256, (count, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    return ImageSet(images, torch.arange(count))


def batches(images, size, **options):
    return Batches(images, size, normalization=HALF, **options)


@given(st.integers(1, 60), st.integers(1, 20), st.booleans(), st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_has_every_image_once_with_its_label(count, size, shuffle, epoch):
    loader = batches(numbered(count), size, shuffle=shuffle, seed=7)
    got = list(loader.epoch(epoch))
    assert len(got) == len(loader) == -(-count // size)
    assert [len(labels) for _, labels in got[:-1]] == [size] * (len(got) - 1)
    inputs, labels = (torch.cat(parts) for parts in zip(*got, strict=True))
    assert sorted(labels.tolist()) == list(range(count))
    assert torch.equal(inputs, HALF.apply(numbered(count).images)[labels])
    if not shuffle:
        assert labels.tolist() == list(range(count))


@given(st.integers(1, 50), st.sampled_from([4, 8, 12]), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans())
@settings(deadline=None)
def test_the_ranks_together_are_one_process(count, size, world, shuffle, channels_last):
    options = {"augmentation": Augmentation(2), "shuffle": shuffle, "seed": 3, "channels_last": channels_last}
    images = noisy(count)
    if shuffle and count < world:
        with pytest.raises(DataError, match=f"There are {count} images to train on for {world} ranks"):
            batches(images, size, rank=0, world=world, **options)
        return
    alone = list(batches(images, size, **options).epoch(2))
    ranks = [list(batches(images, size, rank=rank, world=world, **options).epoch(2)) for rank in range(world)]
    dropped = shuffle and 0 < count % size < world
    assert {len(rank) for rank in ranks} == {len(alone) - dropped}
    for whole, *parts in zip(alone, *ranks, strict=False):
        assert torch.equal(whole[0], torch.cat([inputs for inputs, _ in parts]))
        assert torch.equal(whole[1], torch.cat([labels for _, labels in parts]))
        sizes = [len(labels) for _, labels in parts]
        assert max(sizes) - min(sizes) <= 1


def test_last_batch_smaller_than_the_world():
    images = noisy(10)
    training = [batches(images, 8, shuffle=True, rank=rank, world=4) for rank in range(4)]
    assert [len(rank) for rank in training] == [1] * 4
    evaluation = [list(batches(images, 8, rank=rank, world=4)) for rank in range(4)]
    assert sorted(len(rank[1][1]) for rank in evaluation) == [0, 0, 1, 1]
    empty = next(rank[1] for rank in evaluation if not len(rank[1][1]))
    assert empty[0].shape == (0, 3, 6, 6)
    assert empty[0].dtype == torch.float32
    assert sorted(torch.cat([labels for rank in evaluation for _, labels in rank]).tolist()) == list(range(10))


def same(left, right):
    return all(torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))


def test_an_epoch_is_a_pure_function_of_seed_and_number():
    options = {"augmentation": Augmentation(2), "shuffle": True}
    loader = batches(noisy(30), 8, seed=5, **options)
    state = torch.get_rng_state()
    expected = list(loader.epoch(3))
    assert torch.equal(torch.get_rng_state(), state)
    list(loader.epoch(0))
    torch.manual_seed(99)
    interleaved = list(zip(loader.epoch(3), loader.epoch(4), strict=True))
    assert same([one for one, _ in interleaved], expected)
    assert same(batches(noisy(30), 8, seed=5, **options).epoch(3), expected)
    assert same(loader, loader.epoch(0))


def test_seeds_and_epochs_all_differ():
    orders = {
        (seed, epoch): tuple(
            torch.cat([labels for _, labels in batches(noisy(30), 8, seed=seed, shuffle=True).epoch(epoch)]).tolist()
        )
        for seed, epoch in itertools.product(range(4), range(4))
    }
    assert len(set(orders.values())) == 16


def test_augmentation_changes_between_epochs_without_shuffling():
    loader = batches(noisy(30), 8, augmentation=Augmentation(2))
    first, second = list(loader.epoch(0)), list(loader.epoch(1))
    assert same([labels[None] for _, labels in first], [labels[None] for _, labels in second])
    assert not same(first, second)


def test_order_does_not_depend_on_batch_size():
    orders = [torch.cat([labels for _, labels in batches(noisy(30), size, shuffle=True)]) for size in (4, 8, 30)]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("augmentation", [None, Augmentation(1)])
def test_channels_last_changes_memory_and_not_values(augmentation):
    plain = next(iter(batches(noisy(8), 8, augmentation=augmentation)))[0]
    turned = next(iter(batches(noisy(8), 8, augmentation=augmentation, channels_last=True)))[0]
    assert plain.is_contiguous()
    assert turned.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, turned)


def test_batches_go_to_the_device():
    inputs, labels = next(iter(batches(noisy(8), 4, augmentation=Augmentation(1), device="meta")))
    assert inputs.device.type == labels.device.type == "meta"
    assert inputs.shape == (4, 3, 6, 6)


def test_an_empty_set_can_be_evaluated_and_not_trained_on():
    assert list(batches(numbered(0), 4)) == []
    with pytest.raises(DataError, match="There are 0 images to train on for 1 ranks"):
        batches(numbered(0), 4, shuffle=True)


def test_errors():
    images = numbered(8)
    with pytest.raises(DataError, match=r"10 images cannot be shared by 4 ranks; expected a positive multiple of 4, such as 8"):
        batches(images, 10, world=4)
    with pytest.raises(DataError, match="0 images cannot be shared by 1 ranks"):
        batches(images, 0)
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(DataError, match=f"Rank {rank} of {world} was given"):
            batches(images, 8, rank=rank, world=world)
    with pytest.raises(DataError, match="Epoch -1 was asked for"):
        batches(images, 8).epoch(-1)
    with pytest.raises(DataError, match="has 3 channels and the images have 1"):
        Batches(ImageSet(images.images[:, :1], images.labels), 4, normalization=Normalization.named("imagenet"))
