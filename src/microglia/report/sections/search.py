"""Figures of how masks were found: the density of each layer by method, and the masks over a search."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from microglia.report.figures import COLORS, DASHES, MARKERS, save
from microglia.report.records import Record, Search
from microglia.report.rows import Group, Row

PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def draw_search(group: Group, directory: Path) -> list[Path]:
    """Writes the figures of a task as PNG and SVG, where its runs tell of layers or of a search; returns their paths.

    Raises:
        FileError: They cannot be written.
    """
    written = []
    if budgets := _budgets(group):
        written += save(partial(_layers, group, budgets), directory, group.slug, "layers")
    if searches := _searches(group):
        written += save(partial(_search, group, searches), directory, group.slug, "search")
    return written


def densities(record: Record) -> dict[str, float]:
    """Returns the kept fraction of each layer, or of each group of coupled channels."""
    return record.densities or (record.search.densities if record.search is not None else {})


def _budgets(group: Group) -> dict[tuple[str, str], list[Row]]:
    """Returns the rows of each (pattern, budget) for which methods can be compared layer by layer, one of them learned."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in group.rows:
        if densities(row.records[0]):
            found.setdefault((row.pattern, row.asked), []).append(row)
    return {
        key: rows
        for key, rows in found.items()
        if len({row.method for row in rows}) > 1 and any(row.records[0].search is not None for row in rows)
    }


def _searches(group: Group) -> list[tuple[Row, Search]]:
    """Returns one search of each row with temperatures: its first run's."""
    found = [(row, row.records[0].search) for row in group.rows]
    return [(row, s) for row, s in found if s is not None and any(h.temperature is not None for h in s.history)]


def _layers(group: Group, budgets: dict[tuple[str, str], list[Row]]) -> Figure:
    """Density of each layer, in the order of the network, one panel for each budget, mean over seeds."""
    figure = Figure(figsize=(9, 1 + 3 * len(budgets)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(group.title)
    methods = sorted({row.method for rows in budgets.values() for row in rows})
    for number, ((pattern, asked), rows) in enumerate(budgets.items(), 1):
        axes = figure.add_subplot(len(budgets), 1, number)
        for row in rows:
            style = methods.index(row.method)
            means = np.mean([list(densities(record).values()) for record in row.records], axis=0)
            axes.plot(
                range(1, len(means) + 1),
                means,
                label=row.method,
                color=COLORS[style % len(COLORS)],
                marker=MARKERS[style % len(MARKERS)],
                linestyle=DASHES[style % len(DASHES)],
                markersize=5,
            )
        axes.set_title(f"{pattern}, {asked}", fontsize="medium")
        axes.set_ylabel("density")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("layer" if pattern != "channel" else "group of coupled channels")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(7, len(handles)), frameon=False)
    return figure


def _search(group: Group, searches: Sequence[tuple[Row, Search]]) -> Figure:
    """How binary the masks become: the units in each twentieth of [0, 1] over the steps, and the temperature."""
    figure = Figure(figsize=(8, 1 + 2.6 * len(searches)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(group.title)
    for number, (row, search) in enumerate(searches, 1):
        axes = figure.add_subplot(len(searches), 1, number)
        steps = [snapshot.step for snapshot in search.history]
        counts = np.array([snapshot.histogram for snapshot in search.history]).T
        edges = np.linspace(0, 1, len(counts) + 1)
        ends = [*steps, steps[-1] + max(1, steps[-1] - steps[-2] if len(steps) > 1 else 1)]
        image = axes.pcolormesh(ends, edges, np.where(counts > 0, counts, np.nan), norm=LogNorm(1, counts.max()), cmap="Blues")
        figure.colorbar(image, ax=axes, label="units", pad=0.12, format=PLAIN)
        axes.set_title(f"{row.line}, {row.asked}", fontsize="medium")
        axes.set_ylabel("mask")
        axes.set_xlabel("step of the training")
        other = axes.twinx()
        other.semilogy(steps, [snapshot.temperature for snapshot in search.history], color=COLORS[1], label="temperature")
        other.yaxis.set_major_formatter(PLAIN)
        other.set_ylabel("temperature", color=COLORS[1])
    return figure
