"""Pictures of double descent: training and test error over width or samples."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from microglia.report.figure_files import write_figure
from microglia.report.figures import COLORS

SLUG = "descent"
LINES = (("test", COLORS[1], "o", "solid"), ("train", COLORS[0], "s", "dash"))
LABELS = 14  # at most so many places are named at the axis


def draw(told: Mapping[str, Any], directory: Path) -> list[Path]:
    """Writes the figure in every form, named ``descent-width`` or ``descent-samples``; returns the paths.

    Args:
        told: What `microglia.studies.descent.study.view_descent` told.
        directory: Where.

    Raises:
        FileError: They cannot be written.
    """
    return write_figure(
        directory,
        SLUG,
        told["over"],
        printed=partial(descent_figure, told),
        interactive=descent_page(told),
        told=told,
        rows=told["rows"],
    )


def descent_figure(told: Mapping[str, Any]) -> Figure:
    """Returns two panels over width or samples, on a log scale: error, and loss."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(told), fontsize="medium")
    left, right = figure.subplots(1, 2)
    for axes, what in ((left, "error"), (right, "loss")):
        for split, color, marker, dash in LINES:
            x, y = _points(told, f"{split}_{what}", 100 if what == "error" else 1)
            style = {"solid": "-", "dash": "--"}[dash]
            axes.plot(x, y, color=color, marker=marker, linestyle=style, markersize=5, label=_label(split))
        _axes(axes, told)
    left.axhline(100 * told["chance"], color="0.5", linewidth=1, linestyle=":", label="guessing")
    left.set_ylabel("error (%)")
    left.set_ylim(bottom=0)
    right.set_ylabel("loss (nats)")
    handles, labels = left.get_legend_handles_labels()
    if (edge := _edge(told)) is not None:
        for axes in (left, right):
            line = axes.axvline(edge, color="black", linewidth=1, linestyle=(0, (6, 3)))
        handles, labels = [*handles, line], [*labels, _edge_label(told)]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def descent_page(told: Mapping[str, Any]) -> go.Figure:
    """Returns the errors for the screen."""
    figure = go.Figure()
    for split, color, marker, dash in LINES:
        x, y = _points(told, f"{split}_error", 100)
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines+markers",
            name=_label(split),
            line={"color": color, "dash": dash},
            marker={"symbol": {"o": "circle", "s": "square"}[marker]},
            customdata=[[row["width"], row["samples"], row["parameters"], row[f"{split}_loss"]] for row in told["rows"]],
            hovertemplate="%{y:.2f} %, loss %{customdata[3]:.4g}<br>width %{customdata[0]:,}, %{customdata[1]:,} samples, "
            "%{customdata[2]:,} parameters",
        )
    figure.add_hline(y=100 * told["chance"], line={"color": "gray", "dash": "dot", "width": 1}, annotation_text="guessing")
    if (edge := _edge(told)) is not None:
        figure.add_vline(x=edge, line={"color": "black", "dash": "dash", "width": 1}, annotation_text=_edge_label(told))
    figure.update_layout(title=_title(told), template="simple_white", yaxis={"title": "error (%)", "rangemode": "tozero"})
    figure.update_xaxes(title=told["over"], type="log")
    return figure


def _points(told: Mapping[str, Any], name: str, scale: float) -> tuple[list[int], list[float]]:
    return [row[told["over"]] for row in told["rows"]], [scale * row[name] for row in told["rows"]]


def _label(split: str) -> str:
    return "test, true labels" if split == "test" else "training, noisy labels"


def _edge(told: Mapping[str, Any]) -> int | None:
    """Returns where fitting begins (widths) or ends (samples)."""
    found: int | None = told["threshold"] if told["over"] == "width" else told["capacity"]
    return found


def _edge_label(told: Mapping[str, Any]) -> str:
    return f"{'first' if told['over'] == 'width' else 'last'} with at most {100 * told['epsilon']:g} % training error"


def _title(told: Mapping[str, Any]) -> str:
    config, rows = told["config"], told["rows"]
    fixed = f"{rows[0]['samples']:,} samples" if told["over"] == "width" else f"width {rows[0]['width']:,}"
    return (
        f"{config['family']} on {told['data']}, {fixed}, label noise {100 * config['noise']:g} %: {config['steps']:,} steps of "
        f"{config['optimizer']}, lr {config['lr']:g}"
    )


def _axes(axes: Axes, told: Mapping[str, Any]) -> None:
    places = sorted({row[told["over"]] for row in told["rows"]})
    axes.set_xscale("log")
    axes.set_xticks(places[:: -(-len(places) // LABELS)], [f"{place:,}" for place in places[:: -(-len(places) // LABELS)]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel({"width": "width", "samples": "training samples"}[told["over"]])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
