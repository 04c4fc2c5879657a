"""Each kind of pruning whose default is to recalibrate gains by it on real data; see `benchmarks/recalibration.py`."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.methods import methods
from microglia.methods.acdc import Acdc
from microglia.methods.awg import Awg
from microglia.methods.pas import Pas
from microglia.methods.pdp import Pdp
from microglia.methods.smart import Smart
from microglia.methods.unit_pruner import UnitPruner
from microglia.tasks.task import Task
from microglia.train.recover import recalibrate_on

PRUNERS: dict[str, type[UnitPruner]] = {"smart": Smart, "pdp": Pdp, "pas": Pas, "awg": Awg, "acdc": Acdc}
STEPS = 20


class Frozen(Exception):
    """The masks are exact; the rest of the training is left out."""


@pytest.fixture(scope="module")
def task(data_root: Path) -> Task:
    return mg.tasks.image_task(
        "resnet20", "cifar10", checkpoint=data_root / "checkpoints" / "resnet20-12fca82f.th", normalize="imagenet"
    )


def gain(model: nn.Module, task: Task, *, batch_size: int, count: int) -> float:
    """Returns how much the test accuracy of 2,048 images rises; two standard errors of a rise are below 0.03."""
    stale = mg.evaluate(model, task, limit=8)["accuracy"]
    recalibrate_on(model, task, batch_size=batch_size, count=count)
    return mg.evaluate(model, task, limit=8)["accuracy"] - stale


def source(task: Task) -> mg.scores.Evidence:
    batches = task.data.batches("train", 64, seed=0, shuffle=True)
    return mg.scores.Evidence(list(islice(batches.epoch(0), 2)), task.loss, torch.Generator().manual_seed(0))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.9, 0.75])
def test_a_cut_of_channels_gains(task: Task, kept: float) -> None:
    small = mg.prune_channels(task.build(), task.example, mg.Budget(density=kept), reduction="l2", round_to=1)
    assert gain(small, task, batch_size=64, count=methods["channels"].config().recalibrate) > 0.05


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", PRUNERS)
def test_a_freeze_gains(task: Task, name: str) -> None:
    model, gained = task.build(), []
    config = methods[name].config(pattern="channel", density=0.5, exclude=("linear",))

    def moment(when: str) -> dict[str, float]:
        if when == "hard":
            gained.append(gain(model, task, batch_size=32, count=config.recalibrate))
            raise Frozen
        return {}

    evidence = source(task)
    pruner = PRUNERS[name](model, config, total_steps=STEPS, example_inputs=task.example, evidence=evidence, at_freeze=moment)
    with pytest.raises(Frozen):
        mg.fit(model, task, mg.FitConfig(epochs=1, max_batches=STEPS, batch_size=32, lr=0.02), pruner=pruner)
    assert gained[0] > 0.03
