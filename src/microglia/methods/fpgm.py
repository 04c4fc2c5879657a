"""FPGM (He et al. 2019): filters near the geometric median of their layer are set to zero every epoch, and rest within it.

The algorithm (spec: survey 8.6), once before the training and at the end of every epoch:
    the channels of the smallest sum of distances to all other filters of their layer get filters of zeros
    within the epoch these have no gradient; at its end they are chosen anew
then those that are zero at the end are removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.config import method
from microglia.methods.sfp import SoftFilters, SoftFiltersConfig
from microglia.storage.run import Run
from microglia.tasks.task import Task


@dataclass(frozen=True)
class FpgmConfig(SoftFiltersConfig):
    """Filter pruning by the geometric median."""


class Fpgm(SoftFilters):
    """Filter pruning by the geometric median, to be stepped inside anybody's loop; see `ChannelPruner`."""

    Config = FpgmConfig
    score = "fpgm"

    def begin(self) -> None:
        """Sets the first filters to zero."""
        self.zero(self.choose(self.ranking()))

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Goes on by one optimizer step: zeros stay zeros, until they are chosen anew."""
        super().step(optimizer)
        if self.zeroed is not None and self.steps not in self._due:
            self.zero(~self.zeroed, optimizer)

    def final(self) -> Tensor:
        """Returns the channels that are not zero now."""
        return super().final() if self.zeroed is None else ~self.zeroed


@method(
    "fpgm", FpgmConfig, check=fits(Fpgm), paper="He et al. 2019, arXiv 1811.00250", purpose="channels that others can replace"
)
def fpgm(task: Task, run: Run, config: FpgmConfig) -> nn.Module:
    """FPGM: every epoch the filters nearest to the geometric median become zero; in the end they go."""
    return thinned(task, run, config, Fpgm)
