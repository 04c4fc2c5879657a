"""Normalization, augmentation and fixed splits: pure functions of tensors."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from microglia.core.errors import DataError, UnknownNameError
from microglia.data import Augmentation, Crops, ImageSet, Normalization, stratified_split
from microglia.data.hashing import mix


def random_images(count, channels=3, height=5, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


# Normalization


@given(st.sampled_from(["imagenet", "cifar10", "mnist", "half"]), st.integers(0, 2**16))
@settings(deadline=None)
def test_normalization_is_the_closed_form(name, seed):
    images = random_images(6, seed=seed)
    normalization = Normalization.named(name)
    mean, std = (torch.tensor(part, dtype=torch.float64).view(1, -1, 1, 1) for part in (normalization.mean, normalization.std))
    result = normalization.apply(images)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), (images.double() / 255 - mean) / std, rtol=0, atol=2e-6)


def test_half_maps_black_and_white_to_minus_one_and_one():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    assert Normalization.named("half").apply(images).flatten().tolist() == [-1.0, 1.0]


def test_published_numbers():
    assert Normalization.named("imagenet") == Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert Normalization.named("cifar10") == Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert Normalization.named("mnist") == Normalization((0.1307,), (0.3081,))


def test_normalization_keeps_the_memory_format():
    images = random_images(4).contiguous(memory_format=torch.channels_last)
    assert Normalization.named("half").apply(images).is_contiguous(memory_format=torch.channels_last)


def test_computed_statistics_are_exact_across_chunks(monkeypatch):
    images = random_images(50)
    monkeypatch.setattr("microglia.data.normalization._CHUNK", 7)
    found = Normalization.of(images)
    pixels = images.numpy().transpose(1, 0, 2, 3).reshape(3, -1) / 255
    np.testing.assert_allclose(found.mean, pixels.mean(1), rtol=1e-13)
    np.testing.assert_allclose(found.std, pixels.std(1), rtol=1e-13)
    applied = found.apply(images).double()
    torch.testing.assert_close(applied.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(applied.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=1e-6)


def test_a_constant_channel_gets_std_one():
    images = random_images(3)
    images[:, 1] = 51
    found = Normalization.of(images)
    assert found.mean[1] == pytest.approx(0.2, abs=1e-15)
    assert found.std[1] == 1.0
    assert found.std[0] < 1


@pytest.mark.parametrize(
    ("mean", "std"),
    [((), ()), ((0.5,), (0.5, 0.5)), ((0.5,), (0.0,)), ((0.5,), (-1.0,)), ((math.nan,), (1.0,)), ((0.5,), (math.inf,))],
)
def test_impossible_normalizations_are_refused(mean, std):
    with pytest.raises(DataError, match="expected one finite mean and one positive std per channel"):
        Normalization(mean, std)


def test_normalization_errors():
    with pytest.raises(UnknownNameError, match=r"no normalization named 'imagenot'\. Did you mean 'imagenet'"):
        Normalization.named("imagenot")
    with pytest.raises(DataError, match="has 3 channels and the images have 1"):
        Normalization.named("imagenet").apply(random_images(2, channels=1))
    with pytest.raises(DataError, match=r"torch.float32 cannot be normalized; expected torch.uint8"):
        Normalization.named("half").apply(random_images(2).float())
    with pytest.raises(DataError, match="No images were given to compute a mean"):
        Normalization.of(random_images(0))


# Augmentation


def crop_by_hand(image, pad, row, column, mirrored):
    height, width = image.shape[1:]
    window = F.pad(image, (pad,) * 4)[:, row : row + height, column : column + width]
    return window.flip(-1) if mirrored else window


@given(st.integers(0, 3), st.booleans(), st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3]), st.integers(0, 999))
@settings(deadline=None)
def test_every_output_is_a_legal_crop_of_its_own_input(pad, flip, height, width, channels, seed):
    images = random_images(5, channels, height, width, seed)
    before = images.clone()
    out = Augmentation(pad, flip)(images, torch.Generator().manual_seed(seed))
    assert out.dtype == torch.uint8
    assert out.shape == images.shape
    assert torch.equal(images, before)
    for image, result in zip(images, out, strict=True):
        legal = [
            crop_by_hand(image, pad, row, column, mirrored)
            for row in range(2 * pad + 1)
            for column in range(2 * pad + 1)
            for mirrored in {False, flip}
        ]
        assert any(torch.equal(result, candidate) for candidate in legal)


@given(st.integers(0, 4), st.booleans(), st.integers(0, 999))
@settings(deadline=None)
def test_apply_does_what_was_drawn(pad, flip, seed):
    images = random_images(12, seed=seed)
    augmentation = Augmentation(pad, flip)
    crops = augmentation.draw(12, torch.Generator().manual_seed(seed))
    expected = [
        crop_by_hand(image, pad, int(row), int(column), bool(mirrored))
        for image, row, column, mirrored in zip(images, crops.rows, crops.columns, crops.flips, strict=True)
    ]
    assert torch.equal(augmentation.apply(images, crops), torch.stack(expected))
    halves = [augmentation.apply(images[part], crops[part]) for part in (slice(0, 5), slice(5, None))]
    assert torch.equal(torch.cat(halves), torch.stack(expected))


def test_border_is_black_before_normalization():
    white = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    crops = Crops(torch.tensor([0]), torch.tensor([2]), torch.tensor([False]))
    out = Augmentation(pad=2).apply(white, crops)
    assert out[0, :, :2].eq(0).all()
    assert out[0, :, 2:].eq(255).all()


def test_same_generator_same_bits_and_only_that_generator():
    images = random_images(64)
    state = torch.get_rng_state()
    first, again, other = (Augmentation()(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("flip", [False, True])
def test_every_offset_is_reached_equally_often(flip):
    pad, count = 2, 20_000
    crops = Augmentation(pad, flip).draw(count, torch.Generator().manual_seed(0))
    side = 2 * pad + 1
    cells = (crops.rows * side + crops.columns) * 2 + crops.flips
    counts = torch.bincount(cells, minlength=2 * side * side).view(-1, 2)
    legal = counts if flip else counts[:, 0]
    expected = count / legal.numel()
    assert legal.sum() == count
    assert ((legal - expected).abs() < 5 * expected**0.5).all()


def test_negative_pad_is_refused():
    with pytest.raises(DataError, match="pad is -1; expected 0 or more"):
        Augmentation(pad=-1)


# Splits


@given(st.lists(st.integers(0, 4), min_size=10, max_size=200), st.floats(0.01, 0.9), st.integers(0, 2**70))
@settings(deadline=None)
def test_split_is_a_stratified_partition(labels, fraction, seed):
    labels = torch.tensor(labels)
    kept, carved = stratified_split(labels, fraction, seed)
    assert sorted(kept.tolist() + carved.tolist()) == list(range(len(labels)))
    assert kept.tolist() == sorted(kept.tolist())
    assert carved.tolist() == sorted(carved.tolist())
    for name in labels.unique():
        total, taken = int((labels == name).sum()), int((labels[carved] == name).sum())
        # One image beside the exact share, as in every largest-remainder rule.
        assert abs(taken - fraction * total) <= 1 + 1e-9
        assert total - taken >= 1


@given(st.lists(st.integers(20, 60), min_size=1, max_size=6), st.sampled_from([0.1, 0.2, 0.25, 0.29, 0.5]))
@settings(deadline=None)
def test_split_has_the_exact_size(counts, fraction):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assert len(stratified_split(labels, fraction, 0)[1]) == round(fraction * len(labels))


def test_split_is_frozen_for_ever():
    labels = torch.arange(40) % 2
    assert stratified_split(labels, 0.2, 3)[1].tolist() == [11, 15, 18, 20, 25, 26, 35, 36]
    assert stratified_split(labels, 0.2, 4)[1].tolist() != [11, 15, 18, 20, 25, 26, 35, 36]


def test_split_of_nothing_and_of_too_little():
    labels = torch.tensor([0, 0, 1, 1])
    kept, carved = stratified_split(labels, 0.0, 0)
    assert kept.tolist() == [0, 1, 2, 3]
    assert carved.tolist() == []
    assert len(stratified_split(labels, 0.01, 0)[1]) == 1
    with pytest.raises(DataError, match="held out of 2 because no class has two"):
        stratified_split(torch.tensor([0, 1]), 0.5, 0)
    for fraction in (1.0, -0.1, math.nan):
        with pytest.raises(DataError, match="expected 0 <= fraction < 1"):
            stratified_split(labels, fraction, 0)


def test_mix_is_splitmix64():
    # Steele, Lea, Flood (2014), the reference implementation's first outputs from state 0.
    golden = 0x9E3779B97F4A7C15
    from microglia.data.hashing import _finalize

    states = np.array([golden * n % 2**64 for n in (1, 2, 3)], dtype=np.uint64)
    assert [hex(value) for value in _finalize(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**63))
@settings(deadline=None)
def test_mix_never_collides_and_is_not_symmetric(seed, start):
    values = start + np.arange(500, dtype=np.uint64)
    assert len(np.unique(mix(seed, values))) == 500
    if seed % 2**64 != start:
        assert mix(seed, values[:1]) != mix(start, np.array([seed % 2**64], dtype=np.uint64))


# Image sets


def test_subset_picks_in_order():
    images = ImageSet(random_images(5), torch.arange(5))
    chosen = images.subset([4, 0, 4])
    assert chosen.labels.tolist() == [4, 0, 4]
    assert torch.equal(chosen.images, images.images[[4, 0, 4]])
    assert len(images.subset([])) == 0
    assert len(images.subset(torch.arange(3))) == 3


def test_image_set_errors():
    good = ImageSet(random_images(3), torch.arange(3))
    with pytest.raises(DataError, match=r"torch.float32 of shape \[3, 3, 5, 4\]; expected torch.uint8"):
        ImageSet(random_images(3).float(), torch.arange(3))
    with pytest.raises(DataError, match=r"expected torch.uint8 of shape \[N, C, H, W\]"):
        ImageSet(random_images(3)[0], torch.arange(3))
    with pytest.raises(DataError, match=r"labels are torch.int64 of shape \[2\]; expected torch.int64 of shape \[3\]"):
        ImageSet(random_images(3), torch.arange(2))
    with pytest.raises(DataError, match=r"labels are torch.int32"):
        ImageSet(random_images(3), torch.arange(3, dtype=torch.int32))
    for indices in ([3], [-1]):
        with pytest.raises(DataError, match="expected 0 to 2"):
            good.subset(indices)
    for indices in (torch.tensor([True, False, True]), torch.tensor([0.0])):
        with pytest.raises(DataError, match="expected integers"):
            good.subset(indices)
