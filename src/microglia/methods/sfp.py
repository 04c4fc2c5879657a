"""Soft Filter Pruning (He et al. 2018): filters are set to zero every epoch, and may come back.

The algorithm (spec: survey 8.6), at the end of every epoch:
    the channels of the smallest L2 norms, as many in every epoch as the budget says, get filters of zeros
    training goes on without a mask, so that they learn again
then those that are zero at the end are removed. No fine-tuning is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.channel_pruner import ChannelConfig, ChannelPruner
from microglia.methods.config import method
from microglia.scores import scores
from microglia.storage.run import Run
from microglia.tasks.task import Task


@dataclass(frozen=True)
class SoftFiltersConfig(ChannelConfig):
    """Methods that set filters to zero again and again.

    Attributes:
        scope: ``uniform``, as in the papers: the same fraction of every group; or ``global``.
        updates: How many times filters are chosen, spread evenly over the training; once an epoch where left out.
    """

    scope: Literal["uniform", "global"] = "uniform"  # type: ignore[assignment]
    updates: int | None = None

    def check_values(self) -> None:
        """Raises `BudgetError` for less than one update."""
        if self.updates is not None and self.updates < 1:
            raise BudgetError(f"updates is at least 1; got {self.updates}.")


@dataclass(frozen=True)
class SfpConfig(SoftFiltersConfig):
    """Soft Filter Pruning."""


class SoftFilters(ChannelPruner):
    """Sets the filters of the lowest channels to zero at even distances; norms, biases and readers stay as they are."""

    Config = SoftFiltersConfig
    score = "l2"
    """Score of filters that ranks the channels."""

    def prepare(self) -> None:
        """Lays out when filters are chosen."""
        config = cast(SoftFiltersConfig, self.config)
        count = config.updates if config.updates is not None else max(1, config.sparse.epochs)
        self._due = {max(1, math.floor(self.total_steps * number / count)) for number in range(1, count + 1)}
        self.zeroed: Tensor | None = None

    @torch.no_grad()
    def ranking(self) -> Tensor:
        """Returns the score of the filters that make each channel."""
        return self.of_filters(scores[self.score](self.model, self.layers, self.evidence))

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Goes on by one optimizer step; sets filters to zero when it is due."""
        super().step(optimizer)
        if self.steps in self._due:
            self.zero(self.choose(self.ranking()), optimizer)

    def zero(self, kept: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Sets the filters of all other channels to zero."""
        self.zeroed = ~kept.cpu()
        self.clear(self.zeroed, optimizer)

    def final(self) -> Tensor:
        """Returns the channels that are not zero now; where filters have learned since they were chosen, it chooses anew."""
        return ~self.zeroed if self.zeroed is not None and self.steps in self._due else super().final()

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps taken and what is zero."""
        return super().state_dict() | {"zeroed": self.zeroed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        super().load_state_dict(state)
        self.zeroed = state["zeroed"]


class Sfp(SoftFilters):
    """Soft Filter Pruning, to be stepped inside anybody's loop; see `ChannelPruner`."""

    Config = SfpConfig


@method(
    "sfp",
    SfpConfig,
    check=fits(Sfp),
    paper="He et al. 2018, arXiv 1808.06866",
    purpose="channels that may come back in training",
)
def sfp(task: Task, run: Run, config: SfpConfig) -> nn.Module:
    """Soft Filter Pruning: every epoch the lowest filters become zero and may come back; in the end they go."""
    return thinned(task, run, config, Sfp)
