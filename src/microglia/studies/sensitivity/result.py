"""The result of a sensitivity analysis."""

from __future__ import annotations

from dataclasses import dataclass

from microglia.studies.result import Result, Row


@dataclass(frozen=True)
class Place(Row):
    """The network with one layer pruned, and its metrics.

    Attributes:
        density: Density asked for.
        kept: Weights kept.
    """

    density: float
    kept: int


@dataclass(frozen=True)
class LayerPlaces(Result):
    """One layer at all densities.

    Attributes:
        layer: Name of its weight.
        size: Number of its weights.
        places: The places, from high to low density.
    """

    layer: str
    size: int
    places: tuple[Place, ...]


@dataclass(frozen=True)
class LayerSensitivity(Result):
    """The metrics of a network with each layer alone pruned to each density.

    Attributes:
        command: Name of the study.
        task: Name of the task.
        weights: Digest of the network.
        densities: Densities, from high to low.
        pattern: Pattern of the pruning.
        score: Score of the weights.
        reduction: Reduction of a unit's scores.
        layers: The layers.
        exclude: Selectors of layers that are left out.
        split: Part of the data.
        recalibrate: Training batches for batch-norm statistics.
        limit: Batches to look at; None for all.
        seed: Root of the draws.
        metric: The headline metric.
        unit: Its unit.
        better: ``higher`` or ``lower``.
        dense: Metrics of the network as it is; None for one that is not finite.
        file: File for the scope ``sensitivity:FILE``.
        notes: Remarks for the reader.
    """

    command: str
    task: str
    weights: str
    densities: tuple[float, ...]
    pattern: str
    score: str
    reduction: str
    layers: tuple[LayerPlaces, ...]
    exclude: tuple[str, ...]
    split: str
    recalibrate: int
    limit: int | None
    seed: int
    metric: str
    unit: str
    better: str
    dense: dict[str, float | None]
    file: str
    notes: tuple[str, ...]
