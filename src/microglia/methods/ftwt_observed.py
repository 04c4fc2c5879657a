"""The observations of gated models: the expected and the real computation.

They hold the parts of `microglia.dynamic.Estimate` and `microglia.dynamic.statistics` that a report shows.
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
    """Agreement of a gated model's masks with their targets."""

    accuracy: float
    precision: float
    recall: float


@dataclass(frozen=True)
class GatedLayer:
    """One gated layer.

    Attributes:
        layer: Its name.
        filters: Number of its filters.
        kept: Computed fraction of the filters, mean over inputs.
        core: Number of filters that every input computes.
    """

    layer: str
    filters: int
    kept: float
    core: int


@observations.add("routes")
@dataclass(frozen=True)
class Routing(Observation):
    """The computation of the gates on the test split.

    Attributes:
        inputs: Number of test inputs.
        honest: Computed fraction by the honest count, heads and residual widths included.
        paper: Computed fraction by the published count.
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
        """Returns the computed fraction over inputs, beside the fraction expected before the training."""
        spread, expected = self.honest, others.get("estimate")
        hoped = f"; expected {100 * expected.honest:.2f} %" if expected is not None else ""
        return (
            f"computed {100 * spread.mean:.2f} % of the MACs by the honest count ({100 * spread.min:.2f} % to "
            f"{100 * spread.max:.2f} %{hoped}), {100 * self.paper.mean:.2f} % by the published one"
        )


@observations.add("estimate")
@dataclass(frozen=True)
class Predicted:
    """The expected computation of the gates, before the training.

    Attributes:
        r: Fraction of the mass to keep, one for all layers or one per layer; None for gates without targets.
        honest: Fraction of the dense operations by the honest count.
        paper: The same fraction by the published count.
    """

    honest: float
    paper: float
    r: float | dict[str, float] | None = None
