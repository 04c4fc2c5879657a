"""The section of all runs: the main table, accuracy against compression and speed-up, and the curves of the trainings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from microglia.report.chart import Axis, Chart, Line, Panel, Rule, look
from microglia.report.rows import Group, Row
from microglia.report.section import Picture, Section, Table, register
from microglia.report.table import table

NONE = "not evaluated while training"


@dataclass(frozen=True)
class Ratio:
    """A ratio of every row, for the horizontal axis.

    Attributes:
        title: Title of the axis.
        read: Returns the ratio of a row, None if it is unknown.
        missing: Text of an empty diagram.
    """

    title: str
    read: Callable[[Row], float | None]
    missing: str


RATIOS: dict[str, tuple[Ratio, ...]] = {
    "compression": (Ratio("compression ratio (all parameters / those left)", lambda row: row.compression, "no finite ratio"),),
    "speedup": (
        Ratio("theoretical speed-up (MACs)", lambda row: row.theoretical, "no finite ratio"),
        Ratio("measured speed-up (best dense / best pruned)", lambda row: row.speedup, "latency was not measured"),
    ),
}
"""The theoretical speed-up is always shown beside the measured one."""
MARKED = 5  # from this number of epochs on a curve has no markers


def tables(group: Group) -> list[Table]:
    """Returns the main table of a task."""
    return [table(group)]


def pictures(group: Group) -> Iterator[Picture]:
    """Returns the headline against each ratio, and the curves for the screen."""
    for name, ratios in RATIOS.items():
        yield Picture(name, f"{group.headline} against {name}", ratio_chart(group, ratios))
    if any(record.curves for record in group.records):
        yield Picture("curves", "what the trainings logged", curves_chart(group), paper=False)


def ratio_chart(group: Group, ratios: Sequence[Ratio]) -> Chart:
    """Returns the headline against ratios, a panel for each, with the dense models as straight lines."""
    return Chart(
        group.title,
        [_panel(group, ratio) for ratio in ratios],
        columns=len(ratios),
        size=(1.5 + 5.5 * len(ratios), 5.4),
        shared=True,
        legend=1 + len(ratios),
        note="dashed: the dense model",
    )


def points(rows: Sequence[Row], ratio: Ratio) -> list[tuple[float, Row]]:
    """Returns (ratio, row) of a line; rows without a ratio are left out."""
    found = [(ratio.read(row), row) for row in rows]
    return [(value, row) for value, row in found if value is not None and value > 0 and math.isfinite(value)]


def _panel(group: Group, ratio: Ratio) -> Panel:
    lines = [
        Line(
            name,
            [value for value, _ in found],
            [group.scale * row.after.mean for _, row in found],
            y_error=[group.scale * (row.after.deviation or 0.0) for _, row in found],
            notes=[f"{row.asked}, n = {row.after.n}" for _, row in found],
            method=found[0][1].method,
            look=look(number),
        )
        for number, (name, rows) in enumerate(group.lines.items())
        if (found := points(rows, ratio))
    ]
    rules = [
        Rule(group.scale * row.after.mean, row.line, spread=group.scale * (row.after.deviation or 0.0))
        for row in group.baselines
    ]
    low, high = _limits([1.0, *(x for line in lines for x in line.x)])
    ticks = [2.0**exponent for exponent in range(low, high + 1)]
    limits = 2 ** (low - 0.1), 2 ** (high + 0.1)
    x = Axis(ratio.title, "log", limits, ticks, suffix="x", unit="x")
    return Panel(x, Axis(f"{group.headline} after recovery{group.in_unit}", unit=group.unit), lines, rules, empty=ratio.missing)


def _limits(ratios: Sequence[float]) -> tuple[int, int]:
    """Returns the exponents of 2 between which all ratios lie; at least one step above 2^0, the dense model."""
    return math.floor(math.log2(min(ratios)) + 1e-9), max(1, math.ceil(math.log2(max(ratios)) - 1e-9))


def curves_chart(group: Group) -> Chart:
    """Returns the curves of every training, a column per stage: the validation headline above, the loss below."""
    stages = list(dict.fromkeys(stage for record in group.records for stage in record.curves))
    above = Axis(f"validation {group.headline}{group.in_unit}")
    panels = [
        Panel(Axis(), above, _curves(group, stage, "validation", group.scale), title=stage, empty=NONE) for stage in stages
    ]
    panels += [Panel(Axis("epoch"), Axis("training loss"), _curves(group, stage, "loss", 1.0)) for stage in stages]
    note = f"training{group.seen and f'. {group.seen}'}"
    return Chart(group.title, panels, columns=len(stages), note=note, height=620)


def _curves(group: Group, stage: str, name: str, scale: float) -> list[Line]:
    return [
        Line(
            line,
            [epoch for epoch, _ in points],
            [scale * value for _, value in points],
            look=replace(look(number), marker=look(number).marker if len(points) < MARKED else ""),
            notes=f"{row.asked}, seed {record.recipe['seed']}",
            method=row.method,
        )
        for number, (line, rows) in enumerate(group.lines.items())
        for row in rows
        for record in row.records
        if stage in record.curves and (points := _points(record.curves[stage], name))
    ]


def _points(curves: Mapping[str, Sequence[float]], name: str) -> list[tuple[float, float]]:
    """Returns the (epoch, value) pairs of the epochs that have a value."""
    return [(x, y) for x, y in zip(curves["epoch"], curves[name], strict=True) if not math.isnan(y)]


register(Section("overview", tables=tables, pictures=pictures))
