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
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from microglia.core.batch import to_device
from microglia.core.errors import BudgetError
from microglia.core.masks import MaskSet
from microglia.graph.channels.widths import highest
from microglia.methods.channel_gates import ChannelGates
from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.config import method
from microglia.methods.polarization_search import Strengths, find_strengths
from microglia.methods.procedure import dense_model
from microglia.methods.scales import ScaleConfig, ScalePruner
from microglia.storage.run import Progress, Run
from microglia.tasks.task import Task
from microglia.train.fit import fit

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
        probes: Maximum number of short trainings that search for ``strength`` and ``t`` to meet ``flops``; 0 for no search.
        probe_epochs: Epochs of each.
        largest_strength: Upper end of the interval in which ``strength`` is searched.
        within: Tolerated distance of the remaining operations to ``flops``, a fraction (delta of the paper).
        gates: Whether channels get factors of their own in place of the scales of norms: for networks without norms, or whose
            norms serve several layers. The factors start at 1 and are merged into the weights at the end.
    """

    strength: float = 5e-5
    t: float = 1.4
    largest: float = 1.0
    probes: int = 0
    probe_epochs: int = 1
    largest_strength: float = 2e-4
    within: float = 0.05
    gates: bool = False

    def check_values(self) -> None:
        """Raises `BudgetError` for a bound that is not above 0 and a t that is no number."""
        if not self.largest > 0 or not math.isfinite(self.t):
            raise BudgetError(f"largest is above 0 and t a number; got {self.largest} and {self.t}.")
        if min(self.probes, self.probe_epochs) < 0 or not (self.largest_strength > 0 and 0 < self.within < 1):
            raise BudgetError(
                f"probes and probe_epochs are at least 0, largest_strength is above 0 and within in (0, 1); got {self.probes}, "
                f"{self.probe_epochs}, {self.largest_strength} and {self.within}."
            )
        if self.gates and (self.selection or self.initial_scale is not None):
            raise BudgetError("gates take the place of the scales of norms: leave selection and initial_scale out.")
        if self.probes and self.flops is None:
            raise BudgetError(
                "probes search for the strength that leaves a fraction of the operations: give flops, this fraction."
            )


class Polarization(ScalePruner):
    """Drives scales apart, to be stepped inside anybody's loop; see `ChannelPruner`."""

    Config = PolarizationConfig

    @property
    def own(self) -> PolarizationConfig:
        """The config."""
        return cast(PolarizationConfig, self.config)

    def prepare(self) -> None:
        """Finds the scales, or gives the channels gates."""
        self.gates: ChannelGates | None = None
        self.decided: Tensor | None = None
        if not self.own.gates:
            super().prepare()
            return
        self.observed, self.places = None, []
        self.gates = ChannelGates(self.model, self.units)
        self.scales = [self.gates.values]

    def movable(self) -> Tensor:
        """Returns the channels of the groups in which each has a scale or a gate."""
        return super().movable() if self.gates is None else torch.ones(self.units.count, dtype=torch.bool)

    @torch.no_grad()
    def ranking(self) -> Tensor:
        """Returns |gamma|, the mean over the norms of a channel, or its gate."""
        return super().ranking() if self.gates is None else self.gates.values.detach().double().abs()

    def finish(self) -> MaskSet:
        """Masks the channels that do not stay; gates are merged into the weights first. Returns the masks."""
        if self.kept is None and self.gates is not None:
            self.decided = self.final()
            self.gates.merge(self.model, self.raw)
        return super().finish()

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
        each = [(scale > threshold(scale)).double() for scale in self.by_layer().values()]
        above = (self.gathered(each) if self.gates is None else torch.cat(each)) > 0
        kept, lengths = above | ~self.movable().to(above.device), list(self.units.lengths)
        parts = zip(torch.split(kept, lengths), torch.split(ranking.to(above.device), lengths), strict=True)
        return torch.cat([own if bool(own.any()) else highest(ranks, 1) for own, ranks in parts])

    def by_layer(self) -> dict[str, Tensor]:
        """Returns the scales of each norm by name, or the gates of each group."""
        if self.gates is None:
            return {place.name: scale.detach() for place, scale in zip(self.places, self.scales, strict=True)}
        return dict(zip(self.units.names, torch.split(self.gates.values.detach(), list(self.units.lengths)), strict=True))

    def left(self) -> float:
        """Returns the fraction of multiply-accumulates that the thresholds would leave now."""
        kept = torch.split(self.choose(self.ranking()), list(self.units.lengths))
        return self.units.fraction("flops", [int(part.sum()) for part in kept])

    def final(self) -> Tensor:
        """Returns the channels that stay; warns of a threshold that is not near 0."""
        if self.decided is not None:
            return self.decided
        if self.own.budget is None:
            high = {name: cut for name, scale in self.by_layer().items() if (cut := threshold(scale)) > HIGH}
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


@method(
    "polarization",
    PolarizationConfig,
    check=fits(Polarization),
    paper="Zhuang et al. 2020",
    purpose="whole channels; scales are clearly on or off",
)
def polarization(task: Task, run: Run, config: PolarizationConfig) -> nn.Module:
    """Polarization: scales are driven to 0 or away from it, those at 0 go, fine-tune."""
    if not config.probes:
        return thinned(task, run, config, Polarization)
    found = _searched(task, run, config)
    model = thinned(task, run, replace(config, strength=found.strength, t=found.t), Polarization)
    run.observations["widths"] = {**run.observations["widths"], "probes": found.told}
    return model


def _searched(task: Task, run: Run, config: PolarizationConfig) -> Strengths:
    """Returns the strength and t of a search; every short training is a stage, so that a killed search goes on."""
    dense = dense_model(task, run, config.dense)
    short = replace(config.train, epochs=config.probe_epochs, lr=config.sparse.lr, distill=0.0)
    example = to_device(task.example, run.device)
    assert config.flops is not None

    def measure(strength: float, t: float) -> float:
        own = replace(config, strength=strength, t=t, density=None, params=None, flops=None, probes=0)

        def stage(progress: Progress) -> dict[str, float]:
            model = deepcopy(dense)
            pruner = Polarization(model, own, total_steps=1, example_inputs=example)
            fit(model, task, short, seed=run.seed, device=run.device.type, pruner=pruner, progress=progress, title="probe")
            return {"flops": pruner.left()}

        return float(run.stage(f"probe-{strength:.6g}-{t:g}", stage)["flops"])

    return find_strengths(measure, config.flops, probes=config.probes, largest=config.largest_strength, within=config.within)
