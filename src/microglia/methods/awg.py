"""AWG, accumulated weight and gradient (SMART, appendix G): prune by a smoothed |w g|, fine-tune, and again.

The algorithm (spec: AWG 6.2). It repeats, with equal increments of sparsity:
    calibrate    weights fixed, per mini-batch   I <- beta I + (1 - beta) |w * dL/dw| s_l,   s_l = 1 / (1 - sparsity of layer l)
    prune the lowest units over all layers, up to the maximum sparsity of a layer; removed units stay removed fine-tune with the
    masks fixed
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.methods.config import UNITS, SearchConfig, UnitConfig, method
from microglia.methods.procedure import searched
from microglia.methods.unit_pruner import UnitPruner, fits
from microglia.methods.units import split
from microglia.methods.what import SAMPLING, Takes
from microglia.scores.accumulated import accumulated_gradient
from microglia.storage.run import Run
from microglia.tasks.task import Task


@dataclass(frozen=True)
class AwgConfig(SearchConfig, UnitConfig):
    """AWG; ``score_batches`` of ``score_batch_size`` examples are the calibration.

    Attributes:
        updates: Number of times that units are pruned, at the start of equal parts of the search. The first is right after the
            first optimizer step; the rest of a part is fine-tuning.
        beta: Decay of the moving average over calibration batches.
    """

    takes: ClassVar[Takes] = replace(UNITS, fields=(*UNITS.fields, *SAMPLING))
    updates: int = 5
    beta: float = 0.99
    search: float = 0.5
    max_sparsity: float = 0.98
    score_batches: int = 16

    def check_values(self) -> None:
        """Raises `BudgetError` for updates or beta out of range."""
        if self.updates < 1 or not 0 <= self.beta < 1:
            raise BudgetError(f"updates is at least 1 and beta in [0, 1); got {self.updates} and {self.beta}.")


class Awg(UnitPruner):
    """Prunes further at several steps, by accumulated weight and gradient."""

    Config = AwgConfig
    softens = False

    def __init__(self, model: nn.Module, config: AwgConfig | None = None, **settings: Any) -> None:
        super().__init__(model, config, **settings)
        count = self.awg.updates
        length = self.end - self.begin  # each update begins its part of the search, which then fine-tunes the kept units
        self._due = {max(1, self.begin + round(length * (u - 1) / count)): u / count for u in range(1, count + 1)}
        self.end = max(self._due)
        self._done = 0.0

    @property
    def awg(self) -> AwgConfig:
        """The config."""
        return cast(AwgConfig, self.config)

    def factors(self) -> Tensor:
        """Returns the currently kept units: the masks are never soft."""
        kept = self.soft.kept if self.soft is not None else None
        return torch.ones(self.units.count, device=self.units.costs.device) if kept is None else kept.float()

    @torch.enable_grad()
    def ranking(self) -> Tensor:
        """Returns the accumulated score of each unit, summed over its weights; -inf for removed units."""
        layers = self.weight_layers
        values = accumulated_gradient(self.model, layers, self.evidence, beta=self.awg.beta)
        scores = self.units.reduce(values, "sum")
        kept = self.soft.kept if self.soft is not None else None
        if kept is None:
            return scores
        parts = split(self.units, kept)
        left = torch.cat([part.float().mean().clamp_min(1e-9).expand(len(part)) for part in parts.values()])
        return (scores / left.to(scores.dtype)).masked_fill(~kept, -torch.inf)

    def choose(self, scores: Tensor) -> Tensor:
        """Returns the units that stay at this update: sparsity grows by equal increments."""
        return self.limit.choose(scores, self._done)

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Advances by one optimizer step; prunes when an update is due; the last update is final."""
        self.steps += 1
        if (progress := self._due.get(self.steps)) is None:
            return
        self._done = progress
        if progress == 1:
            self.freeze(optimizer)
        else:
            self.harden(self.choose(self.ranking()), optimizer)

    def freeze(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Prunes to the budget."""
        self._done = 1.0
        super().freeze(optimizer)


@method(
    "awg",
    AwgConfig,
    check=fits,
    paper="Ding et al. 2024, arXiv 2403.19969, appendix G",
    purpose="blocks in steps; the rival of smart",
)
def awg(task: Task, run: Run, config: AwgConfig) -> nn.Module:
    """AWG: prune by accumulated |weight x gradient| in steps, fine-tuning in between."""
    return searched(task, run, config, Awg)
