"""The observations of gated models: what the gates were expected to compute, and what they compute.

Both hold the part of `microglia.dynamic.Estimate` and `microglia.dynamic.statistics` that a report shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from microglia.storage.observations import Observation, observations


@dataclass(frozen=True)
class Computed:
    """Fraction of the dense operations that a gated model computes, over inputs."""

    mean: float
    std: float
    min: float
    max: float


@dataclass(frozen=True)
class Agreement:
    """How well the masks of a gated model agree with their targets."""

    accuracy: float
    precision: float
    recall: float


@dataclass(frozen=True)
class GatedLayer:
    """One gated layer.

    Attributes:
        layer: Its name.
        filters: Number of its filters.
        kept: Fraction of them that is computed, mean over inputs.
        core: Number of filters that are computed for every input.
    """

    layer: str
    filters: int
    kept: float
    core: int


@observations.add("routes")
@dataclass(frozen=True)
class Routing(Observation):
    """What the gates compute on the test split.

    Attributes:
        inputs: Number of test inputs.
        honest: Everything counted, heads and residual widths included.
        paper: The published count.
        agreement: Agreement of the masks with their targets.
        routes: Number of distinct routes.
        signatures: Number of distinct tuples of filter counts.
        layers: The gated layers.
    """

    inputs: int
    honest: Computed
    paper: Computed
    agreement: Agreement
    routes: int
    signatures: int
    layers: list[GatedLayer]

    def computed(self) -> dict[str, float]:
        """Returns the mean over inputs by both counts."""
        return {"MACs per input, honest count": self.honest.mean, "MACs per input, paper's count": self.paper.mean}

    def kept(self, others: Mapping[str, Any]) -> str:
        """Returns what is computed, over inputs, beside what was expected before the training."""
        spread, expected = self.honest, others.get("estimate")
        hoped = f"; expected {100 * expected.honest:.2f} %" if expected is not None else ""
        return (
            f"computed {100 * spread.mean:.2f} % of the MACs by the honest count ({100 * spread.min:.2f} % to "
            f"{100 * spread.max:.2f} %{hoped}), {100 * self.paper.mean:.2f} % by the published one"
        )


@observations.add("estimate")
@dataclass(frozen=True)
class Predicted:
    """What the gates were expected to compute, before the training.

    Attributes:
        r: Fraction of the mass to keep, one for all layers or one for each.
        honest: Fraction of the dense operations by the honest count.
        paper: The same by the published count.
    """

    r: float | dict[str, float]
    honest: float
    paper: float
