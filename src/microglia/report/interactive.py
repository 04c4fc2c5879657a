"""Charts for the screen: plotly, in pages that need no network."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from microglia.core.optional import needs
from microglia.report.chart import Axis, Bars, Chart, Field, Line, Panel, Rule

with needs("report", "plotly", what="An interactive figure"):
    import plotly.graph_objects as go
    from plotly.io import to_html
    from plotly.subplots import make_subplots

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)
"""Content policy of a page: it may not load or send anything."""
CONFIG = {"displaylogo": False, "showSendToCloud": False}
"""Settings of plotly without the upload button of its toolbar."""
SYMBOLS = {"plus": "cross-thin-open"}


def markup(chart: Chart, mark: str, *, whole: bool = False) -> str:
    """Returns the HTML of a chart, an element with the id ``mark``; ``whole`` includes the library."""
    text: str = to_html(interactive(chart), full_html=False, include_plotlyjs=whole, div_id=mark, config=CONFIG)
    return text


def interactive(chart: Chart) -> go.Figure:
    """Returns a chart as a figure of plotly."""
    rows = -(-len(chart.panels) // chart.columns)
    titles = [panel.title for panel in chart.panels]
    right = any(panel.right is not None for panel in chart.panels)
    fields = any(panel.field is not None for panel in chart.panels)
    between = 0.06 if chart.shared else 0.18 if fields else 0.1  # the color scale is there
    figure = make_subplots(
        rows=rows,
        cols=chart.columns,
        shared_yaxes=chart.shared,
        subplot_titles=titles if any(titles) else None,
        horizontal_spacing=min(between, 0.25 / (chart.columns - 1)) if chart.columns > 1 else None,
        vertical_spacing=0.2 / rows if rows > 1 else None,
        specs=[[{"secondary_y": right}] * chart.columns] * rows,
    )
    named: set[str] = set()
    for number, panel in enumerate(chart.panels):
        _draw(figure, panel, {"row": number // chart.columns + 1, "col": number % chart.columns + 1}, named)
    title = (chart.note or chart.title).replace("\n", "<br>")
    figure.update_layout(template="plotly_white", height=chart.height, title=title)
    if fields:
        figure.update_layout(legend={"orientation": "h", "y": -0.12})  # color scales are on the right
    return figure


def _draw(figure: go.Figure, panel: Panel, at: dict[str, int], named: set[str]) -> None:
    if panel.field is not None:
        _field(figure, panel, at)
    for bars in panel.bars:
        figure.add_trace(_bar(bars, panel.y), **at)
    if panel.bars:
        figure.update_layout(barmode="overlay")
    if panel.image is not None:
        pixels = np.asarray(panel.image)
        figure.add_trace(go.Image(z=np.stack([pixels] * 3, -1) if pixels.ndim == 2 else pixels), **at)
    for line in panel.lines:
        figure.add_trace(_trace(line, panel.x, panel.y, named), **at)
    for line in panel.right_lines:
        figure.add_trace(_trace(line, panel.x, panel.right or panel.y, named), secondary_y=True, **at)
    for rule in panel.rules:
        _rule(figure, rule, at)
    if not panel.lines and not panel.bars and panel.empty:
        figure.add_annotation(text=panel.empty, showarrow=False, xref="x domain", yref="y domain", x=0.5, y=0.5, **at)
    figure.update_xaxes(_axis(panel.x, [x for line in panel.lines for x in line.x]), **at)
    figure.update_yaxes(_axis(panel.y, [y for line in panel.lines for y in line.y]), secondary_y=False, **at)
    if panel.aspect == 1:
        name = next(figure.select_xaxes(**at)).plotly_name.replace("axis", "")
        figure.update_yaxes(scaleanchor=name, constrain="domain", secondary_y=False, **at)
        figure.update_xaxes(constrain="domain", **at)
    if panel.right is not None:
        figure.update_yaxes(_axis(panel.right, []), secondary_y=True, **at)


def _trace(line: Line, x: Axis, y: Axis, named: set[str]) -> go.Scatter:
    """Returns a line; ``named`` are the names that the legend has."""
    look = line.look
    symbol = SYMBOLS.get(look.marker, look.marker) + ("-open" if look.hollow else "")
    listed = bool(line.name) and line.name not in named
    named.add(line.name)
    said = html.escape(line.notes) if isinstance(line.notes, str) else "%{text}" if line.notes else ""
    return go.Scatter(
        x=_json(line.x),
        y=_json(line.y),
        error_x=_bars(line.x_error),
        error_y=_bars(line.y_error),
        text=None if isinstance(line.notes, str) else list(line.notes) or None,
        hovertemplate=f"%{{y:.4g}}{y.unit} at %{{x:.4g}}{x.unit}<br>{said}",
        name=line.name,
        legendgroup=line.name,
        showlegend=listed,
        meta=line.method or None,
        mode="+".join(filter(None, ("lines" if look.dash else "", "markers" if symbol else ""))) or "lines",
        marker={"symbol": symbol, "size": 1.5 * look.size, "color": look.color} if symbol else None,
        line={"color": look.color, "dash": look.dash or "solid", "width": 4 / 3 * look.width},
    )


def _bar(bars: Bars, y: Axis) -> go.Bar:
    return go.Bar(
        x=_json(bars.x),
        y=_json(bars.heights),
        width=bars.width,
        name=bars.name,
        marker={"color": bars.color},
        error_y=_bars(bars.errors),
        customdata=[html.escape(note) for note in bars.notes] or None,
        hovertemplate=f"%{{y:.4g}}{y.unit}" + ("<br>%{customdata}" if bars.notes else ""),
    )


def _bars(values: Sequence[float]) -> dict[str, Any] | None:
    return {"type": "data", "array": list(values), "visible": any(values)} if len(values) else None


def _rule(figure: go.Figure, rule: Rule, at: dict[str, int]) -> None:
    add = figure.add_vline if rule.upright else figure.add_hline
    text = {"annotation_text": rule.label} if rule.label else {}
    add(rule.at, line={"color": rule.color, "dash": rule.dash, "width": 1}, **text, **at)


def _axis(axis: Axis, values: Sequence[float]) -> dict[str, Any]:
    """Returns the settings of an axis; ``values`` are its data."""
    if axis.bare:
        return {"visible": False, **({"autorange": "reversed"} if axis.falling else {})}
    log = axis.scale == "log"
    settings: dict[str, Any] = {"title": axis.title, "type": "log" if log else "linear"}
    low, high = axis.limits
    if low == 0 and high is None:
        settings["rangemode"] = "tozero"
    elif low is not None and high is not None:
        settings["range"] = [math.log10(low), math.log10(high)] if log else [low, high]
    if axis.falling:
        settings["autorange"] = "reversed"
    if len(axis.ticks):
        settings |= {"tickvals": list(axis.ticks), "ticktext": axis.words}
    elif axis.suffix:
        settings["ticksuffix"] = axis.suffix
    if axis.upright:
        settings["tickangle"] = -90
    if axis.whole and values and max(values) - min(values) < 8:
        settings["dtick"] = 1
    return settings


def _field(figure: go.Figure, panel: Panel, at: dict[str, int]) -> None:
    field = panel.field
    assert field is not None
    raw = np.array(field.values, dtype=np.float64)
    under = field.under or ((field.title, raw),)
    said = "<br>".join(f"{name} %{{customdata[{number}]:.4g}}" for number, (name, _) in enumerate(under))
    shown = {
        "x": list(field.x),
        "y": list(field.y),
        "z": _json(np.log10(raw) if field.log else raw),
        "customdata": np.stack([np.array(values, dtype=np.float64) for _, values in under], axis=2).tolist(),
        "hovertemplate": f"%{{x:.3g}}, %{{y:.3g}}<br>{said}<extra></extra>",
        "colorscale": field.colors,
        "name": field.title,
    }
    if not len(field.levels) and not field.log:
        shown |= {"zmin": field.limits[0], "zmax": field.limits[1], "showscale": field.scale}
    kind = go.Heatmap
    if len(field.levels):
        low, high = (_height(field, field.levels[place]) for place in (0, -1))
        shown["contours"] = {"start": low, "end": high, "size": (high - low) / max(1, len(field.levels) - 1)}
        kind = go.Contour
    figure.add_trace(kind(**shown), **at)
    across, up = next(figure.select_xaxes(**at)).domain, next(figure.select_yaxes(secondary_y=False, **at)).domain
    bar = {"title": field.title, "x": across[1] + (0.06 if panel.right is not None else 0.01), "xanchor": "left"}
    bar |= {"y": (up[0] + up[1]) / 2, "len": up[1] - up[0]}
    places, words = _marks(field, raw)
    figure.data[-1].update(colorbar={**bar, "tickvals": places, "ticktext": words} if places else bar)


def _marks(field: Field, raw: Any) -> tuple[list[float], list[str]]:
    """Returns positions and texts at the color scale."""
    if len(field.ticks):
        return [_height(field, tick) for tick in field.ticks], list(field.labels)
    if not field.log:
        return [], []
    top = math.log10(float(np.nanmax(raw)))
    return list(range(int(top) + 1)), [f"{10**power:g}" for power in range(int(top) + 1)]


def _height(field: Field, value: float) -> float:
    return math.log10(value) if field.log else value


def _json(values: Any) -> Any:
    """Returns numbers as lists, with None for NaN and infinity, which JSON does not have."""
    return list(_plain(values))


def _plain(values: Any) -> Iterator[Any]:
    for value in values:
        if np.ndim(value):
            yield list(_plain(value))
        else:
            number = value.item() if isinstance(value, np.generic) else value
            yield number if number is not None and math.isfinite(number) else None
