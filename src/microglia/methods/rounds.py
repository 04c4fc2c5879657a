"""Rounds of pruning and retraining, each a durable stage, and their observation."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn

from microglia.methods.config import MethodConfig
from microglia.methods.procedure import change, observe, train
from microglia.storage.observations import observations
from microglia.storage.run import Run
from microglia.tasks.task import Task


@dataclass(frozen=True)
class Round:
    """One round of pruning.

    Attributes:
        kept: Weights kept after it.
        loss: Mean loss over the evidence before it; None where the method does not measure it.
        predicted: Rise of the loss that the method predicted for its removals; None where it predicts none.
    """

    kept: int
    loss: float | None = None
    predicted: float | None = None


@observations.add("rounds")
@dataclass(frozen=True)
class Rounds:
    """The rounds of a method, in order."""

    rows: list[Round]


def rounds(task: Task, run: Run, model: nn.Module, config: MethodConfig, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Prunes and retrains in turn, each as a stage, until the target is reached; returns the observation `Rounds`.

    Args:
        task: The task.
        run: The run.
        model: The dense model, changed in place.
        config: Its ``train`` follows each round.
        work: Prunes further; returns the fields of `Round`, and ``done`` when the target is reached.
    """
    teacher = deepcopy(model) if config.train.distill else None
    said: list[dict[str, Any]] = []
    while not said or not said[-1]["done"]:
        number = len(said) + 1
        said.append(change(run, f"prune-{number:02d}", model, lambda progress: work()))
        if said[-1]["done"]:
            observe(task, run, "before", model)
        if config.train.epochs:
            train(task, run, "train" if said[-1]["done"] else f"train-{number:02d}", model, config.train, teacher=teacher)
    return {"rows": [{name: value for name, value in row.items() if name != "done"} for row in said]}
