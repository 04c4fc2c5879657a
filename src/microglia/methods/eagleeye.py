"""EagleEye (Li et al. 2020): random widths near the budget, valued right after batch-norm statistics are estimated anew.

The algorithm (spec: FTWT and SMART 9.3):
    draw the kept fraction of each group at random; vectors that miss the budget by more than 0.005 are rejected
    remove the filters of the smallest L1 norm, estimate batch-norm statistics again, measure accuracy on a split of train
then cut to the widths of the best candidate; fine-tune.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from microglia.core.errors import BudgetError
from microglia.methods.channel_procedure import fits
from microglia.methods.config import method
from microglia.methods.width_procedure import searched_widths
from microglia.methods.width_search import Evaluator, SearchedConfig, SearchedPruner
from microglia.methods.width_space import WidthSpace
from microglia.storage.run import Run
from microglia.tasks.task import Task


@dataclass(frozen=True)
class EagleEyeConfig(SearchedConfig):
    """EagleEye.

    Attributes:
        candidates: Width vectors that are evaluated; the paper takes 1,000 and more.
        rates: The least and the largest removed fraction of a group: [0, 0.7] in the paper for half of the operations, up to
            0.4 for a quarter and 0.8 for three quarters.
    """

    candidates: int = 100
    rates: tuple[float, float] = (0.0, 0.7)

    def check_values(self) -> None:
        """Raises `BudgetError` for less than one candidate, and rates out of range."""
        if self.candidates < 1:
            raise BudgetError(f"candidates is at least 1; got {self.candidates}.")
        if len(self.rates) != 2 or not 0 <= self.rates[0] <= self.rates[1] <= 1:
            raise BudgetError(f"rates are two removed fractions, the least and the largest, in [0, 1]; got {list(self.rates)}.")


class EagleEye(SearchedPruner):
    """Takes the best of random width vectors; see `SearchedPruner`."""

    Config = EagleEyeConfig

    @property
    def own(self) -> EagleEyeConfig:
        """The config."""
        return cast(EagleEyeConfig, self.config)

    def make_space(self) -> WidthSpace:
        """Returns the width vectors within the rates."""
        own = self.own
        kept = 1 - own.rates[1], 1 - own.rates[0]
        return WidthSpace(self.units, self.asked, kept=kept, below=own.tolerance, above=own.tolerance, round_to=own.round_to)

    @property
    def planned(self) -> int:
        """Number of candidates."""
        return self.own.candidates

    def explore(self, evaluate: Evaluator, generator: torch.Generator) -> None:
        """Evaluates different random vectors."""
        self.note(evaluate(self.space.distinct(self.own.candidates, generator)))


@method(
    "eagleeye",
    EagleEyeConfig,
    check=fits(EagleEye),
    paper="Li et al. 2020, arXiv 2007.02491",
    purpose="widths by many quick candidates",
)
def eagleeye(task: Task, run: Run, config: EagleEyeConfig) -> nn.Module:
    """EagleEye: random widths within the budget, the best after batch-norm statistics are estimated anew; fine-tune."""
    return searched_widths(task, run, config, EagleEye)
