"""Pictures of a surface: the loss on a plane as contours on a log scale, and along a line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from microglia.report.figure_files import write_figure
from microglia.report.figures import COLORS

SLUG = "surface"
LEVELS = 24
LEAST = 1e-8
"""In nats: a loss below it is drawn as this one, for a log scale has no 0."""


def draw(told: Mapping[str, Any], directory: Path) -> list[Path]:
    """Writes the plane and the line in every form; returns the paths.

    Args:
        told: What `microglia.studies.surface.study.view_surface` told.
        directory: Where.

    Raises:
        FileError: They cannot be written.
    """
    plane = {key: told[key] for key in ("task", "split", "range", "normalization", "axis", "plane", "trajectory")}
    line = {key: told[key] for key in ("task", "split", "range", "normalization", "line")}
    figures = (
        ("plane", partial(plane_figure, told), plane_page(told), plane, plane_rows(told)),
        ("line", partial(line_figure, told), line_page(told), line, told["line"]),
    )
    return [
        path
        for name, printed, page, content, rows in figures
        for path in write_figure(directory, SLUG, name, printed=printed, interactive=page, told=content, rows=rows)
    ]


def plane_rows(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the places of the plane, one row each: ``x``, ``y`` and the metrics."""
    axis, plane = told["axis"], told["plane"]
    return [
        {"x": x, "y": y, **{name: plane[name][row][column] for name in told["metrics"]}}
        for row, y in enumerate(axis)
        for column, x in enumerate(axis)
    ]


def plane_figure(told: Mapping[str, Any]) -> Figure:
    """Returns the contours of the loss, levels evenly spaced in its logarithm; the network is the cross in the middle."""
    figure = Figure(figsize=(7.8, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    loss = np.ma.masked_invalid(_losses(told["plane"]["loss"]))
    low, high = _bounds(loss)
    levels = np.geomspace(low, high, LEVELS)
    filled = axes.contourf(told["axis"], told["axis"], loss, levels=levels, norm=LogNorm(low, high), cmap="viridis")
    axes.contour(told["axis"], told["axis"], loss, levels=levels[::2], colors="white", linewidths=0.4, alpha=0.7)
    bar = figure.colorbar(filled, ax=axes, label=f"{told['split']} loss (nats, log scale)")
    ticks, words = _ticks(low, high)
    bar.set_ticks(ticks, labels=words)
    bar.ax.minorticks_off()
    if told["trajectory"]:
        x, y = zip(*told["trajectory"]["places"], strict=True)
        axes.plot(x, y, color="white", linewidth=2.5)
        axes.plot(x, y, color=COLORS[1], linewidth=1.2, marker="o", markersize=3.5, label="training")
        axes.legend(frameon=True, loc="upper right")
    axes.plot(0, 0, marker="+", color="black", markersize=11, markeredgewidth=1.6)
    axes.set_box_aspect(1)
    first, second = _labels(told)
    axes.set_xlabel(first)
    axes.set_ylabel(second)
    figure.suptitle(_title(told), fontsize="medium")
    return figure


def line_figure(told: Mapping[str, Any]) -> Figure:
    """Returns the loss, on a log scale, and the headline along the first direction."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(told), fontsize="medium")
    left, right = figure.subplots(1, 2)
    headline = told["metrics"][0]
    x = [row["x"] for row in told["line"]]
    loss = np.ma.masked_invalid(_losses([row["loss"] for row in told["line"]]))
    left.plot(x, loss, color=COLORS[0], marker="o", markersize=3)
    left.set_yscale("log")
    left.set_yticks(*_ticks(*_bounds(loss)))
    left.yaxis.set_minor_locator(NullLocator())
    right.plot(x, _numbers([row[headline] for row in told["line"]]), color=COLORS[1], marker="s", markersize=3)
    for axes, name in ((left, "loss (nats, log scale)"), (right, headline)):
        _plain(axes, _labels(told)[0], f"{told['split']} {name}")
    return figure


def plane_page(told: Mapping[str, Any]) -> go.Figure:
    """Returns the contours for the screen, with the metrics of every place under the pointer."""
    loss = _losses(told["plane"]["loss"])
    headline = told["metrics"][0]
    low, high = (math.log10(bound) for bound in _bounds(np.ma.masked_invalid(loss)))
    exponents = np.linspace(low, high, 5)
    contour = go.Contour(
        x=told["axis"],
        y=told["axis"],
        z=_json(np.log10(loss)),
        customdata=np.stack([loss, _numbers(told["plane"][headline])], axis=2).tolist(),
        colorscale="Viridis",
        contours={"start": low, "end": high, "size": (high - low) / (LEVELS - 1)},
        colorbar={"title": "loss", "tickvals": exponents.tolist(), "ticktext": [f"{10**e:.3g}" for e in exponents]},
        hovertemplate="x %{x:.3g}, y %{y:.3g}<br>loss %{customdata[0]:.4g}<br>"
        + headline
        + " %{customdata[1]:.4f}<extra></extra>",
    )
    figure = go.Figure([contour])
    if told["trajectory"]:
        x, y = zip(*told["trajectory"]["places"], strict=True)
        figure.add_scatter(x=x, y=y, mode="lines+markers", line={"color": COLORS[1]}, name="training")
    figure.add_scatter(
        x=[0], y=[0], mode="markers", marker={"symbol": "cross-thin-open", "size": 12, "color": "black"}, showlegend=False
    )
    first, second = _labels(told)
    figure.update_layout(title=_title(told, "<br>"), template="simple_white", height=680, width=820)
    figure.update_xaxes(title=first, constrain="domain")
    figure.update_yaxes(title=second, scaleanchor="x", constrain="domain")
    return figure


def line_page(told: Mapping[str, Any]) -> go.Figure:
    """Returns the line for the screen."""
    headline = told["metrics"][0]
    x = [row["x"] for row in told["line"]]
    loss = _json(_losses([row["loss"] for row in told["line"]]))
    figure = go.Figure(
        [
            go.Scatter(x=x, y=loss, name="loss", mode="lines+markers", line={"color": COLORS[0]}),
            go.Scatter(
                x=x,
                y=[row[headline] for row in told["line"]],
                name=headline,
                mode="lines+markers",
                line={"color": COLORS[1], "dash": "dash"},
                yaxis="y2",
            ),
        ]
    )
    figure.update_layout(
        title=_title(told, "<br>"),
        template="simple_white",
        xaxis={"title": _labels(told)[0]},
        yaxis={"title": f"{told['split']} loss (nats)", "type": "log"},
        yaxis2={"title": f"{told['split']} {headline}", "overlaying": "y", "side": "right"},
        hovermode="x unified",
    )
    return figure


def _losses(values: Any) -> npt.NDArray[np.float64]:
    """Returns losses fit for a log scale; what is no number is NaN."""
    return np.maximum(_numbers(values), LEAST)


def _numbers(values: Any) -> npt.NDArray[np.float64]:
    return np.array(values, dtype=np.float64)  # None becomes NaN


def _json(values: npt.NDArray[np.float64]) -> Any:
    return np.where(np.isfinite(values), values, None).tolist()  # type: ignore[call-overload]


def _bounds(loss: Any) -> tuple[float, float]:
    """Returns the least and the largest loss, apart where all are the same or none is a number."""
    if not loss.count():
        return LEAST, 1.0
    low, high = float(loss.min()), float(loss.max())
    return (low * (1 - 1e-9), high * (1 + 1e-9)) if high > 1.001 * low else (low / 1.01, high * 1.01)


def _ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Returns places on a log scale, evenly spread, and their labels: between two powers of ten there may be none."""
    places = np.geomspace(low, high, 6).tolist()
    return places, [f"{place:.3g}" for place in places]


def _labels(told: Mapping[str, Any]) -> Sequence[str]:
    if not told["trajectory"]:
        return "first random direction", "second random direction"
    shares = [f"{100 * share:.1f} %" for share in told["trajectory"]["explained"]]
    return [f"{name} principal component ({share})" for name, share in zip(("first", "second"), shares, strict=True)]


def _title(told: Mapping[str, Any], newline: str = "\n") -> str:
    center = told["center"]
    headline = told["metrics"][0]
    here = ", ".join(f"{name} {center[name]:.4g}" for name in ("loss", headline) if center[name] is not None)
    how = "plane of its training" if told["trajectory"] else f"{told['normalization']} normalization"
    return f"{told['task']}, {told['split']} split, {how}{newline}at the network: {here}"


def _plain(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
