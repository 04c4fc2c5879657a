"""The section of methods that rank channels by scales of norms: histograms, and sweeps of lambda and t.

Source: Zhuang et al. 2020, "Neuron-level Structured Pruning using Polarization Regularizer", figures 1 and 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from microglia.methods.widths_observed import Scales
from microglia.report.chart import COLORS, Axis, Bars, Chart, Line, Panel, Rule, look
from microglia.report.rows import Group, Row
from microglia.report.section import Picture, Section, register
from microglia.report.sections.widths import widths_of

SEARCH = "short trainings of the search"


@dataclass(frozen=True)
class Point:
    """One training under polarization.

    Attributes:
        series: Name of its line: the strength, or the search that it belongs to.
        t: Weight of a scale itself.
        strength: Lambda.
        flops: Remaining multiply-accumulates, in per cent.
        value: Final headline as shown; None for a short training.
    """

    series: str
    t: float
    strength: float
    flops: float
    value: float | None = None


def pictures(group: Group) -> Iterator[Picture]:
    """Returns the histograms of scales, and the sweeps of polarization."""
    found = [(row, scales) for row in group.rows if (scales := _scales(row)) is not None]
    if found:
        yield Picture("scales", "histogram of the scales of norms before the cut", histograms(group, found))
    points = list(_points(group))
    if len({(point.strength, point.t) for point in points}) > 1:
        yield Picture("sweep", "remaining operations by lambda and t", sweep_chart(group, points))


def histograms(group: Group, found: list[tuple[Row, Scales]]) -> Chart:
    """Returns one histogram for each row, of its first run, with the largest scale that goes."""
    panels = [_histogram(row, scales) for row, scales in found]
    return Chart(group.title, panels, size=(8, 1 + 2.6 * len(panels)), legend=-1, height=160 + 240 * len(panels))


def sweep_chart(group: Group, points: list[Point]) -> Chart:
    """Returns remaining operations and the headline against t, one line for each lambda."""
    series: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: (point.strength, point.t)):
        series.setdefault(point.series, []).append(point)
    axis = Axis("t")
    operations = [_line(name, number, own, [p.flops for p in own]) for number, (name, own) in enumerate(series.items())]
    panels = [Panel(axis, Axis("remaining MACs (%)"), operations)]
    valued = {name: [p for p in own if p.value is not None] for name, own in series.items()}
    if lines := [
        _line(name, number, own, [p.value or 0.0 for p in own]) for number, (name, own) in enumerate(valued.items()) if own
    ]:
        panels.append(Panel(axis, Axis(f"{group.headline}{group.in_unit}"), lines))
    return Chart(f"{group.title}: polarization", panels, columns=len(panels), size=(6 * len(panels), 5.0), legend=3)


def _scales(row: Row) -> Scales | None:
    return next((one.scales for one in widths_of(row) if one.scales is not None), None)


def _histogram(row: Row, scales: Scales) -> Panel:
    width = scales.largest / len(scales.counts)
    places = [(number + 0.5) * width for number in range(len(scales.counts))]
    bars = Bars(row.line, places, scales.counts, COLORS[0], width)
    rules = [Rule(scales.cut, "largest that goes", upright=True)] if scales.cut is not None else []
    return Panel(Axis("|scale|"), Axis("channels"), rules=rules, bars=[bars], title=f"{row.line}, {row.asked}")


def _points(group: Group) -> Iterator[Point]:
    for row in group.rows:
        for record in row.records:
            prune = record.recipe["prune"]
            if not {"strength", "t"} <= prune.keys() or not widths_of(row):
                continue
            strength, t = float(prune["strength"]), float(prune["t"])
            flops = 100 * record.pruned.macs.total / max(1, record.dense.macs.total)
            yield Point(f"lambda {strength:g}", t, strength, flops, group.scale * record.value(record.pruned))
        for found in widths_of(row):
            for probe in found.probes:
                yield Point(f"lambda {probe.strength:.3g}, {SEARCH}", probe.t, probe.strength, 100 * probe.flops)


def _line(name: str, number: int, points: list[Point], values: list[float]) -> Line:
    return Line(name, [point.t for point in points], values, look=look(number, size=5), method="polarization")


register(Section("scales", pictures=pictures))
