"""The section of frozen filters: channels removed, trained and frozen in each group, and the metric by frozen fraction.

Source: Lin et al. 2020, "HRank: Filter Pruning using High-Rank Feature Map", section 4.5 and figure 5.
"""

from __future__ import annotations

from collections.abc import Iterator

from microglia.methods import WidthVectors
from microglia.report.chart import COLORS, Axis, Bars, Chart, Line, Panel, look
from microglia.report.rows import Group, Row
from microglia.report.section import Picture, Section, register
from microglia.report.sections.widths import widths_of
from microglia.report.spread import Spread

PARTS = (("removed", COLORS[5]), ("trained", COLORS[0]), ("frozen", COLORS[1]))


def pictures(group: Group) -> Iterator[Picture]:
    """Returns the parts of each group of channels, and the metric by frozen fraction where several were run."""
    found = [(row, one) for row in group.rows for one in widths_of(row)[:1] if any(one.frozen.values())]
    if found:
        yield Picture("frozen", "channels removed, trained and frozen in each group", parts_chart(group, found))
    if series := _series(group):
        yield Picture("freezing", "metric by the fraction of frozen channels", freezing_chart(group, series))


def parts_chart(group: Group, found: list[tuple[Row, WidthVectors]]) -> Chart:
    """Returns the channels of each group by what became of them, a panel for each row, of its first run."""
    panels = [_parts(row, one) for row, one in found]
    return Chart(f"{group.title}: frozen filters", panels, size=(9, 1 + 3 * len(panels)), height=160 + 240 * len(panels))


def freezing_chart(group: Group, series: dict[str, dict[float, list[Row]]]) -> Chart:
    """Returns the metric at the end by the fraction of frozen channels, a line for each variant and budget."""
    lines = []
    for number, (name, rows) in enumerate(series.items()):
        spreads = [Spread.of(r.value(r.pruned) for row in own for r in row.records) for own in rows.values()]
        means = [group.scale * spread.mean for spread in spreads]
        errors = [group.scale * (spread.deviation or 0.0) for spread in spreads]
        lines.append(Line(name, [100 * at for at in rows], means, y_error=errors, look=look(number, size=5)))
    panel = Panel(Axis("frozen channels (%)"), Axis(f"{group.headline}{group.in_unit}"), lines)
    return Chart(f"{group.title}: freezing while fine-tuning", [panel], size=(6.5, 5.0))


def _parts(row: Row, found: WidthVectors) -> Panel:
    heights = (found.widths, found.counts, found.frozen)  # each stands in front of the one before
    places = range(1, len(found.widths) + 1)
    bars = [
        Bars(name, places, [part.get(group, 0) for group in found.widths], color)
        for (name, color), part in zip(PARTS, heights, strict=True)
    ]
    title = f"{row.line}, {row.asked}"
    return Panel(Axis("group of coupled channels", whole=True), Axis("channels", limits=(0, None)), bars=bars, title=title)


def _series(group: Group) -> dict[str, dict[float, list[Row]]]:
    """Returns the rows of each variant and budget by frozen fraction, rising, where there are several fractions."""
    found: dict[str, dict[float, list[Row]]] = {}
    for row in group.rows:
        prune = row.records[0].recipe["prune"]
        if "frozen" in prune and "variant" in prune and widths_of(row):
            name = f"{prune['variant']}, {row.asked or 'rates'}"
            found.setdefault(name, {}).setdefault(float(prune["frozen"]), []).append(row)
    return {name: dict(sorted(rows.items())) for name, rows in found.items() if len(rows) > 1}


register(Section("freezing", pictures=pictures))
