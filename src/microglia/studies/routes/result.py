"""The result of a look at the routes of a gated model; see `microglia.dynamic.statistics`."""

from __future__ import annotations

from dataclasses import dataclass

from microglia.methods import Predicted
from microglia.studies.result import Result


@dataclass(frozen=True)
class Computed(Result):
    """Computed fraction of the dense operations, over inputs."""

    mean: float
    std: float
    min: float
    max: float


@dataclass(frozen=True)
class LayerRoutes(Result):
    """One gated layer.

    Attributes:
        layer: Its name.
        filters: Number of its filters.
        macs: Computed fraction of its operations.
        kept: Fraction of the filters that an input uses, mean over inputs.
        std: Standard deviation of that fraction.
        core: Filters that every input uses.
        dead: Filters that no input uses.
        diversity: 1 - core / mean number of used filters.
        accuracy: Accuracy of the masks against their targets.
        precision: Their precision.
        recall: Their recall.
        within: Mean overlap of the masks of two inputs of one class; None without such a pair.
        across: The same of two classes.
    """

    layer: str
    filters: int
    macs: float
    kept: float
    std: float
    core: int
    dead: int
    diversity: float
    accuracy: float
    precision: float | None
    recall: float | None
    within: float | None
    across: float | None


@dataclass(frozen=True)
class HeatLikeness(Result):
    """Likeness of dense and masked heat maps.

    Attributes:
        layer: The layer.
        cosine: Cosine similarity for each image.
        correlation: Correlation for each image.
    """

    layer: str
    cosine: tuple[float | None, ...]
    correlation: tuple[float | None, ...]


@dataclass(frozen=True)
class RouteStatistics(Result):
    """The routes of a split, in numbers.

    Attributes:
        task: Name of the task.
        split: Part of the data.
        inputs: Number of inputs.
        dense: Multiply-accumulates of the dense network.
        heads: Multiply-accumulates of the heads.
        honest: Computed fraction, everything counted.
        paper: Computed fraction by the published count, heads free.
        agreement: Agreement of all masks with their targets.
        routes: Number of distinct routes.
        signatures: Number of distinct tuples of filter counts.
        layers: The gated layers.
        estimate: The prediction before the training; None without a run.
        heat: Likeness of the heat maps.
    """

    task: str
    split: str
    inputs: int
    dense: int
    heads: int
    honest: Computed
    paper: Computed
    agreement: dict[str, float]
    routes: int
    signatures: int
    layers: tuple[LayerRoutes, ...]
    estimate: Predicted | None
    heat: HeatLikeness
