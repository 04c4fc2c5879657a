"""The plane through three solutions: its axes, where a place projects to, and the loss on a grid of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from microglia.core.errors import MicrogliaError
from microglia.storage.run import Progress
from microglia.studies.space.gauge import Gauge
from microglia.studies.space.points import Point, check_alike, inner
from microglia.studies.space.profile import visit_all

FLAT = 1e-6
"""Three places whose triangle is lower than this fraction of its width lie on a line, as far as float32 can tell."""


@dataclass(frozen=True)
class Plane:
    """The plane through w0, w1 and w2, an immutable value; `plane_through` makes it.

    Its coordinates (a, b) are fractions: (0, 0) is w0, (1, 0) is w2, and w1 has b = 1. Times ``width`` and ``height`` they are
    distances in weight space, the coordinates of survey 1.2.

    Attributes:
        origin: w0.
        across: u / ||u|| with u = w2 - w0, float64.
        up: v / ||v|| with v = (w1 - w0) less its part along ``across``, float64; orthogonal to it.
        width: ||u||.
        height: ||v||.
    """

    origin: Point
    across: Point
    up: Point
    width: float
    height: float

    def coordinates(self, point: Point) -> tuple[float, float]:
        """Returns the (a, b) of a place's orthogonal projection.

        Raises:
            MicrogliaError: The place is of another architecture.
        """
        check_alike(self.origin, point)
        apart = _apart(point, self.origin)
        return inner(apart, self.across) / self.width, inner(apart, self.up) / self.height

    def point(self, a: float, b: float) -> dict[str, Tensor]:
        """Returns w0 + a ||u|| across + b ||v|| up, in the type of w0; the three places within rounding."""
        return {
            name: value.double()
            .add(self.across[name], alpha=a * self.width)
            .add_(self.up[name], alpha=b * self.height)
            .to(value.dtype)
            for name, value in self.origin.items()
        }


def plane_through(start: Point, bend: Point, end: Point) -> Plane:
    """Returns the plane through three places: w0 = start, w1 = bend, w2 = end.

    Source: Garipov et al. 2018, appendix A.2 (figure 1); survey 1.2.

    Raises:
        MicrogliaError: They are of different architectures, or lie on a line.
    """
    check_alike(start, bend)
    check_alike(start, end)
    across = _apart(end, start)
    width = math.sqrt(inner(across, across))
    rise = _apart(bend, start)
    if not width:
        raise MicrogliaError("The two ends are the same network, so no plane goes through them; give two different ones.")
    across = {name: value / width for name, value in across.items()}
    for _ in range(2):  # once more against rounding, where the bend is near the line
        along = inner(rise, across)
        rise = {name: value.sub(across[name], alpha=along) for name, value in rise.items()}
    height = math.sqrt(inner(rise, rise))
    if not height > FLAT * width:
        raise MicrogliaError(
            f"The three networks lie on a straight line (height {height:.3g}, width {width:.3g}), so no one plane goes through "
            "them; train the curve for some epochs first."
        )
    return Plane(start, across, {name: value / height for name, value in rise.items()}, width, height)


def _apart(one: Point, other: Point) -> dict[str, Tensor]:
    """Returns one - other in float64."""
    return {name: value.double() - other[name].double() for name, value in one.items()}


@dataclass(frozen=True)
class Grid:
    """Metrics on a grid of a plane.

    Attributes:
        a: Coordinates of the columns.
        b: Coordinates of the rows.
        values: Metric -> a row of values for each of ``b``.
    """

    a: tuple[float, ...]
    b: tuple[float, ...]
    values: dict[str, list[list[float]]]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, JSON-ready."""
        return {"a": list(self.a), "b": list(self.b), "values": self.values}


def grid_axes(plane: Plane, places: Sequence[Point], side: int, margin: float = 0.2) -> tuple[list[float], list[float]]:
    """Returns coordinates (a of the columns, b of the rows) of a grid around places, at equal distances.

    Args:
        plane: The plane.
        places: Places that the grid contains, such as the ends and the bend.
        side: Rows and columns, at least 2.
        margin: Beyond the outermost places, as a fraction of their distance.

    Raises:
        MicrogliaError: ``side`` is below 2.
    """
    if side < 2:
        raise MicrogliaError(f"The grid of a plane has at least 2 rows and columns; got {side}.")
    axes = []
    for values in zip(*map(plane.coordinates, places), strict=True):
        span = max(values) - min(values)
        low, high = min(values) - margin * span, max(values) + margin * span
        axes.append([low + (high - low) * i / (side - 1) for i in range(side)])
    return axes[0], axes[1]


def evaluate_plane(
    model: nn.Module,
    plane: Plane,
    a: Sequence[float],
    b: Sequence[float],
    gauge: Gauge,
    *,
    progress: Progress | None = None,
) -> Grid:
    """Measures a grid of places of a plane; batch-norm statistics are made anew at each, as the gauge says.

    Args:
        model: A network of the plane's architecture, without masks; it is visited and left as it was.
        plane: The plane.
        a: Coordinates of the columns.
        b: Coordinates of the rows.
        gauge: How to measure.
        progress: Where an interrupted measurement goes on, place by place.
    """
    stops = [(x, y) for y in b for x in a]
    rows = visit_all(model, lambda stop: plane.point(*stop), stops, gauge, progress=progress, title="plane")
    lines = [rows[start : start + len(a)] for start in range(0, len(rows), len(a))]
    return Grid(tuple(a), tuple(b), {name: [[row[name] for row in line] for line in lines] for name in rows[0]})
