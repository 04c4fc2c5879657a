"""DSR, dynamic sparse reparameterization (Mostafa, Wang 2019): one threshold for the network, growth where most survives.

The algorithm (spec: survey 9), every ``every`` steps before T, with one threshold H and K = ``drop`` of the sparse weights:
    remove all |w| < H; where that were more than 1.1 K, H <- H / 2 for the next time; fewer than 0.9 K, H <- 2 H
    grow as many as were removed, in each layer in proportion to the weights that survive there, at random; they start at 0
so that the number of weights is constant in the network while weights move between layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from microglia.core.allocation import apportion
from microglia.core.errors import BudgetError
from microglia.core.masks import enforce, mask
from microglia.methods.config import method
from microglia.methods.sparse_training import SparseTraining, UpdatesConfig, fits, from_scratch
from microglia.storage.run import Run
from microglia.tasks.task import Task
from microglia.train.optim import FitConfig

BAND = 0.1
"""Relative distance from K within which the threshold stays."""


@dataclass(frozen=True)
class DsrConfig(UpdatesConfig):
    """DSR.

    Attributes:
        drop: K over the number of sparse weights: about as many move at each update.
        threshold: H at the start; it doubles or halves until about K weights are below it.
    """

    drop: float = 0.05
    until: float = 1.0
    threshold: float = 1e-3

    def check_values(self) -> None:
        """Raises `BudgetError` for a threshold that is not above 0."""
        if not self.threshold > 0:
            raise BudgetError(f"threshold is above 0; got {self.threshold}.")


class Dsr(SparseTraining):
    """Moves weights between layers while the network trains; see `SparseTraining`. No optimizer step is skipped."""

    Config = DsrConfig

    def _prepare(self) -> None:
        if not hasattr(self, "threshold"):
            self.threshold = cast(DsrConfig, self.config).threshold

    def replaces_step(self) -> bool:
        """Tells that the optimizers act at every step."""
        return False

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Goes on by one optimizer step; moves weights when an update is due."""
        self.steps += 1
        if self.own.due(self.steps, self.total_steps):
            self._update(self.steps, optimizer)

    @torch.no_grad()
    def _update(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        enforce(self.model, optimizer)
        layers, masks, generator = self.layers, self.masks, self.evidence.generator
        moving = {name: masks[name].cpu() for name in layers if not bool(masks[name].all()) and name not in self.protected}
        small = {name: kept & (layers[name].raw.abs() < self.threshold).cpu() for name, kept in moving.items()}
        removed, aim = sum(int(s.sum()) for s in small.values()), self.own.drop * sum(int(k.sum()) for k in moving.values())
        staying = {name: kept & ~small[name] for name, kept in moving.items()}
        counts = [int(kept.sum()) for kept in staying.values()]
        low = [0 if self.config.allow_empty else max(0, 1 - count) for count in counts]
        high = [kept.numel() - count for kept, count in zip(staying.values(), counts, strict=True)]
        for (name, kept), count in zip(
            staying.items(), apportion([max(1, count) for count in counts], removed, low, high), strict=True
        ):
            free = (~kept).flatten().nonzero().flatten()
            growing = free[torch.randperm(len(free), generator=generator)[:count]]
            new = kept.flatten().index_fill(0, growing, True).view(kept.shape)
            self.grown += int((new & ~moving[name]).sum())
            layers[name].raw.mul_(kept.to(layers[name].raw))  # one that was removed and grows again starts at 0 too
            staying[name] = new
        mask(self.model, staying)
        enforce(self.model, optimizer)
        self.updates += 1
        if abs(removed - aim) > BAND * aim:
            self.threshold *= 0.5 if removed > aim else 2.0

    def report(self) -> dict[str, Any]:
        """Returns the number of updates, the weights grown over all of them, and the last threshold."""
        return super().report() | {"threshold": self.threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        super().load_state_dict(state)
        self.threshold = state["threshold"]


@method(
    "dsr",
    DsrConfig,
    check=fits(Dsr),
    training=FitConfig(),
    paper="Mostafa, Wang 2019, arXiv 1902.05967",
    purpose="sparse training; weights move between layers",
)
def dsr(task: Task, run: Run, config: DsrConfig) -> nn.Module:
    """DSR: sparse from scratch; one threshold for the network, and weights move to layers where most survive."""
    return from_scratch(task, run, config, Dsr)
