"""The result of a connection: two networks, the straight line, a trained curve, and the plane they lie in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from microglia.studies.result import Number, Result, Row
from microglia.studies.space.profile import AlongPath


@dataclass(frozen=True)
class End(Row):
    """One of the two networks, with its metrics as stored.

    Attributes:
        target: Run directory or saved model's directory.
    """

    target: str


@dataclass(frozen=True)
class MetricSummary(Result):
    """One metric along a path; see `microglia.studies.space.profile.Summary`."""

    min: Number
    max: Number
    mean: Number
    integral: Number
    barrier: Number


@dataclass(frozen=True)
class PathProfile(Result):
    """A path, measured at some places.

    Attributes:
        ts: Places, in [0, 1].
        lengths: Euclidean length walked to each.
        values: Metric -> one value for each place.
        summary: Metric -> its summary.
    """

    ts: tuple[float, ...]
    lengths: tuple[float, ...]
    values: dict[str, tuple[Number, ...]]
    summary: dict[str, MetricSummary]


@dataclass(frozen=True)
class CurveProfile(PathProfile):
    """The trained curve.

    Attributes:
        kind: ``bezier`` or ``chain``.
        bends: Number of its trained points.
        training: One row for each epoch of its training.
    """

    kind: str
    bends: int
    training: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class PlaneMap(Result):
    """Metrics on the plane through the ends and the middle bend.

    Attributes:
        a: Coordinates of the columns.
        b: Coordinates of the rows.
        values: Metric -> a row of values for each of ``b``.
        width: Length of one unit of ``a`` in weight space.
        height: Length of one unit of ``b``.
        places: Coordinates of the first end, the bend, and the second end.
        path: Coordinates of the curve.
    """

    a: tuple[float, ...]
    b: tuple[float, ...]
    values: dict[str, tuple[tuple[Number, ...], ...]]
    width: float
    height: float
    places: tuple[tuple[float, float], ...]
    path: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Connection(Result):
    """Two networks and the paths between them.

    Attributes:
        task: Name of the task.
        ends: Both networks.
        distance: Euclidean distance between them.
        notes: Remarks for the reader.
        line: The straight line.
        curve: The trained curve; None without one.
        below: Metric -> whether the curve's largest value is below the line's; None without a curve.
        ensemble: Accuracy of averaged networks of the curve; None without it.
        plane: The plane; None without one.
    """

    task: str
    ends: tuple[End, ...]
    distance: float
    notes: tuple[str, ...]
    line: PathProfile
    curve: CurveProfile | None
    below: dict[str, bool] | None
    ensemble: AlongPath | None
    plane: PlaneMap | None

    @property
    def paths(self) -> dict[str, PathProfile]:
        """The measured paths by name: ``line``, and ``curve`` if there is one."""
        return {"line": self.line} if self.curve is None else {"line": self.line, "curve": self.curve}
