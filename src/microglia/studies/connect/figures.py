"""Charts of a connection: error and loss along the line and the curve, and heat maps of the plane they lie in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from microglia.report.chart import COLORS, Axis, Chart, Field, Line, Look, Panel
from microglia.studies.connect.result import Connection, PlaneMap
from microglia.studies.result import encode
from microglia.studies.study import Figure

PANELS = (("error", "error (%)", 100.0), ("loss", "loss (nats)", 1.0))
"""(metric, title, factor) of the profile's two diagrams."""
SPLITS = {"train": "dash", "test": "solid"}
"""Dashes of each split."""
MAPS = (("train_loss", "train loss (nats, log scale)"), ("test_error", "test error (%)"))
LEAST = 1e-6
"""In nats: a loss below it is drawn as this one, for a log scale has no 0."""
LEVELS = 20


def figures(told: Connection) -> list[Figure]:
    """Returns the profile, and the plane where there is one.

    Args:
        told: See `microglia.studies.connect.study.connect`.
    """
    content = encode(told)
    shown = {key: content[key] for key in ("task", "ends", "line", "curve", "ensemble")}
    found = [Figure("profile", profile_chart(told), profile_rows(told), shown)]
    if told.plane is not None:
        shown = {key: content[key] for key in ("task", "ends", "plane")}
        found.append(Figure("plane", plane_chart(told, told.plane), plane_rows(told.plane), shown))
    return found


def profile_rows(told: Connection) -> list[dict[str, Any]]:
    """Returns the places of both paths, one row each: ``path``, ``t``, ``length`` and the metrics."""
    return [
        {"path": name, "t": t, "length": path.lengths[i]} | {k: v[i] for k, v in path.values.items()}
        for name, path in told.paths.items()
        for i, t in enumerate(path.ts)
    ]


def plane_rows(plane: PlaneMap) -> list[dict[str, Any]]:
    """Returns the places of the plane, one row each: its coordinates ``a``, ``b`` and the metrics."""
    return [
        {"a": a, "b": b} | {name: values[row][column] for name, values in plane.values.items()}
        for row, b in enumerate(plane.b)
        for column, a in enumerate(plane.a)
    ]


def profile_chart(told: Connection) -> Chart:
    """Returns error and loss along t: the line and the curve by color, the splits by dashes, averages as triangles."""
    panels = [Panel(Axis("t"), Axis(title, limits=(0, None)), _lines(told, metric, factor)) for metric, title, factor in PANELS]
    return Chart(_title(told), panels, columns=2, size=(11, 4.8), legend=5)


def plane_chart(told: Connection, plane: PlaneMap) -> Chart:
    """Returns heat maps of train loss and test error, in distances of weight space, with the ends, the bend and the curve.

    Source: Garipov et al. 2018, figure 1.
    """
    scale = np.array([plane.width, plane.height])
    path, places = (np.array(one) * scale for one in (plane.path, plane.places))
    lines = [
        Line("curve", *_coordinates(path), look=Look("black", dash="dash", width=1.2)),
        Line("ends", *_coordinates(places[[0, 2]]), look=Look(COLORS[1], "circle", "", size=9)),
        Line("bend", *_coordinates(places[[1]]), look=Look(COLORS[4], "triangle-up", "", size=9)),
    ]
    across, up = Axis("distance along the ends"), Axis("distance from their line")
    # A bend may lie so near the line that equal scales would show nothing.
    panels = [Panel(across, up, lines, field=_field(plane, metric, title), aspect=0.8) for metric, title in MAPS]
    return Chart(_title(told), panels, columns=2, size=(12.5, 5.4), legend=3, height=560)


def _coordinates(places: npt.NDArray[np.float64]) -> tuple[list[float], list[float]]:
    return places[:, 0].tolist(), places[:, 1].tolist()


def _lines(told: Connection, metric: str, factor: float) -> list[Line]:
    lines = [
        Line(
            f"{_label(told, name)}, {split}",
            path.ts,
            [factor * value for value in path.values[f"{split}_{metric}"]],
            look=Look(COLORS[number], dash=dash),
        )
        for number, (name, path) in enumerate(told.paths.items())
        for split, dash in SPLITS.items()
    ]
    if metric == "error" and told.ensemble is not None:
        errors = [100 * (1 - value) for value in told.ensemble.pair]
        averaged = "first and t averaged, test"
        lines.append(Line(averaged, told.ensemble.ts, errors, look=Look(COLORS[2], "triangle-up")))
    return lines


def _field(plane: PlaneMap, metric: str, title: str) -> Field:
    """Returns the contours of a metric, a loss on a log scale, an error in %."""
    values, log = np.array(plane.values[metric], dtype=np.float64), metric.endswith("loss")
    shown = np.clip(values, LEAST, None) if log else 100 * values
    low, high = float(shown.min()), float(shown.max())
    space = np.geomspace if log else np.linspace
    top = high if high > low * (1 + 1e-9) else 10 * low if log else low + 1  # levels rise even where all values are the same
    ticks = [float(place) for place in space(low, high, 6)]
    return Field(
        [a * plane.width for a in plane.a],
        [b * plane.height for b in plane.b],
        shown,
        title,
        levels=[float(level) for level in space(low, top, LEVELS)],
        colors="Viridis_r",
        log=log,
        ticks=ticks,
        labels=[f"{tick:.3g}" for tick in ticks],
        under=((metric, values),),
    )


def _label(told: Connection, name: str) -> str:
    if name == "line" or told.curve is None:
        return "line"
    kind, bends = told.curve.kind, told.curve.bends
    return {"bezier": "Bezier curve", "chain": "chain"}[kind] + (f" of {bends} bends" if bends > 1 else "")


def _title(told: Connection) -> str:
    one, other = (Path(end.target).name for end in told.ends)
    return f"{told.task}\nfrom {one} to {other}"
