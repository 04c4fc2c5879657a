"""Pictures of a connection: error and loss along the line and the curve, and heat maps of the plane they lie in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from plotly.subplots import make_subplots

from microglia.report.figure_files import write_figure
from microglia.report.figures import COLORS

SLUG = "connect"
PANELS = (("error", "error (%)", 100.0), ("loss", "loss (nats)", 1.0))
"""(metric, title, factor) of the profile's two diagrams."""
SPLITS = {"train": ("--", "dash"), "test": ("-", "solid")}
"""Dashes of each split, on paper and on the screen."""
MAPS = (("train_loss", "train loss (nats, log scale)"), ("test_error", "test error (%)"))
LEAST = 1e-6
"""In nats: a loss below it is drawn as this one, for a log scale has no 0."""
LEVELS = 20


def draw(told: Mapping[str, Any], directory: Path) -> list[Path]:
    """Writes the profile, and the plane where there is one, in every form; returns the paths.

    Args:
        told: What `microglia.studies.connect.study.connect` told.
        directory: Where.

    Raises:
        FileError: They cannot be written.
    """
    shown = {key: told[key] for key in ("task", "ends", "line", "curve", "ensemble")}
    printed = partial(profile_figure, told)
    paths = write_figure(
        directory, SLUG, "profile", printed=printed, interactive=profile_page(told), told=shown, rows=profile_rows(told)
    )
    if told["plane"] is not None:
        shown = {key: told[key] for key in ("task", "ends", "plane")}
        printed = partial(plane_figure, told)
        paths += write_figure(
            directory, SLUG, "plane", printed=printed, interactive=plane_page(told), told=shown, rows=plane_rows(told)
        )
    return paths


def profile_rows(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the places of both paths, one row each: ``path``, ``t``, ``length`` and the metrics."""
    return [
        {"path": path, "t": t, "length": told[path]["lengths"][i]} | {k: v[i] for k, v in told[path]["values"].items()}
        for path in _paths(told)
        for i, t in enumerate(told[path]["ts"])
    ]


def plane_rows(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the places of the plane, one row each: its coordinates ``a``, ``b`` and the metrics."""
    plane = told["plane"]
    return [
        {"a": a, "b": b} | {name: values[row][column] for name, values in plane["values"].items()}
        for row, b in enumerate(plane["b"])
        for column, a in enumerate(plane["a"])
    ]


def profile_figure(told: Mapping[str, Any]) -> Figure:
    """Returns error and loss along t: the line and the curve by colour, the splits by dashes, averages as triangles."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(told), fontsize="medium")
    for axes, (metric, title, factor) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for name, split, ts, values in _lines(told, metric, factor):
            color, dash = COLORS[_paths(told).index(name)], SPLITS[split][0]
            axes.plot(ts, values, color=color, linestyle=dash, label=f"{_label(told, name)}, {split}")
        if metric == "error" and told["ensemble"] is not None:
            axes.plot(*_averaged(told), color=COLORS[2], marker="^", label="first and t averaged, test")
        axes.set_xlabel("t")
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="0.9")
        axes.set_axisbelow(True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def profile_page(told: Mapping[str, Any]) -> go.Figure:
    """Returns the same for the screen."""
    figure = make_subplots(cols=2, horizontal_spacing=0.08)
    for column, (metric, title, factor) in enumerate(PANELS, 1):
        for name, split, ts, values in _lines(told, metric, factor):
            line = {"color": COLORS[_paths(told).index(name)], "dash": SPLITS[split][1]}
            label = f"{_label(told, name)}, {split}"
            trace = go.Scatter(x=ts, y=values, name=label, legendgroup=label, showlegend=column == 1, line=line, mode="lines")
            figure.add_trace(trace, row=1, col=column)
        if metric == "error" and told["ensemble"] is not None:
            ts, values = _averaged(told)
            marker = {"symbol": "triangle-up", "size": 8}
            averaged = go.Scatter(x=ts, y=values, name="first and t averaged, test", line={"color": COLORS[2]}, marker=marker)
            figure.add_trace(averaged, row=1, col=column)
        figure.update_xaxes(title="t", row=1, col=column)
        figure.update_yaxes(title=title, rangemode="tozero", row=1, col=column)
    return figure.update_layout(template="plotly_white", height=480, title=_title(told, "<br>"), hovermode="x unified")


def plane_figure(told: Mapping[str, Any]) -> Figure:
    """Returns heat maps of train loss and test error, in distances of weight space, with the ends, the bend and the curve.

    Source: Garipov et al. 2018, figure 1.
    """
    plane = told["plane"]
    figure = Figure(figsize=(12.5, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(told), fontsize="medium")
    (x, y), path, places = _scaled(plane)
    for axes, (metric, title) in zip(figure.subplots(1, 2), MAPS, strict=True):
        values = _heights(plane, metric)
        filled = axes.contourf(x, y, values, levels=_levels(values), cmap="viridis_r")
        bar = figure.colorbar(filled, ax=axes, label=title)
        ticks, words = _ticks(values, metric)
        bar.set_ticks(ticks, labels=words)
        axes.plot(*path.T, color="black", linewidth=1.2, linestyle="--", label="curve")
        axes.plot(*places[[0, 2]].T, "o", color=COLORS[1], markeredgecolor="white", markersize=9, label="ends")
        axes.plot(*places[1], "^", color=COLORS[4], markeredgecolor="white", markersize=9, label="bend")
        axes.set_box_aspect(0.8)  # a bend may lie so near the line that equal scales would show nothing
        axes.set_xlabel("distance along the ends")
        axes.set_ylabel("distance from their line")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def plane_page(told: Mapping[str, Any]) -> go.Figure:
    """Returns the same for the screen, with the metric of every place under the pointer."""
    plane = told["plane"]
    (x, y), path, places = _scaled(plane)
    figure = make_subplots(cols=2, column_titles=[title for _, title in MAPS], horizontal_spacing=0.16)
    for column, (metric, _) in enumerate(MAPS, 1):
        values = _heights(plane, metric)
        ticks, words = _ticks(values, metric)
        bar = {"x": 0.43 if column == 1 else 1.01, "tickvals": ticks, "ticktext": words}
        map_ = go.Contour(
            x=x,
            y=y,
            z=values.tolist(),
            customdata=plane["values"][metric],
            colorscale="Viridis_r",
            ncontours=LEVELS,
            colorbar=bar,
            hovertemplate="(%{x:.3g}, %{y:.3g})<br>" + metric + " %{customdata:.4g}<extra></extra>",
        )
        line = {"color": "black", "dash": "dash"}
        curve = go.Scatter(x=path[:, 0].tolist(), y=path[:, 1].tolist(), name="curve", line=line, mode="lines")
        marker = {"size": 11, "color": [COLORS[1], COLORS[4], COLORS[1]], "symbol": ["circle", "triangle-up", "circle"]}
        names = ["first", "bend", "second"]
        ends = go.Scatter(
            x=places[:, 0].tolist(), y=places[:, 1].tolist(), text=names, name="ends and bend", marker=marker, mode="markers"
        )
        for trace in (map_, curve.update(showlegend=column == 1), ends.update(showlegend=column == 1)):
            figure.add_trace(trace, row=1, col=column)
    return figure.update_layout(
        template="plotly_white", height=560, title=_title(told, "<br>"), legend={"orientation": "h", "y": -0.12}
    )


def _paths(told: Mapping[str, Any]) -> list[str]:
    return [name for name in ("line", "curve") if told[name] is not None]


def _lines(told: Mapping[str, Any], metric: str, factor: float) -> list[tuple[str, str, Sequence[float], list[float]]]:
    """Returns (path, split, ts, values) of everything a diagram shows."""
    return [
        (name, split, told[name]["ts"], [factor * value for value in told[name]["values"][f"{split}_{metric}"]])
        for name in _paths(told)
        for split in SPLITS
    ]


def _averaged(told: Mapping[str, Any]) -> tuple[Sequence[float], list[float]]:
    """Returns (ts, test error in %) of the first network averaged with that at t."""
    return told["ensemble"]["ts"], [100 * (1 - value) for value in told["ensemble"]["pair"]]


def _label(told: Mapping[str, Any], name: str) -> str:
    if name == "line":
        return "line"
    kind, bends = told["curve"]["kind"], told["curve"]["bends"]
    return {"bezier": "Bezier curve", "chain": "chain"}[kind] + (f" of {bends} bends" if bends > 1 else "")


def _title(told: Mapping[str, Any], newline: str = "\n") -> str:
    one, other = (Path(end["target"]).name for end in told["ends"])
    return f"{told['task']}{newline}from {one} to {other}"


def _scaled(plane: Mapping[str, Any]) -> tuple[tuple[list[float], list[float]], npt.NDArray[Any], npt.NDArray[Any]]:
    """Returns ((x of the columns, y of the rows), the curve, ends and bend) in distances of weight space."""
    scale = np.array([plane["width"], plane["height"]])
    axes = ([a * plane["width"] for a in plane["a"]], [b * plane["height"] for b in plane["b"]])
    return axes, np.array(plane["path"]) * scale, np.array(plane["places"]) * scale


def _heights(plane: Mapping[str, Any], metric: str) -> npt.NDArray[np.float64]:
    """Returns what is drawn of a metric: log10 of a loss, an error in %."""
    values = np.array(plane["values"][metric], dtype=np.float64)
    return np.log10(np.clip(values, LEAST, None)) if metric.endswith("loss") else 100 * values


def _ticks(values: npt.NDArray[np.float64], metric: str) -> tuple[list[float], list[str]]:
    """Returns places on the scale of `_heights`, evenly spread, and their labels."""
    places = [float(place) for place in np.linspace(values.min(), values.max(), 6)]
    return places, [f"{10**place if metric.endswith('loss') else place:.3g}" for place in places]


def _levels(values: npt.NDArray[np.float64]) -> list[float]:
    """Returns the levels of the contours, increasing even where all values are the same."""
    low, high = float(values.min()), float(values.max())
    return [float(level) for level in np.linspace(low, high if high - low > 1e-9 else low + 1, LEVELS)]
