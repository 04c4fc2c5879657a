"""The opening of a page: one sentence about each task, and the bytes of its models as bars."""

from __future__ import annotations

from dataclasses import dataclass

from microglia.report.cells import of_count, of_spread
from microglia.report.rows import Group, Row


@dataclass(frozen=True)
class Bar:
    """The bytes of one row, beside the largest.

    Attributes:
        label: Name of the row.
        text: Bytes of the zipped file, for readers.
        share: Per cent of the largest zipped file, 0 to 100.
        method: Method by which the page filters; empty for a dense model.
    """

    label: str
    text: str
    share: float
    method: str


def opening(group: Group) -> str:
    """Returns one sentence: which model stays nearest to the dense one, which file is smallest, which model is fastest.

    Nearest is the smallest change of the headline, up or down, so that the sentence holds for metrics of either direction.
    """
    dense = ", ".join(_value(group, row) for row in group.baselines)
    changes = [(abs(row.change.mean), row) for row in group.rows if row.change is not None]
    parts = []
    if changes:
        nearest = min(changes, key=lambda pair: pair[0])[1]
        parts.append(f"{_name(nearest)} stays nearest to it with {_value(group, nearest)}")
    largest = max((row.zipped for row in group.baselines), default=0.0)
    if group.rows and largest:
        smallest = min(group.rows, key=lambda row: row.zipped)
        share = f"{smallest.zipped / largest:.0%} of the dense bytes"
        parts.append(f"{_name(smallest)} has the smallest zipped file, {share}, with {_value(group, smallest)}")
    timed = [(row.speedup, row) for row in group.rows if row.speedup is not None]
    if timed:
        speedup, fastest = max(timed, key=lambda pair: pair[0])
        how = "is fastest" if speedup > 1 else "is not faster than dense but the best of the timed ones"
        parts.append(f"{_name(fastest)} {how}, {speedup:.2f}x by the clock, with {_value(group, fastest)}")
    else:
        parts.append("no time was measured")
    return f"{group.title}: the dense model has {dense} {group.headline}; {'; '.join(parts)}."


def byte_bars(group: Group) -> list[Bar]:
    """Returns a bar for each row of the main table, the dense models first."""
    rows = (*group.baselines, *group.rows)
    largest = max((row.zipped for row in rows), default=0.0) or 1.0
    return [
        Bar(_name(row), of_count(row.zipped).text, round(100 * row.zipped / largest, 2), "" if row.baseline else row.method)
        for row in rows
    ]


def _name(row: Row) -> str:
    if row.baseline:
        return " ".join(filter(None, (row.method, row.settings)))
    return f"{row.line} at {row.asked}" if row.asked else row.line


def _value(group: Group, row: Row) -> str:
    unit = f" {group.unit.strip()}" if group.unit else ""
    return f"{of_spread(row.after, group.scale).text}{unit}"
