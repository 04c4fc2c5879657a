"""Charts for paper by matplotlib, as PNG and SVG; the same chart gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microglia.core.optional import needs
from microglia.report.chart import Axis, Chart, Field, Line, Panel, Rule
from microglia.storage.files import write_atomic

with needs("report", "matplotlib", what="A figure"):
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

MARKERS = {
    "circle": "o",
    "square": "s",
    "triangle-up": "^",
    "diamond": "D",
    "triangle-down": "v",
    "cross": "P",
    "x": "X",
    "star": "*",
    "triangle-left": "<",
    "plus": "+",
    "": "",
}
DASHES = {"solid": "-", "dash": "--", "dashdot": "-.", "dot": ":", "": "none"}
STYLE: Any = {"svg.hashsalt": "microglia", "text.parse_math": False}
"""Settings: ids in an SVG are always the same, and a dollar in a name is plain text."""


def printed(chart: Chart) -> Figure:
    """Returns a chart as a figure of matplotlib."""
    figure = Figure(figsize=chart.size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(chart.title, fontsize="large" if len(chart.title) < 80 else "medium")
    rows = -(-len(chart.panels) // chart.columns)
    for number, panel in enumerate(chart.panels, 1):
        near = figure.axes[0] if chart.shared and figure.axes else None
        axes = figure.add_subplot(rows, chart.columns, number, sharey=near)
        _draw(figure, axes, panel)
        if chart.legend == 0 and axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize="small")
    if chart.legend > 0:
        handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        columns = min(chart.legend, max(1, len(handles)))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    return figure


def save(chart: Chart | Callable[[], Figure], directory: Path, slug: str, name: str) -> list[Path]:
    """Writes a chart, or a figure of matplotlib by its maker, as ``slug-name.png`` and ``.svg``; returns the paths.

    Raises:
        FileError: The files cannot be written.
    """
    written = []
    for form, content in images(chart).items():
        path = directory / f"{slug}-{name}.{form}"
        write_atomic(path, content)
        written.append(path)
    return written


def images(chart: Chart | Callable[[], Figure], forms: Sequence[str] = ("png", "svg")) -> dict[str, bytes]:
    """Returns a chart, or a figure of matplotlib by its maker, as the bytes of each form of file."""
    found = {}
    with mpl.rc_context(STYLE):
        figure = printed(chart) if isinstance(chart, Chart) else chart()
        for form in forms:
            content = io.BytesIO()
            figure.savefig(content, format=form, dpi=150, metadata={"Date": None} if form == "svg" else {"Software": None})
            found[form] = content.getvalue()
    return found


def _draw(figure: Figure, axes: Axes, panel: Panel) -> None:
    if panel.field is not None:
        _field(figure, axes, panel.field, pad=0.12 if panel.right is not None else 0.05)
    for bars in panel.bars:
        style: dict[str, Any] = {"yerr": _bars(bars.errors), "ecolor": "0.3", "capsize": 2}
        axes.bar(bars.x, bars.heights, width=bars.width, color=bars.color, label=bars.name, **style)
    if panel.image is not None:
        axes.imshow(panel.image, cmap="gray", vmin=0, vmax=255)
    named: set[str] = set()
    for line in panel.lines:
        _line(axes, line, listed=line.name not in named)
        named.add(line.name)
    for rule in panel.rules:
        _rule(axes, rule)
    if not panel.lines and not panel.bars and panel.empty:
        axes.text(0.5, 0.5, panel.empty, transform=axes.transAxes, ha="center", va="center")
    if panel.title:
        axes.set_title(panel.title, fontsize="medium")
    if panel.aspect is not None:
        axes.set_box_aspect(panel.aspect)
    _axis(axes, "x", panel.x)
    _axis(axes, "y", panel.y)
    if panel.right is not None:
        other = axes.twinx()
        for line in panel.right_lines:
            _line(other, line, listed=True)
        _axis(other, "y", panel.right)
    elif panel.field is None and panel.image is None:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="0.9")
        axes.set_axisbelow(True)


def _line(axes: Axes, line: Line, *, listed: bool) -> None:
    look = line.look
    style: dict[str, Any] = {
        "color": look.color,
        "marker": MARKERS[look.marker],
        "linestyle": DASHES[look.dash],
        "linewidth": look.width,
        "markersize": look.size,
        "markerfacecolor": "white" if look.hollow else look.color,
        "markeredgecolor": look.color,
        "markeredgewidth": 1.6 if look.marker == "plus" else 1.0,
        "label": line.name if line.name and listed else None,
    }
    if look.outline:
        axes.plot(line.x, line.y, color=look.outline, linewidth=look.width + 1.3)
    if len(line.x_error) or len(line.y_error):
        axes.errorbar(line.x, line.y, xerr=_bars(line.x_error), yerr=_bars(line.y_error), capsize=3, **style)
    else:
        axes.plot(line.x, line.y, **style)


def _bars(values: Sequence[float]) -> Sequence[float] | None:
    return values if any(values) else None


def _rule(axes: Axes, rule: Rule) -> None:
    dash = (0, (6, 3)) if rule.dash == "dash" else DASHES[rule.dash]
    draw, shade = (axes.axvline, axes.axvspan) if rule.upright else (axes.axhline, axes.axhspan)
    draw(rule.at, color=rule.color, linestyle=dash, linewidth=1, label=rule.name or None)
    if rule.spread:
        shade(rule.at - rule.spread, rule.at + rule.spread, color=rule.color, alpha=0.08, linewidth=0)


def _field(figure: Figure, axes: Axes, field: Field, *, pad: float) -> None:
    values = np.ma.masked_invalid(np.array(field.values, dtype=np.float64))
    colors = field.colors.lower() if field.colors.startswith("V") else field.colors
    if len(field.levels):
        scale = LogNorm(field.levels[0], field.levels[-1]) if field.log else None
        image: Any = axes.contourf(field.x, field.y, values, levels=field.levels, norm=scale, cmap=colors)
        if field.traced:
            axes.contour(field.x, field.y, values, levels=field.levels[::2], colors="white", linewidths=0.4, alpha=0.7)
    else:
        scale = LogNorm(1, values.max()) if field.log else None
        low, high = field.limits if scale is None else (None, None)
        image = axes.pcolormesh(field.x, field.y, values, norm=scale, cmap=colors, vmin=low, vmax=high)
    if not field.scale:
        return
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    bar = figure.colorbar(image, ax=axes, label=field.title, pad=pad, format=plain)
    if len(field.ticks):
        bar.set_ticks(list(field.ticks), labels=list(field.labels))
        bar.ax.minorticks_off()


def _axis(axes: Axes, which: str, axis: Axis) -> None:
    """Sets scale, limits, ticks and title of the axis ``x`` or ``y``."""
    own = axes.xaxis if which == "x" else axes.yaxis
    if axis.bare:
        own.set_ticks([])
        own.set_inverted(own.get_inverted() or axis.falling)
        return
    if axis.scale != "linear":
        set_scale = axes.set_xscale if which == "x" else axes.set_yscale
        set_scale(axis.scale, **({"linthresh": 0.01} if axis.scale == "symlog" else {}))
    low, high = axis.limits
    if which == "x":
        axes.set_xlim(low, high)
    else:
        axes.set_ylim(low, high)
    if axis.falling:
        own.set_inverted(True)
    if len(axis.ticks):
        own.set_ticks(list(axis.ticks), axis.words)
        if axis.upright:
            own.set_tick_params(rotation=90, labelsize=7)
        own.set_minor_locator(NullLocator())
    elif axis.whole:
        own.set_major_locator(MaxNLocator(integer=True))
    if not len(axis.ticks) and (axis.suffix or axis.scale != "linear"):
        own.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{axis.suffix}"))
        own.set_minor_locator(NullLocator())
    own.set_label_text(axis.title, color=axis.color)
