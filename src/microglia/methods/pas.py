"""PaS, pruning as search (arXiv 2206.01198): one gate per unit, 0 or 1, trained with a straight-through gradient.

The algorithm (spec: PaS 5.2):
    forward   b = 1 if s > 1/2 else 0, the unit times b
    backward  db/ds := 1
    loss      L + strength (cost(b) / budget - 1)^2
with s clamped to [0, 1] after each step. The penalty meets the budget only approximately, so the end of the search keeps the
exact top of s. With N:M every row of M has the budget N: the penalty is the mean of (sum(b) / N - 1)^2 over the rows. SMART's
paper reports PaS with 2:4 and gives no formula; this form is the library's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.core.patterns import NM, Block, Channel, Unstructured
from microglia.methods.config import UNITS, SearchConfig, UnitConfig, method
from microglia.methods.procedure import searched
from microglia.methods.pruner import own_optimizer
from microglia.methods.unit_pruner import UnitPruner, fits
from microglia.methods.what import Takes
from microglia.storage.run import Run
from microglia.tasks.task import Task

THRESHOLD = 0.5
TIE = 1e-6
"""Weight of the magnitude's rank, added to s to break ties: many gates end at exactly 1."""


@dataclass(frozen=True)
class PasConfig(SearchConfig, UnitConfig):
    """PaS.

    Attributes:
        strength: Strength of the penalty; the paper's code does not give it.
        mask_lr: Learning rate of the gates, constant.
        mask_optimizer: Optimizer of the gates.
    """

    takes: ClassVar[Takes] = replace(UNITS, patterns={Channel: "shrunk", Unstructured: "masked", Block: "masked", NM: "masked"})
    strength: float = 1.0
    mask_lr: float = 1e-2
    mask_optimizer: Literal["adam", "adamw", "sgd"] = "adam"

    def check_values(self) -> None:
        """Raises `BudgetError` for a negative strength."""
        if self.strength < 0:
            raise BudgetError(f"strength is at least 0; got {self.strength}.")


class Pas(UnitPruner):
    """Trains gates with a straight-through gradient."""

    Config = PasConfig

    @property
    def pas(self) -> PasConfig:
        """The config."""
        return cast(PasConfig, self.config)

    def initial_scores(self) -> Tensor:
        """Returns 1 plus small noise, clamped."""
        noise = torch.randn(self.units.count, generator=self.evidence.generator)
        return (1 + 0.01 * noise).clamp(0, 1).to(self.units.costs.device)

    def factors(self) -> Tensor:
        """Returns 0 or 1, with the gradient of the identity."""
        scores = self._scores
        return scores + ((scores > THRESHOLD).to(scores.dtype) - scores).detach()

    def ranking(self) -> Tensor:
        """Returns the gates, ties in the order of magnitude."""
        magnitudes = self.units.reduce(self.raw_weights, "l2").detach()
        rank = magnitudes.argsort(stable=True).argsort().double() / max(1, len(magnitudes))
        return self._scores.detach().double() + TIE * rank

    def penalty(self) -> Tensor | float:
        """Returns strength (cost(b) / budget - 1)^2 during the search; with N:M its mean over the rows."""
        if not self.searching:
            return super().penalty()
        if isinstance(self.pattern, NM):
            real = (self.units.costs > 0).to(self._scores.dtype)
            kept = (self.factors() * real).view(-1, self.pattern.m).sum(1)
            wanted = real.view(-1, self.pattern.m).sum(1).clamp(1, self.pattern.n)
            return self.pas.strength * (kept / wanted - 1).square().mean()
        return self.pas.strength * (self.limit.ratio(self.factors()) - 1).square()

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Clamps the gates; otherwise a closed gate would drift away and never return."""
        if self.searching:
            with torch.no_grad():
                self._scores.clamp_(0, 1)
        super().step(optimizer)

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns the group of the gates."""
        if self.soft is None:
            return []
        return [{"params": [self._scores], "lr": self.pas.mask_lr, "weight_decay": 0.0}]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns the optimizer of the gates, named by ``mask_optimizer``."""
        return [own_optimizer(self.pas.mask_optimizer, groups)] if (groups := self.param_groups()) else []

    @property
    def _scores(self) -> Tensor:
        assert self.soft is not None
        return cast(Tensor, self.soft.scores)


@method(
    "pas", PasConfig, check=fits, paper="Li et al. 2022, arXiv 2206.01198", purpose="blocks and channels: gates in the training"
)
def pas(task: Task, run: Run, config: PasConfig) -> nn.Module:
    """PaS: gates with a straight-through gradient and a penalty on the cost, freeze, fine-tune."""
    return searched(task, run, config, Pas)
