"""Gradual pruning (Zhu and Gupta 2017): the density falls along a schedule while the network trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from microglia.core.errors import BudgetError
from microglia.core.masks import MaskSet, mask
from microglia.core.schedules import schedules
from microglia.methods.arguments import check_steps
from microglia.methods.config import MethodConfig, Permuting, method
from microglia.methods.procedure import dense_in_order, evidence, train
from microglia.methods.pruner import Pruner
from microglia.methods.what import PruneConfig
from microglia.scores import Evidence
from microglia.storage.run import Run
from microglia.tasks.task import Task
from microglia.train.optim import epoch_length


@dataclass(frozen=True)
class GradualConfig(Permuting, MethodConfig):
    """Gradual pruning.

    Attributes:
        schedule: ``cubic``, ``linear``, ``geometric`` or ``oneshot``.
        begin: Fraction of the training at which pruning begins.
        end: Fraction at which the final density is reached; the rest recovers.
        updates: Number of times that masks are chosen, spread evenly from begin to end.
    """

    schedule: str = "cubic"
    begin: float = 0.0
    end: float = 0.75
    updates: int = 20

    def check_values(self) -> None:
        """Raises `BudgetError` for densities by layer, and unless begin <= end."""
        schedules[self.schedule]
        if isinstance(self.scope, Mapping):
            raise BudgetError("Gradual pruning leads from dense to one budget; densities by layer are not supported.")
        if not 0 <= self.begin <= self.end <= 1 or self.updates < 1:
            raise BudgetError(
                f"Gradual pruning needs 0 <= begin <= end <= 1 and updates >= 1; got begin {self.begin}, end {self.end}, "
                f"updates {self.updates}."
            )


class Gradual(Pruner):
    """Prunes further at several steps; removed weights do not return.

    Args:
        model: The model to prune, in place.
        config: See `GradualConfig`; its training fields are not used here.
        total_steps: Optimizer steps of the training; ``begin`` and ``end`` are fractions of these.
        evidence: The data for the score.
        **settings: The fields of the config by keyword instead.
    """

    Config = GradualConfig
    shards: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig | None = None,
        *,
        total_steps: int,
        evidence: Evidence | None = None,
        **settings: Any,
    ) -> None:
        total_steps = check_steps(total_steps, type(self).__name__)
        super().__init__(model, config, evidence=evidence, **settings)
        config = cast(GradualConfig, self.config)
        self.schedule = schedules[config.schedule]
        self.steps = 0
        first, last = config.begin * total_steps, config.end * total_steps
        times = [first + (last - first) * u / config.updates for u in range(1, config.updates + 1)]
        self._due = {max(1, math.floor(time)): u / config.updates for u, time in enumerate(times, 1)}
        mask(model, self.masks)  # all ones, so that the state has the same names from the first step to the last

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Prunes further when an update is due."""
        self.steps += 1
        if (progress := self._due.get(self.steps)) is not None:
            count = round(self.schedule(progress, self.weights, self.target))
            self.prune_to(min(count, self.masks.kept), optimizer)  # whole units may be below it

    def finish(self) -> MaskSet:
        """Ensures that the final density is reached, also after a shorter training than announced."""
        if self.steps < max(self._due):
            self.prune_to(self.target)
        return self.masks

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps taken and the state of the score's generator."""
        return {"steps": self.steps, "generator": self.evidence.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state."""
        self.steps = state["steps"]
        self.evidence.generator.set_state(state["generator"])


@method("gradual", GradualConfig, paper="Zhu, Gupta 2017, arXiv 1710.01878", purpose="high sparsity with a training at hand")
def gradual(task: Task, run: Run, config: GradualConfig) -> nn.Module:
    """Prune along a schedule (cubic) while training, then recover in the rest of the same training."""
    model = dense_in_order(task, run, config)
    teacher = deepcopy(model) if config.train.distill else None
    steps = config.train.epochs * epoch_length(config.train, len(task.data.batches("train", config.train.batch_size)))

    def pruner() -> Gradual:
        return Gradual(model, config, total_steps=max(1, steps), evidence=evidence(task, run, config))

    train(task, run, "train", model, config.train, pruner=pruner, teacher=teacher)
    return model
