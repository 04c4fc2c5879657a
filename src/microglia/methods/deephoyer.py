"""DeepHoyer (Yang et al. 2020): a measure of sparsity that no rescaling changes, over the channels of each group.

The algorithm (spec: corrections A), theta_k all weights that make and read channel k, as in `microglia.methods.group_lasso`:
    minimize L + lambda sum over groups of (sum_k |theta_k|_2)^2 / sum_k |theta_k|_2^2
        which is 1 for one channel alone and the number of channels where all are equal
    keep the channels of the largest |theta_k|_2, over its mean in the group, to the budget; remove the others; fine-tune.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.channel_pruner import ChannelConfig
from microglia.methods.config import method
from microglia.methods.group_lasso import GroupLasso
from microglia.storage.run import Run
from microglia.tasks.task import Task


@dataclass(frozen=True)
class DeepHoyerConfig(ChannelConfig):
    """DeepHoyer.

    Attributes:
        strength: lambda, of the penalty.
    """

    strength: float = 1e-4

    def check_values(self) -> None:
        """Raises `BudgetError` for a negative strength."""
        if self.strength < 0:
            raise BudgetError(f"strength is at least 0; got {self.strength}.")


class DeepHoyer(GroupLasso):
    """Drives the weak channels of each group to zero, to be stepped inside anybody's loop; see `ChannelPruner`."""

    Config = DeepHoyerConfig  # type: ignore[assignment]

    def penalty(self) -> Tensor | float:
        """Returns lambda times the sum of the groups' measures."""
        if self.kept is not None:
            return 0.0
        parts = torch.split(self.squares(), list(self.units.lengths))
        return cast(DeepHoyerConfig, self.config).strength * torch.stack([hoyer_square(part) for part in parts]).sum()


def hoyer_square(squares: Tensor) -> Tensor:
    """Returns (sum_k n_k)^2 / sum_k n_k^2 for norms n_k, given n_k^2, (channels,)."""
    tiny = torch.finfo(squares.dtype).tiny
    return squares.clamp_min(tiny).sqrt().sum().square() / squares.sum().clamp_min(tiny)


@method(
    "deephoyer",
    DeepHoyerConfig,
    check=fits(DeepHoyer),
    paper="Yang et al. 2020, arXiv 1908.09979",
    purpose="channels, a penalty without scale",
)
def deephoyer(task: Task, run: Run, config: DeepHoyerConfig) -> nn.Module:
    """DeepHoyer: the Hoyer measure of each group's channels is driven down, the smallest go, fine-tune."""
    return thinned(task, run, config, DeepHoyer)
