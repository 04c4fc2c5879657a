"""Records of dynamic runs: the part of their estimate and routes that reports need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Computed:
    """Of a gated model, the fraction of the dense operations that is computed: over inputs."""

    mean: float
    std: float
    min: float
    max: float


@dataclass(frozen=True)
class Agreement:
    """Of the masks of a gated model with their targets."""

    accuracy: float
    precision: float
    recall: float


@dataclass(frozen=True)
class GatedLayer:
    """One layer of it: its filters, the fraction kept on average, and how many are kept for every input."""

    layer: str
    filters: int
    kept: float
    core: int


@dataclass(frozen=True)
class Routing:
    """Of `microglia.dynamic.statistics`, what reports need: both counts of what is computed, and how routes differ."""

    inputs: int
    honest: Computed
    paper: Computed
    agreement: Agreement
    routes: int
    signatures: int
    layers: list[GatedLayer]


@dataclass(frozen=True)
class Predicted:
    """Of `microglia.dynamic.Estimate`: r, for all layers or by layer, and what it was expected to cost by both counts."""

    r: float | dict[str, float]
    honest: float
    paper: float
