"""The ticket figure: accuracy and speed of learning of tickets and their controls against density."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from plotly.subplots import make_subplots

from microglia.report.figure_files import write_figure
from microglia.report.figures import COLORS, DASHES, MARKERS
from microglia.studies.tickets.statements import ARMS
from microglia.studies.tickets.study import NAMES

Json = Mapping[str, Any]
PANELS = (("accuracy", "test accuracy at the end (%)", 100.0), ("early_stop", "step of least validation loss", 1.0))
"""(what, title, factor); the paper draws the same two."""


def draw(told: Json, directory: Path) -> list[Path]:
    """Writes the figure in every form, with its data; returns the paths.

    Raises:
        FileError: They cannot be written.
    """
    rows = [
        {"arm": r["arm"], "level": r["level"], "density": r["density"], "n": r["n"]}
        | {
            f"{what}_{key}": r[what][key]
            for what in ("accuracy", "early_stop", "early_stop_accuracy")
            for key in ("mean", "std")
        }
        for r in told["summary"]
    ]
    return write_figure(
        directory, "tickets", "levels", printed=partial(_printed, told), interactive=_interactive(told), told=told, rows=rows
    )


def _lines(told: Json, what: str, factor: float) -> dict[str, tuple[list[float], list[float], list[float]]]:
    """Returns (densities in %, means, standard deviations or 0) by arm."""
    lines: dict[str, tuple[list[float], list[float], list[float]]] = {}
    for arm in ARMS:
        own = [row for row in told["summary"] if row["arm"] == arm]
        if own:
            densities = [100 * row["density"] for row in own]
            lines[arm] = (
                densities,
                [factor * row[what]["mean"] for row in own],
                [factor * (row[what]["std"] or 0.0) for row in own],
            )
    return lines


def _printed(told: Json) -> Figure:
    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(told["task"])
    for number, (what, title, factor) in enumerate(PANELS, 1):
        axes = figure.add_subplot(1, 2, number)
        for place, (arm, (densities, means, deviations)) in enumerate(_lines(told, what, factor).items()):
            if arm == "dense":
                axes.axhline(means[0], color="black", linestyle=(0, (6, 3)), linewidth=1, label=NAMES[arm])
                continue
            style: dict[str, Any] = {"color": COLORS[place - 1], "marker": MARKERS[place - 1], "linestyle": DASHES[place - 1]}
            axes.errorbar(densities, means, yerr=deviations, capsize=2, markersize=5, label=NAMES[arm], **style)
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xticks([100.0 * 0.8**level for level in range(0, 16, 3)])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("weights left (%)")
        axes.set_ylabel(title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="0.9")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=3)
    return figure


def _interactive(told: Json) -> go.Figure:
    figure = make_subplots(cols=len(PANELS), horizontal_spacing=0.1)
    for column, (what, title, factor) in enumerate(PANELS, 1):
        for place, (arm, (densities, means, deviations)) in enumerate(_lines(told, what, factor).items()):
            color = "black" if arm == "dense" else COLORS[place - 1]
            trace = go.Scatter(
                x=densities,
                y=means,
                error_y={"type": "data", "array": deviations},
                name=NAMES[arm],
                legendgroup=arm,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": color},
                hovertemplate="%{y:.4g} at %{x:.3g} %",
            )
            figure.add_trace(trace, row=1, col=column)
        figure.update_xaxes(title="weights left (%)", type="log", autorange="reversed", row=1, col=column)
        figure.update_yaxes(title=title, row=1, col=column)
    return figure.update_layout(template="plotly_white", height=480, title=told["task"])
