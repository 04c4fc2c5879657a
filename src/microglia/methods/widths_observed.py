"""The observations of methods that remove channels: widths, scales of norms, ranks of maps, and the search for widths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from microglia.storage.observations import observations

BINS = 40
"""Bins of a histogram of scales."""
SHOWN = 3
"""Layers whose ranks are kept channel by channel: the first, the middle and the last."""


@dataclass(frozen=True)
class Scales:
    """The scales of norms at the end of the training under a penalty, before the cut.

    Attributes:
        largest: Upper end of the histogram, which starts at 0.
        counts: Number of |scales| in each of equal bins.
        cut: The largest |scale| of a channel that goes; None if none goes.
    """

    largest: float
    counts: list[int]
    cut: float | None = None


@dataclass(frozen=True)
class Ranks:
    """Ranks of maps over batches of images, in the dense network.

    Attributes:
        agreement: Spearman's correlation of the channels' mean ranks over two disjoint halves of the batches, by layer; without
            layers in which all ranks are equal.
        by_batch: Mean rank of each channel in each batch, (batches, channels), of the first, the middle and the last layer.
    """

    agreement: dict[str, float] = field(default_factory=dict)
    by_batch: dict[str, list[list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """One short training in the search for the strength of a penalty.

    Attributes:
        strength: Weight of the penalty, lambda.
        t: Weight of a scale itself beside its distance to the mean.
        flops: Fraction of the multiply-accumulates that its thresholds leave.
    """

    strength: float
    t: float
    flops: float


@observations.add("widths")
@dataclass(frozen=True)
class WidthVectors:
    """The width of each group of coupled channels.

    Attributes:
        widths: Channels before; for a method that learns fractions, the learned fraction.
        counts: Channels that stay.
        density: Kept fraction of the channels that could go.
        scales: Scales of norms, if the method ranks by them.
        ranks: Ranks of maps, if the method ranks by them.
        frozen: Channels of each group whose filters were frozen while the model trained on; empty if none could be.
        probes: Short trainings in the search for the strength.
    """

    widths: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    density: float | None = None
    scales: Scales | None = None
    ranks: Ranks | None = None
    frozen: dict[str, float] = field(default_factory=dict)
    probes: list[Probe] = field(default_factory=list)

    @property
    def fractions(self) -> dict[str, float]:
        """The kept fraction of each group."""
        return {n: self.counts[n] / width if width > 1 else width for n, width in self.widths.items() if n in self.counts}


@dataclass(frozen=True)
class Candidate:
    """One evaluated width vector.

    Attributes:
        widths: Channels of each group.
        value: Its value, higher is better.
    """

    widths: list[int]
    value: float


@dataclass(frozen=True)
class Round:
    """One round of a search.

    Attributes:
        best: Best value of the round.
        median: Median of its values.
        candidates: Number of its vectors.
    """

    best: float
    median: float
    candidates: float = 0


@observations.add("candidates")
@dataclass(frozen=True)
class WidthSearch:
    """A search over width vectors.

    Attributes:
        candidates: Every evaluated vector.
        rounds: The rounds in order.
        rejected: Number of drawn vectors that missed the budget.
    """

    candidates: list[Candidate] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    rejected: int = 0


def scales_of(scales: Sequence[Tensor], ranking: Tensor, kept: Tensor) -> dict[str, Any]:
    """Returns the fields of `Scales`, JSON-ready.

    Args:
        scales: The scales of each norm.
        ranking: Mean |scale| of each channel, (count,).
        kept: Channels that stay, boolean (count,).
    """
    values = torch.cat([scale.detach().abs().flatten().float().cpu() for scale in scales])
    largest = max(float(values.max()), 1e-12)
    gone = ranking.cpu()[~kept.cpu()]
    return {
        "largest": largest,
        "counts": [int(count) for count in torch.histc(values, BINS, 0, largest)],
        "cut": float(gone.max()) if len(gone) else None,
    }


def ranks_of(found: dict[str, list[Tensor]]) -> dict[str, Any]:
    """Returns the fields of `Ranks`, JSON-ready.

    Args:
        found: Layer -> (sums of ranks, of norms, images) of each batch, each (3, channels).
    """
    means = {name: torch.stack([sums[0] / sums[2] for sums in batches]).cpu() for name, batches in found.items()}
    names = list(means)
    shown = dict.fromkeys(names[at] for at in (0, len(names) // 2, -1)) if names else {}
    agreement = {name: spearman(*halves) for name, rows in means.items() if len(rows) > 1 and (halves := _halves(rows))}
    return {
        "agreement": {name: value for name, value in agreement.items() if not math.isnan(value)},
        "by_batch": {name: means[name].tolist() for name in shown},
    }


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[: len(rows) // 2].mean(0), rows[len(rows) // 2 :].mean(0)


def spearman(one: Tensor, other: Tensor) -> float:
    """Returns Spearman's correlation of two vectors, ties at their mean place; NaN where one of them is constant.

    Source: Spearman 1904, "The Proof and Measurement of Association between Two Things".
    """
    places = torch.stack([_places(one), _places(other)])
    spread = places.std(1)
    return float(torch.corrcoef(places)[0, 1]) if bool((spread > 0).all()) else float("nan")


def _places(values: Tensor) -> Tensor:
    """Returns the place of each value in ascending order, float64; equal values share the mean of theirs."""
    _, group, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    places: Tensor = (last - (sizes.double() - 1) / 2)[group]
    return places
