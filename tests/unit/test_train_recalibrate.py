"""Recalibration: a model is changed whole or not at all, inputs may be mappings, and batches are those of training."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import microglia as mg
from microglia.core.errors import TrainingError
from microglia.methods import methods
from microglia.studies.space.gauge import Gauge
from microglia.tasks.classification import ImageSource
from microglia.train.recover import recalibrate_on


class Keyword(nn.Module):
    """Takes its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, *, pixels: Tensor) -> Tensor:
        out: Tensor = self.norm(pixels)
        return out


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None))
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8) * 3 + 1)
    model[1].eval()
    return model


def broken() -> Iterator[tuple[Tensor, int]]:
    yield torch.randn(4, 3, 8, 8), 0
    yield torch.randn(4, 5, 8, 8), 0


def untouched(model: nn.Sequential, before: dict[str, Tensor]) -> bool:
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    modes = [module.training for module in model.modules()]
    return same and modes == [True, True, False, True] and [model[1].momentum, model[2].momentum] == [0.1, None]


@pytest.mark.parametrize("batches", [[], [(torch.empty(0, 3, 8, 8), 0)]])
def test_where_no_example_comes_the_model_stays_as_it_was(batches: list[tuple[Tensor, int]]) -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainingError, match="no example"):
        mg.train.recover.recalibrate(model, batches)
    assert untouched(model, before)


def test_a_last_batch_of_one_is_left_out_where_maps_have_one_place() -> None:
    """Its channels have one value each, which has no variance: torch refuses it in training mode."""
    model, alone = (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)) for _ in range(2))
    x = torch.randn(9, 3, 4, 4)
    mg.train.recover.recalibrate(model, [(x[:8], 0), (x[8:], 0)])
    mg.train.recover.recalibrate(alone, [(x[:8], 0)])
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in model.state_dict().items())


def test_batches_of_one_count_where_all_are_of_one() -> None:
    model = nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4)
    mg.train.recover.recalibrate(model, [(x[:1], 0), (x[1:], 0)])
    assert torch.allclose(model.running_mean, x.mean((0, 2, 3)), atol=1e-6)


def test_an_error_midway_leaves_the_model_as_it_was() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="channels"):
        mg.train.recover.recalibrate(model, broken())
    assert untouched(model, before)


def test_mappings_reach_the_model_as_keywords() -> None:
    model, generator = Keyword(), torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, 3, 5, 5, generator=generator) + 2 for n in (2, 6)]
    mg.train.recover.recalibrate(model, [({"pixels": x}, 0) for x in inputs])
    torch.testing.assert_close(model.norm.running_mean, torch.cat(inputs).mean((0, 2, 3)))


def test_batches_are_shuffled_and_augmented_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, batches = [], ImageSource.batches
    monkeypatch.setattr(ImageSource, "batches", lambda self, *a, **k: (asked.append((a, k)), batches(self, *a, **k))[1])
    task = mg.tasks.image_task("resnet8", "digits")
    model = task.build()
    Gauge(task, (), recalibrate=1, batch_size=8)(model)
    recalibrate_on(model, task, batch_size=8, count=1, seed=3)
    assert [(a, k["augment"], k["shuffle"], k["seed"]) for a, k in asked[-2:]] == [
        (("train", 8), True, True, 0),
        (("train", 8), True, True, 3),
    ]


@pytest.mark.parametrize("name", ["magnitude", "channels", "smart", "pdp", "pas", "awg"])
def test_it_is_the_default_where_weights_go_at_once(name: str) -> None:
    assert methods[name].config().recalibrate == 20


@pytest.mark.data
def test_a_trained_checkpoint_keeps_its_error_and_a_pruned_one_gains(data_root: Path) -> None:
    task = mg.tasks.image_task(
        "resnet20", "cifar10", checkpoint=data_root / "checkpoints" / "resnet20-12fca82f.th", normalize="imagenet"
    )

    def accuracy(model: nn.Module, batches: int = 8) -> float:
        return mg.evaluate(model, task, limit=batches)["accuracy"]

    model = task.build()
    dense = accuracy(model)
    recalibrate_on(model, task, batch_size=128, count=10)
    assert abs(accuracy(model) - dense) < 0.005
    pruned = task.build()
    mg.methods.OneShot(pruned, density=0.25)
    stale = accuracy(pruned, 2)
    recalibrate_on(pruned, task, batch_size=128, count=10)
    assert accuracy(pruned, 2) > stale + 0.01
