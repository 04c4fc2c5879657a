"""Group lasso over whole coupled groups: the norm of all that makes and reads a channel is driven to zero.

The algorithm, for channel k with all its weights theta_k: filters, biases, scales and shifts of norms, columns that read it:
    lasso: minimize L + lambda sum_k |theta_k|_2 (Wen et al. 2016, over the groups of Fang et al. 2023)
    ranked: minimize L + lambda / 2 sum_k g_k |theta_k|_2^2 with g_k = 2^(alpha (max I - I_k) / (max I - min I)) in each group,
        I_k = |theta_k|_2: the more important channels shrink less (Fang et al. 2023, equation 4, alpha = 4)
    keep the channels of the largest |theta_k|_2, over its mean in the group, to the budget; remove the others; fine-tune.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.core.registry import unknown_name
from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.channel_pruner import ChannelConfig, ChannelPruner
from microglia.methods.config import method
from microglia.storage.run import Run
from microglia.tasks.task import Task

ALPHA = 4.0
FORMS = ("lasso", "ranked")


@dataclass(frozen=True)
class GroupLassoConfig(ChannelConfig):
    """Group lasso.

    Attributes:
        strength: lambda, of the penalty.
        form: ``lasso``, the norm of every group; ``ranked``, its square, weighed by rank.
    """

    strength: float = 5e-4
    form: Literal["lasso", "ranked"] = "lasso"

    def check_values(self) -> None:
        """Raises for a negative strength and an unknown form."""
        if self.strength < 0:
            raise BudgetError(f"strength is at least 0; got {self.strength}.")
        if self.form not in FORMS:
            raise unknown_name("form of the group lasso", self.form, FORMS)


class GroupLasso(ChannelPruner):
    """Drives whole coupled groups to zero, to be stepped inside anybody's loop; see `ChannelPruner`."""

    Config = GroupLassoConfig

    def squares(self) -> Tensor:
        """Returns |theta_k|^2 of each channel, (count,), differentiable."""
        total = next(iter(self.raw.values())).new_zeros(self.units.count + 1)
        for place in (*self.units.made, *self.units.read):
            rows = self.raw[place.name].movedim(place.dim, 0).flatten(1) if self.raw[place.name].ndim > 1 else None
            own = self.raw[place.name].square() if rows is None else rows.square().sum(1)
            total = total.index_add(0, place.units.to(own.device), own.to(total.dtype))
        return total[:-1]

    def penalty(self) -> Tensor | float:
        """Returns the penalty on all groups."""
        if self.kept is not None:
            return 0.0
        config, squares = cast(GroupLassoConfig, self.config), self.squares()
        if config.form == "lasso":
            return config.strength * squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt().sum()
        with torch.no_grad():
            weights = torch.cat([_by_rank(part.sqrt()) for part in torch.split(squares, list(self.units.lengths))])
        return config.strength / 2 * (weights * squares).sum()

    @torch.no_grad()
    def ranking(self) -> Tensor:
        """Returns |theta_k| over its mean in the group."""
        parts = torch.split(self.squares().double().sqrt(), list(self.units.lengths))
        return torch.cat([part / part.mean().clamp_min(torch.finfo(part.dtype).tiny) for part in parts])


def _by_rank(importance: Tensor) -> Tensor:
    """Returns the weights of channels in the ranked form, from 1 for the most important of a group to 2^alpha."""
    spread = (importance.max() - importance.min()).clamp_min(torch.finfo(importance.dtype).tiny)
    return 2 ** (ALPHA * (importance.max() - importance) / spread)


@method(
    "group-lasso",
    GroupLassoConfig,
    check=fits(GroupLasso),
    paper="Wen et al. 2016, arXiv 1608.03665",
    purpose="coupled channels, driven to zero in training",
)
def group_lasso(task: Task, run: Run, config: GroupLassoConfig) -> nn.Module:
    """Group lasso: the norms of whole coupled groups are driven to zero, the smallest go, fine-tune."""
    return thinned(task, run, config, GroupLasso)
