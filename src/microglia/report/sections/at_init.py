"""Masks made before training: how many of their weights lie on a path from input to output, and which layers they emptied."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from microglia.report.cells import Entry, drop_column, markdown_table, of_spread, of_words
from microglia.report.figures import COLORS, DASHES, MARKERS, save
from microglia.report.records import Initialization
from microglia.report.rows import Group, Row, Spread

WORDS = ("method", "asked", "settings")
EXPLAINED = (
    "Masks made before training. On a path: of the weights kept, those that lie on a path from input to output; the others are "
    "dead. Emptied: layers that kept nothing, at most over seeds; one of them on the trunk collapses the network. Least: the "
    "smallest density of a layer."
)
LEAST = 2  # budgets that make a line worth drawing
PANELS: tuple[tuple[str, Callable[[Initialization], float]], ...] = (
    ("of the weights kept, on a path (%)", lambda found: 100 * found.effective / max(1, found.kept)),
    ("emptied layers", lambda found: len(found.emptied)),
    ("least density of a layer (%)", lambda found: 100 * found.least),
)


def paths_table(group: Group) -> tuple[list[str], list[tuple[Row, list[Entry]]]]:
    """Returns the titles and rows of the table of a task's runs that prune before training; no row where there are none."""
    unit = f", {group.unit.strip()}" if group.unit else ""
    titles = ["method", "asked", "settings", "n", "on a path, %", "emptied", "least, %", f"{group.headline}{unit}"]
    rows = [(row, _entries(row, group.scale)) for row in _rows(group)]
    if not any(row.settings for row, _ in rows):
        drop_column(titles, [entries for _, entries in rows], "settings")
    return titles, rows


def paths_lines(group: Group) -> list[str]:
    """Returns that table for the Markdown file, empty where no run prunes before training."""
    titles, rows = paths_table(group)
    return [EXPLAINED, "", *markdown_table(titles, [entries for _, entries in rows], WORDS), ""] if rows else []


def draw_paths(group: Group, directory: Path) -> list[Path]:
    """Writes the collapse figure of a task as PNG and SVG, where several budgets show one; returns the paths.

    Raises:
        FileError: They cannot be written.
    """
    lines = _lines(group)
    return save(partial(_figure, group, lines), directory, group.slug, "collapse") if lines else []


def _found(row: Row) -> list[Initialization]:
    return [record.initialization for record in row.records if record.initialization is not None]


def _rows(group: Group) -> list[Row]:
    return [row for row in group.rows if not row.baseline and _found(row)]


def _entries(row: Row, scale: float) -> list[Entry]:
    found = _found(row)
    worst = max(found, key=lambda one: len(one.emptied))
    emptied = f"{len(worst.emptied)} of {len(worst.layers)}" if worst.emptied else "none"
    return [
        of_words(row.method),
        Entry(row.asked, found[0].kept / found[0].total),
        of_words(row.settings),
        Entry(str(row.after.n), row.after.n),
        of_spread(Spread.of(one.effective / max(1, one.kept) for one in found), 100),
        Entry(emptied, len(worst.emptied)),
        Entry(f"{100 * min(one.least for one in found):.2g}", min(one.least for one in found)),
        of_spread(row.after, scale),
    ]


def _lines(group: Group) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in _rows(group):
        lines.setdefault(row.line, []).append(row)
    return {name: rows for name, rows in lines.items() if len({row.asked for row in rows}) >= LEAST}


def _figure(group: Group, lines: dict[str, list[Row]]) -> Figure:
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{group.title}: masks before training")
    for number, (title, read) in enumerate(PANELS, 1):
        axes = figure.add_subplot(1, len(PANELS), number)
        for place, (name, rows) in enumerate(lines.items()):
            points = sorted((_found(row)[0].total / max(1, _found(row)[0].kept), fmean(map(read, _found(row)))) for row in rows)
            style: dict[str, Any] = {"marker": MARKERS[place % len(MARKERS)], "linestyle": DASHES[place % len(DASHES)]}
            axes.plot(*zip(*points, strict=True), label=name, color=COLORS[place % len(COLORS)], markersize=5, **style)
        axes.set_xscale("log")
        if "density" in title:
            axes.set_yscale("symlog", linthresh=0.01)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if "layers" in title:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("compression of the prunable weights")
        axes.set_ylabel(title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="0.9")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=4)
    return figure
