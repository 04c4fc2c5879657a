"""Figures for paper and screen: accuracy against compression, and against theoretical and measured speed-up."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from microglia.report.rows import Group, Row
from microglia.storage.files import write_atomic

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito 2008: told apart by colour-blind readers. Black is the dense model; their yellow is too pale on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
DASHES = ("-", "--", "-.", ":")
"""In greyscale the lines are told apart by markers and dashes."""


@dataclass(frozen=True)
class Panel:
    """One diagram: the headline against a ratio of every row.

    Attributes:
        title: Of the horizontal axis.
        read: Returns the ratio of a row, None where it is not known.
        missing: What an empty diagram says.
    """

    title: str
    read: Callable[[Row], float | None]
    missing: str


FIGURES: dict[str, tuple[Panel, ...]] = {
    "compression": (Panel("compression ratio (all parameters / those left)", lambda row: row.compression, "no finite ratio"),),
    "speedup": (
        Panel("theoretical speed-up (MACs)", lambda row: row.theoretical, "no finite ratio"),
        Panel("measured speed-up (best dense / best pruned)", lambda row: row.speedup, "latency was not measured"),
    ),
}
"""Theory never stands alone: the measured speed-up is beside it."""


def points(rows: Sequence[Row], panel: Panel, scale: float) -> list[tuple[float, float, float, Row]]:
    """Returns (ratio, mean, standard deviation or 0, row) of a line; rows without a ratio are left out."""
    found = []
    for row in rows:
        ratio = panel.read(row)
        if ratio is not None and ratio > 0 and math.isfinite(ratio):
            found.append((ratio, row.after.mean * scale, (row.after.deviation or 0.0) * scale, row))
    return found


def limits(group: Group, panel: Panel) -> tuple[int, int]:
    """Returns the exponents of 2 between which every ratio of a diagram lies; 2^0, the dense model, is always in."""
    ratios = [ratio for rows in group.lines.values() for ratio, *_ in points(rows, panel, 1.0)]
    low, high = (math.log2(bound) for bound in (min([1.0, *ratios]), max([1.0, *ratios])))
    return math.floor(low + 1e-9), max(1, math.ceil(high - 1e-9))


def draw(group: Group, directory: Path) -> list[Path]:
    """Writes the figures of a task as PNG and SVG, the same rows as the same bytes; returns their paths.

    Raises:
        FileError: They cannot be written.
    """
    figures = {name: partial(_figure, group, panels) for name, panels in FIGURES.items()}
    return [path for name, make in figures.items() for path in save(make, directory, group.slug, name)]


def save(make: Callable[[], Figure], directory: Path, slug: str, name: str) -> list[Path]:
    """Writes a figure as PNG and SVG, the same data as the same bytes; returns their paths."""
    written = []
    with mpl.rc_context({"svg.hashsalt": "microglia", "text.parse_math": False}):
        figure = make()
        for form in ("png", "svg"):
            content = io.BytesIO()
            figure.savefig(content, format=form, dpi=150, metadata={"Date": None} if form == "svg" else {"Software": None})
            path = directory / f"{slug}-{name}.{form}"
            write_atomic(path, content.getvalue())
            written.append(path)
    return written


def _figure(group: Group, panels: Sequence[Panel]) -> Figure:
    figure = Figure(figsize=(1.5 + 5.5 * len(panels), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(group.title)
    for number, panel in enumerate(panels, 1):
        _draw(figure.add_subplot(1, len(panels), number, sharey=figure.axes[0] if figure.axes else None), group, panel)
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=1 + len(panels), frameon=False)
    return figure


def _draw(axes: Axes, group: Group, panel: Panel) -> None:
    drawn = 0
    for number, (line, rows) in enumerate(group.lines.items()):
        found = points(rows, panel, group.scale)
        if not found:
            continue
        ratios, means, deviations, _ = zip(*found, strict=True)
        drawn += 1
        axes.errorbar(
            ratios,
            means,
            yerr=deviations if any(deviations) else None,
            label=line,
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=DASHES[number % len(DASHES)],
            capsize=3,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.6,
        )
    for row in group.baselines:
        mean, deviation = row.after.mean * group.scale, (row.after.deviation or 0.0) * group.scale
        axes.axhline(mean, color="black", linestyle=(0, (6, 3)), linewidth=1, label=row.line)
        if deviation:
            axes.axhspan(mean - deviation, mean + deviation, color="black", alpha=0.08, linewidth=0)
    if not drawn:
        axes.text(0.5, 0.5, panel.missing, transform=axes.transAxes, ha="center", va="center")
    _label(axes, group, panel)


def _label(axes: Axes, group: Group, panel: Panel) -> None:
    low, high = limits(group, panel)
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (low - 0.1), 2 ** (high + 0.1))
    axes.set_xticks([2.0**exponent for exponent in range(low, high + 1)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(panel.title)
    axes.set_ylabel(f"{group.headline} after recovery{f' ({group.unit.strip()})' if group.unit else ''}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
