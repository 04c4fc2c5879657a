"""Data of one's own: plain DataLoaders, iterables and datasets, and a segmentation through the whole house."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import microglia as mg
from microglia.core.errors import DataError
from microglia.storage.run import Progress


def scenes(count: int, seed: int) -> TensorDataset:
    """Images with a bright square, and the mask of the square."""
    generator = torch.Generator().manual_seed(seed)
    images, masks = torch.rand(count, 1, 12, 12, generator=generator) * 0.6, torch.zeros(count, 1, 12, 12)
    for number in range(count):
        row, column = torch.randint(0, 7, (2,), generator=generator).tolist()
        masks[number, :, row : row + 5, column : column + 5] = 1.0
    return TensorDataset(images + masks * 0.8, masks)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(16, 1, 1))


def dice(outputs: Tensor, masks: Tensor) -> Tensor:
    found = outputs.sigmoid()
    return (2 * (found * masks).sum((1, 2, 3)) + 1) / ((found + masks).sum((1, 2, 3)) + 1)


def dice_loss(outputs: Tensor, masks: Tensor) -> Tensor:
    return 1 - dice(outputs, masks).mean()


TRAIN, TEST = DataLoader(scenes(48, 1), batch_size=16, shuffle=True), DataLoader(scenes(16, 2), batch_size=8)


def segmentation() -> mg.Task:
    return mg.Task(
        "squares",
        build=network,
        data=mg.tasks.loaders(train=TRAIN, test=TEST),
        loss=dice_loss,
        metrics={"dice": mg.tasks.mean_metric(dice)},
        example=torch.zeros(1, 1, 12, 12),
        kind="segmentation",
    )


def test_a_segmentation_of_ones_own_through_the_whole_house(tmp_path: Path) -> None:
    task = segmentation()
    model, config = task.build(), mg.FitConfig(epochs=6, lr=0.3)
    before = mg.evaluate(model, task)["dice"]
    rows = mg.fit(model, task, config)
    dense = mg.evaluate(model, task)["dice"]
    assert dense > before + 0.1
    assert not any(key.startswith("validation") for row in rows for key in row)  # there is no such split
    steps = 3 * len(TRAIN)
    pruner = mg.methods.Smart(model, pattern="channel", density=0.5, total_steps=steps, example_inputs=task.example)
    mg.fit(model, task, mg.FitConfig(epochs=3, lr=0.05), pruner=pruner)
    pruner.finish()
    small = mg.shrink(model, task.example)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in network().parameters())
    assert mg.evaluate(small, task) == pytest.approx(mg.evaluate(model, task), abs=1e-5)
    mg.save(small, tmp_path / "model")
    loaded = mg.load(tmp_path / "model", task.build())
    assert mg.evaluate(loaded, task) == mg.evaluate(small, task)
    assert mg.evaluate(loaded, task)["dice"] > before


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_a_plain_loader_goes_on_to_the_bit_where_torch_draws_its_order() -> None:
    config, states = mg.FitConfig(epochs=3, lr=0.1), []
    whole, resumed = network(), network()
    keep = Progress(None, lambda s: states.append({**s, "model": {k: v.clone() for k, v in s["model"].items()}}))
    mg.fit(whole, segmentation(), config, stop=1, progress=keep)
    first = states[-1]
    mg.fit(resumed, segmentation(), config, progress=Progress(first, lambda s: None))
    mg.fit(again := network(), segmentation(), config)
    assert same(resumed, again)


def test_the_order_of_a_plain_loader_depends_on_seed_and_epoch_alone() -> None:
    numbers = DataLoader(TensorDataset(torch.arange(20), torch.arange(20)), batch_size=6, shuffle=True)

    def order(seed: int, epoch: int, disturbed: bool = False) -> list[int]:
        found: list[int] = []
        for inputs, _ in mg.tasks.loaders(train=numbers, test=[]).batches("train", 3, seed=seed).epoch(epoch):
            found += inputs.tolist()
            if disturbed:
                torch.rand(7)
        return found

    assert order(0, 1) == order(0, 1, disturbed=True)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    order(0, 0)
    assert torch.equal(torch.rand(2), expected)  # nobody else's random numbers are used up


class Noisy(Dataset[Any]):
    """Draws from all three global generators, as augmentation does."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([index, float(torch.rand(())), random.random(), np.random.rand()]), index


def test_a_dataset_has_the_order_of_the_house_and_its_own_noise_by_sample() -> None:
    noisy = mg.tasks.samples(Noisy())
    data = mg.tasks.loaders(train=noisy, test=Noisy())  # a dataset is wrapped by itself

    def drawn(split: Any = "train", **asked: Any) -> Tensor:
        batches = data.batches(split, **{"batch_size": 4, "shuffle": True, "seed": 5, **asked})
        return torch.cat([inputs for inputs, _ in batches.epoch(2)])

    assert torch.equal(drawn(), drawn())
    other = drawn(batch_size=10)
    assert torch.equal(drawn(), other)  # neither order nor noise depends on the batch size
    assert not torch.equal(drawn(), drawn(seed=6))
    ranks = [[inputs for inputs, _ in data.batches("train", 4, shuffle=True, seed=5, rank=r, world=2).epoch(2)] for r in (0, 1)]
    joined = [torch.cat(parts) for parts in zip(*ranks, strict=True)]
    assert torch.equal(torch.cat(joined), drawn())
    assert torch.equal(drawn("test", shuffle=False)[:, 0], torch.arange(10.0))
    random.seed(1)
    expected = random.random()
    random.seed(1)
    drawn()
    assert random.random() == expected


def test_ranks_share_the_batches_of_a_plain_iterable() -> None:
    batches = [(torch.arange(5), {"y": torch.arange(5)}), (torch.arange(2), {"y": torch.arange(2)})]
    data = mg.tasks.loaders(train=batches, test=batches)
    parts = [list(data.batches("test", 9, rank=rank, world=2).epoch(0)) for rank in (0, 1)]
    assert [x.tolist() for x, _ in parts[0]] == [[0, 1], [0]]
    assert [y["y"].tolist() for _, y in parts[1]] == [[2, 3, 4], [1]]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.zeros(2, 3), torch.zeros(2))] * 3)


def test_an_iterable_without_a_length_is_counted() -> None:
    data = mg.tasks.loaders(train=DataLoader(Stream(), batch_size=None), test=[])
    assert len(data.batches("train", 1)) == 3
    assert len(data.batches("validation", 1)) == 0


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (iter([(1, 2)]), "gone through once only"),
        (3, "got a int"),
        ({"train": []}, "got a dict"),
        ("cifar10", "got a str"),
    ],
)
def test_what_is_no_source_of_batches_is_refused(train: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        mg.tasks.loaders(train=train, test=[])


def test_a_batch_that_is_no_pair_is_refused() -> None:
    data = mg.tasks.loaders(train=[{"ids": torch.zeros(2)}], test=[(1, 2, 3)])
    with pytest.raises(DataError, match=r"train split is a pair.*got a dict of 1"):
        next(iter(data.batches("train", 1).epoch(0)))
    with pytest.raises(DataError, match="got a tuple of 3"):
        next(iter(data.batches("test", 1).epoch(0)))
    with pytest.raises(DataError, match="not from int"):
        mg.tasks.samples(4)
