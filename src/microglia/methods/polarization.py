"""Polarization (Zhuang et al. 2020): scales of norms are driven to 0 or away from it, so that the cut is in a gap.

The algorithm (spec: survey 8.3), over all scales gamma of the network, g their mean:
    minimize L + lambda sum_i (t |gamma_i| - |gamma_i - g|); clamp gamma to [0, a] after every step
    to a budget, the channels of the smallest scales go; without one, those at or below a threshold in each layer, the first
    local minimum of the histogram of its scales
    fine-tune.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.graph.channels.widths import highest
from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.config import method
from microglia.methods.scales import ScaleConfig, ScalePruner
from microglia.storage.run import Run
from microglia.tasks.task import Task

BINS = 100
FALLBACK = 0.01
"""The threshold of a layer whose histogram has no local minimum; the "fixed" strategy of the authors' code."""
HIGH = 0.2
"""A threshold above it removes scales that are not near 0."""


@dataclass(frozen=True)
class PolarizationConfig(ScaleConfig):
    """Polarization; without density, params and flops a threshold in each layer decides.

    Attributes:
        strength: lambda; for CIFAR 5e-5 with ResNet-56 and 3e-5 with VGG-16.
        t: Weight of a scale itself beside its distance to the mean: the larger, the more scales go to 0. With n scales
            about n (1/2 - t/4) stay at ``largest`` where the regularizer alone decides.
        largest: a, the upper bound of scales.
    """

    strength: float = 5e-5
    t: float = 1.4
    largest: float = 1.0

    def check_values(self) -> None:
        """Raises `BudgetError` for a bound that is not above 0 and a t that is no number."""
        if not self.largest > 0 or not math.isfinite(self.t):
            raise BudgetError(f"largest is above 0 and t a number; got {self.largest} and {self.t}.")


class Polarization(ScalePruner):
    """Drives scales apart, to be stepped inside anybody's loop; see `ChannelPruner`."""

    Config = PolarizationConfig

    @property
    def own(self) -> PolarizationConfig:
        """The config."""
        return cast(PolarizationConfig, self.config)

    def penalty(self) -> Tensor | float:
        """Returns lambda times the regularizer of all scales together."""
        if self.kept is not None:
            return 0.0
        return self.own.strength * polarized(torch.cat([scale.flatten() for scale in self.scales]), self.own.t)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Goes on by one optimizer step; scales stay in [0, a]."""
        super().step(optimizer)
        for scale in self.scales:
            scale.clamp_(0, self.own.largest)

    def choose(self, ranking: Tensor) -> Tensor:
        """Returns the channels that meet the budget; without one those above the threshold of a norm of theirs."""
        if self.own.budget is not None:
            return super().choose(ranking)
        above = self.gathered([(s.detach() > threshold(s.detach())).double() for s in self.scales]) > 0
        kept, lengths = above | ~self.movable().to(above.device), list(self.units.lengths)
        parts = zip(torch.split(kept, lengths), torch.split(ranking.to(above.device), lengths), strict=True)
        return torch.cat([own if bool(own.any()) else highest(ranks, 1) for own, ranks in parts])

    def final(self) -> Tensor:
        """Returns the channels that stay; warns of a threshold that is not near 0."""
        if self.own.budget is None:
            high = {p.name: cut for p, s in zip(self.places, self.scales, strict=True) if (cut := threshold(s.detach())) > HIGH}
            if high:
                name, cut = max(high.items(), key=lambda item: item[1])
                warnings.warn(
                    f"The scales of {len(high)} norms are cut above {HIGH:g}, those of {name} at {cut:.2f}: they have not come "
                    "apart. Train longer, or raise strength.",
                    stacklevel=2,
                )
        return super().final()


def polarized(scales: Tensor, t: float) -> Tensor:
    """Returns sum_i (t |gamma_i| - |gamma_i - mean|) (equation 2); concave where all are at least 0."""
    return t * scales.abs().sum() - (scales - scales.mean()).abs().sum()


def threshold(scales: Tensor, fallback: float = FALLBACK) -> float:
    """Returns the first local minimum of the histogram of a layer's scales, over [0, 1] in 100 bins.

    Scan from the left for bins with d_i <= 0 <= d_(i+1), where d_i is the number in bin i + 1 less that in bin i: the left edge
    of bin i + 1. Values outside are dropped, as in the authors' code. Without a minimum it is the ``fallback``.
    """
    counts = torch.histc(scales.detach().float().cpu(), BINS, 0, 1)
    steps = counts.diff()
    found = ((steps[:-1] <= 0) & (steps[1:] >= 0)).nonzero()
    return (int(found[0]) + 1) / BINS if len(found) else fallback


@method("polarization", PolarizationConfig, check=fits(Polarization))
def polarization(task: Task, run: Run, config: PolarizationConfig) -> nn.Module:
    """Polarization: scales are driven to 0 or away from it, those at 0 go, fine-tune."""
    return thinned(task, run, config, Polarization)
