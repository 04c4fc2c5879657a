"""The result of a survey of the loss around a network."""

from __future__ import annotations

from dataclasses import dataclass

from microglia.studies.result import Result, Row


@dataclass(frozen=True)
class LinePlace(Row):
    """One place of the line, with its metrics.

    Attributes:
        x: Coordinate along the first direction.
    """

    x: float


@dataclass(frozen=True)
class Trajectory(Result):
    """A training, seen in the plane.

    Attributes:
        places: Coordinates of the network after every epoch.
        explained: Share of the variance along each direction.
    """

    places: tuple[tuple[float, ...], ...]
    explained: tuple[float, ...]


@dataclass(frozen=True)
class Surface(Result):
    """The loss on a plane and a line; None for a value that is not finite.

    Attributes:
        command: Name of the study.
        task: Name of the task.
        split: Part of the data.
        side: Places of the plane in each direction.
        range: Distance from the network to the edge.
        normalization: Normalization of the directions.
        limit: Batches to look at; None for all.
        seed: Root of the directions.
        metrics: Names of the metrics, the headline first.
        plane: Metric -> a row of values for each y.
        line: Places of the line.
        center: Metrics of the network.
        axis: Coordinates of the plane, in both directions.
        cosine: Cosine of the two directions.
        trajectory: The training; None for random directions.
        notes: Remarks for the reader.
    """

    command: str
    task: str
    split: str
    side: int
    range: float
    normalization: str
    limit: int | None
    seed: int
    metrics: tuple[str, ...]
    plane: dict[str, tuple[tuple[float | None, ...], ...]]
    line: tuple[LinePlace, ...]
    center: dict[str, float | None]
    axis: tuple[float, ...]
    cosine: float
    trajectory: Trajectory | None
    notes: tuple[str, ...]

    @property
    def headline(self) -> str:
        """The headline metric."""
        return self.metrics[0]
