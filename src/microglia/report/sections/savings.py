"""Figures of dynamic runs: the headline against the operations saved, beside static runs, and the filters of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from microglia.report.figures import COLORS, DASHES, MARKERS, save
from microglia.report.rows import Group, Row, Spread
from microglia.report.sections.dynamic import routings

AXIS = "FLOPs reduction, % of dense (of gates the honest mean over inputs, heads counted)"
Point = tuple[Spread, Spread, Row]
"""(fraction of operations saved, headline, row)."""


def draw_dynamic(group: Group, directory: Path) -> list[Path]:
    """Writes the figures of a task with dynamic runs as PNG and SVG; returns their paths, none for any other task.

    Raises:
        FileError: They cannot be written.
    """
    if not group.dynamic:
        return []
    figures = {"flops": partial(savings_figure, group), "gates": partial(gates_figure, group)}
    return [path for name, make in figures.items() for path in save(make, directory, group.slug, name)]


def saved_points(rows: Sequence[Row]) -> list[Point]:
    """Returns the points of a line, least saved first; rows of which nothing is left are none."""
    found = [(row.reduction, row.after, row) for row in rows]
    return sorted(((x, y, row) for x, y, row in found if x is not None), key=lambda point: point[0].mean)


def lines_of(group: Group) -> dict[str, list[Point]]:
    """Returns the points of each line, dynamic and static ones alike; lines that save nothing at all are left out."""
    found = {line: saved_points(rows) for line, rows in group.lines.items()}
    return {line: points for line, points in found.items() if any(x.mean > 0 for x, _, _ in points)}


def savings_figure(group: Group) -> Figure:
    """Returns the headline against the operations saved: dynamic runs solid, static ones dashed; error bars over seeds."""
    figure = Figure(figsize=(8, 5.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(group.title)
    axes = figure.add_subplot()
    for number, (line, points) in enumerate(lines_of(group).items()):
        axes.errorbar(
            [100 * x.mean for x, _, _ in points],
            [group.scale * y.mean for _, y, _ in points],
            xerr=_bars([x for x, _, _ in points], 100),
            yerr=_bars([y for _, y, _ in points], group.scale),
            label=line,
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle="-" if points[0][2].dynamic else "--",
            markerfacecolor=None if points[0][2].dynamic else "white",
            capsize=3,
            markersize=6,
        )
    for row in group.baselines:
        axes.axhline(group.scale * row.after.mean, color="black", linestyle=":", linewidth=1, label=row.line)
    axes.set_xlabel(AXIS)
    axes.set_ylabel(f"{group.headline}{f' ({group.unit.strip()})' if group.unit else ''}")
    _tidy(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def gates_figure(group: Group) -> Figure:
    """Returns the fraction of each layer's filters kept on average (solid) and always, the core (dotted), by budget."""
    panels: dict[str, list[Row]] = {}
    for row in group.dynamic:
        panels.setdefault(row.asked, []).append(row)
    figure = Figure(figsize=(9, 1.2 + 3 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(group.title)
    lines = sorted({row.line for row in group.dynamic})
    for number, (asked, rows) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(len(panels), 1, number)
        for row in rows:
            style = lines.index(row.line)
            color, marker = COLORS[style % len(COLORS)], MARKERS[style % len(MARKERS)]
            kept, core = _by_layer(row)
            places = range(1, len(kept) + 1)
            axes.plot(places, kept, color=color, marker=marker, markersize=4, linestyle=DASHES[0], label=f"{row.line}: kept")
            axes.plot(places, core, color=color, marker=marker, markersize=3, linestyle=DASHES[3], label=f"{row.line}: core")
        axes.set_title(asked, fontsize="medium")
        axes.set_ylabel("fraction of filters")
        axes.set_xlabel("gated layer")
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _tidy(axes)
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    return figure


def savings(group: Group) -> go.Figure:
    """Returns the headline against the operations saved, interactive."""
    figure = go.Figure()
    for number, (line, points) in enumerate(lines_of(group).items()):
        color, dynamic = COLORS[number % len(COLORS)], points[0][2].dynamic
        figure.add_scatter(
            x=[100 * x.mean for x, _, _ in points],
            y=[group.scale * y.mean for _, y, _ in points],
            error_x={"type": "data", "array": [100 * (x.deviation or 0) for x, _, _ in points]},
            error_y={"type": "data", "array": [group.scale * (y.deviation or 0) for _, y, _ in points]},
            text=[f"{row.asked}, n = {row.after.n}" for _, _, row in points],
            hovertemplate=f"%{{y:.2f}}{group.unit}, %{{x:.1f}} % saved<br>%{{text}}",
            name=line,
            meta=points[0][2].method,
            mode="lines+markers",
            marker={"size": 9, "color": color, "symbol": "circle" if dynamic else "circle-open"},
            line={"color": color, "dash": "solid" if dynamic else "dash"},
        )
    for row in group.baselines:
        figure.add_hline(row.after.mean * group.scale, line={"color": "black", "dash": "dot", "width": 1})
    figure.update_xaxes(title=AXIS)
    figure.update_yaxes(title=f"{group.headline}{group.unit and f' ({group.unit.strip()})'}")
    return figure.update_layout(template="plotly_white", height=480, title="dotted: the dense model; dashed: static pruning")


def _by_layer(row: Row) -> tuple[list[float], list[float]]:
    """Returns the fractions of the filters of each layer that are kept and core, means over the runs."""
    layers = [routing.layers for routing in routings(row)]
    kept = np.mean([[layer.kept for layer in one] for one in layers], axis=0)
    core = np.mean([[layer.core / layer.filters for layer in one] for one in layers], axis=0)
    return kept.tolist(), core.tolist()


def _bars(spreads: Sequence[Spread], scale: float) -> list[float] | None:
    values = [scale * (spread.deviation or 0.0) for spread in spreads]
    return values if any(values) else None


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
