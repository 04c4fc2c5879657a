"""One layer at a time: pruned by itself to each density, everything else dense."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.core.layers import Layer, oriented
from microglia.core.masks import fold, mask, masks_of
from microglia.core.patterns import Pattern
from microglia.core.selection import select
from microglia.core.sensitivity import LayerCurve, Sensitivity
from microglia.methods.pruner import Pruner
from microglia.storage.run import Progress
from microglia.studies.space.gauge import Gauge
from microglia.tasks.task import Task

DENSITIES = (0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05)
WORSE = 10
"""A loss that is not finite counts as this many times the largest finite one."""
Json = dict[str, Any]


def check_densities(densities: Sequence[float] | None, pattern: Pattern) -> tuple[float, ...]:
    """Returns the densities to measure, falling; a pattern that keeps a fraction by itself has that one alone by default.

    Raises:
        BudgetError: One is not in (0, 1), or below what the pattern keeps by itself.
    """
    fixed = pattern.fixed_density
    if densities is None:
        return DENSITIES if fixed is None else (fixed,)
    if not densities or not all(0 < density < 1 for density in densities):
        raise BudgetError(f"The densities are fractions kept of a layer, in (0, 1), such as 0.5,0.2; got {list(densities)}.")
    if fixed is not None and min(densities) < fixed:
        raise BudgetError(f"{pattern} keeps {fixed:g} of each layer by itself; a density of {min(densities):g} is below that.")
    return tuple(sorted(set(densities), reverse=True))


@dataclass(frozen=True)
class Probe:
    """The network that is pruned, and how it is measured.

    Attributes:
        model: The network; it is left as it is.
        pruner: Made for the model: layers, pattern, score and reduction.
        scores: Score of every weight, by layer, as the whole network gives them.
        densities: To prune each layer to.
        gauge: Measures a network.
    """

    model: nn.Module
    pruner: Pruner
    scores: Mapping[str, Tensor]
    densities: Sequence[float]
    gauge: Gauge

    def dense(self) -> dict[str, float]:
        """Returns the metrics of the network as it is."""
        return self._measured({})

    def layer(self, name: str, progress: Progress) -> list[Json]:
        """Returns ``density``, ``kept`` (weights) and the metrics of the network at each density of one layer.

        A layer whose weights were pruned before keeps no more than it has: its larger densities all measure the same.
        """
        layer, alive = self.pruner.layers[name], masks_of(self.model)
        places: list[Json] = list(progress.state or [])
        for density in self.densities[len(places) :]:
            chosen = self._chosen(layer, density, alive.get(name))
            places.append({"density": density, "kept": int(chosen.sum()), **self._measured({name: chosen})})
            progress.save(places)
        return places

    def _chosen(self, layer: Layer, density: float, alive: Tensor | None) -> Tensor:
        layers, name = {layer.name: layer}, layer.name
        size = layer.raw.numel()
        keep = math.floor(density * size + 0.5)
        masks = select(
            oriented(layers, {name: self.scores[name]}),
            pattern=self.pruner.pattern,
            keep=keep if alive is None else min(keep, int(alive.sum())),
            reduction=self.pruner.config.reduction,
            alive=None if alive is None else oriented(layers, {name: alive}),
        )
        return oriented(layers, masks)[name]

    @torch.no_grad()
    def _measured(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        trial = deepcopy(self.model)
        mask(trial, masks)
        prefix = f"{self.gauge.splits[0]}_"
        return {name.removeprefix(prefix): value for name, value in self.gauge(fold(trial)).items()}


def estimate_of(task: Task, dense: Mapping[str, float]) -> str:
    """Returns the metric by which layers share a budget: the loss where the task measures one, else the headline."""
    return "loss" if "loss" in dense else task.headline


def curves_of(task: Task, dense: Mapping[str, float], sizes: Mapping[str, int], layers: Sequence[Json]) -> Sensitivity:
    """Returns what was measured as a scope; a metric that is better when higher is turned around.

    Args:
        task: Its metrics.
        dense: Metrics of the dense network.
        sizes: Weights by layer.
        layers: Each with its name (``layer``) and ``places``.
    """
    metric = estimate_of(task, dense)
    sign = 1.0 if task.metrics[metric].better == "lower" else -1.0
    values = [place[metric] for row in layers for place in row["places"]]
    worst = max(sign * value for value in [*values, dense[metric]] if math.isfinite(value))

    def loss(value: float) -> float:
        return sign * value if math.isfinite(value) else worst + (WORSE - 1) * abs(worst)

    curves = {
        row["layer"]: LayerCurve(sizes[row["layer"]], tuple((place["kept"], loss(place[metric])) for place in row["places"]))
        for row in layers
    }
    return Sensitivity(loss(dense[metric]), curves)
