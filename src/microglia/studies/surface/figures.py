"""Charts of a surface: the loss on a plane as contours on a log scale, and along a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from microglia.report.chart import COLORS, Axis, Chart, Field, Line, Look, Panel
from microglia.studies.result import encode
from microglia.studies.study import Figure
from microglia.studies.surface.result import Surface

LEVELS = 24
LEAST = 1e-8
"""In nats: a loss below it is drawn as this one, for a log scale has no 0."""


def figures(told: Surface) -> list[Figure]:
    """Returns the plane and the line.

    Args:
        told: See `microglia.studies.surface.study.view_surface`.
    """
    content = encode(told)
    plane = {key: content[key] for key in ("task", "split", "range", "normalization", "axis", "plane", "trajectory")}
    line = {key: content[key] for key in ("task", "split", "range", "normalization", "line")}
    return [
        Figure("plane", plane_chart(told), plane_rows(told), plane),
        Figure("line", line_chart(told), told.line, line),
    ]


def plane_rows(told: Surface) -> list[dict[str, Any]]:
    """Returns the places of the plane, one row each: ``x``, ``y`` and the metrics."""
    axis, plane = told.axis, told.plane
    return [
        {"x": x, "y": y, **{name: plane[name][row][column] for name in told.metrics}}
        for row, y in enumerate(axis)
        for column, x in enumerate(axis)
    ]


def plane_chart(told: Surface) -> Chart:
    """Returns the contours of the loss, levels evenly spaced in its logarithm; the network is the cross in the middle."""
    loss, headline = _losses(told.plane["loss"]), told.headline
    low, high = _bounds(loss)
    ticks, labels = _ticks(low, high)
    contours = Field(
        told.axis,
        told.axis,
        loss,
        f"{told.split} loss (nats, log scale)",
        levels=np.geomspace(low, high, LEVELS).tolist(),
        colors="Viridis",
        log=True,
        ticks=ticks,
        labels=labels,
        traced=True,
        under=(("loss", loss), (headline, told.plane[headline])),
    )
    lines = [Line("", [0.0], [0.0], look=Look("black", "plus", "", size=11))]
    if told.trajectory:
        x, y = zip(*told.trajectory.places, strict=True)
        lines.insert(0, Line("training", x, y, look=Look(COLORS[1], "circle", size=3.5, width=1.2, outline="white")))
    first, second = _labels(told)
    panel = Panel(Axis(first), Axis(second), lines, field=contours, aspect=1)
    return Chart(_title(told), [panel], size=(7.8, 6.2), legend=0, height=680)


def line_chart(told: Surface) -> Chart:
    """Returns the loss, on a log scale, and the headline along the first direction."""
    headline, x = told.headline, [row.x for row in told.line]
    loss = _losses([row.metrics["loss"] for row in told.line])
    ticks, labels = _ticks(*_bounds(loss))
    across, split = Axis(_labels(told)[0]), told.split
    losses = Line("", x, loss.tolist(), look=Look(COLORS[0], "circle", size=3))
    values = _numbers([row.metrics[headline] for row in told.line]).tolist()
    panels = [
        Panel(across, Axis(f"{split} loss (nats, log scale)", "log", ticks=ticks, labels=labels), [losses]),
        Panel(across, Axis(f"{split} {headline}"), [Line("", x, values, look=Look(COLORS[1], "square", size=3))]),
    ]
    return Chart(_title(told), panels, columns=2, size=(10.5, 4.4), legend=-1)


def _losses(values: Any) -> npt.NDArray[np.float64]:
    """Returns losses fit for a log scale; NaN and infinite ones are NaN."""
    numbers = _numbers(values)
    return np.where(np.isfinite(numbers), np.maximum(numbers, LEAST), np.nan)


def _numbers(values: Any) -> npt.NDArray[np.float64]:
    return np.array(values, dtype=np.float64)  # None becomes NaN


def _bounds(loss: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Returns the smallest and the largest loss, apart where all are the same or none is a number."""
    if np.isnan(loss).all():
        return LEAST, 1.0
    low, high = float(np.nanmin(loss)), float(np.nanmax(loss))
    return (low * (1 - 1e-9), high * (1 + 1e-9)) if high > 1.001 * low else (low / 1.01, high * 1.01)


def _ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Returns places on a log scale, evenly spread, and their labels: between two powers of ten there may be none."""
    places = np.geomspace(low, high, 6).tolist()
    return places, [f"{place:.3g}" for place in places]


def _labels(told: Surface) -> Sequence[str]:
    if not told.trajectory:
        return "first random direction", "second random direction"
    shares = [f"{100 * share:.1f} %" for share in told.trajectory.explained]
    return [f"{name} principal component ({share})" for name, share in zip(("first", "second"), shares, strict=True)]


def _title(told: Surface) -> str:
    center = told.center
    headline = told.headline
    here = ", ".join(f"{name} {center[name]:.4g}" for name in ("loss", headline) if center[name] is not None)
    how = "plane of its training" if told.trajectory else f"{told.normalization} normalization"
    return f"{told.task}, {told.split} split, {how}\nat the network: {here}"
