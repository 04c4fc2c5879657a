"""The section of methods that learn their masks: the density of each layer, the masks over a search, and the freeze."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

import numpy as np

from microglia.methods import Search
from microglia.methods.search_observed import Freeze
from microglia.report.cells import Entry, of_words
from microglia.report.chart import COLORS, Axis, Chart, Field, Line, Look, Panel, look
from microglia.report.records import Record
from microglia.report.rows import Group, Row
from microglia.report.section import Picture, Section, Table, register

WORDS = ("method", "pattern", "kept (asked)")
Budgets = dict[tuple[str, str], list[Row]]
"""(pattern, budget) -> rows."""


def densities(record: Record) -> dict[str, float]:
    """Returns the kept fraction of each layer, or of each group of coupled channels."""
    search = record.observed(Search)
    return record.densities or (search.densities if search is not None else {})


def tables(group: Group) -> list[Table]:
    """Returns the table of changes at the freeze; methods that learn no masks have no row."""
    explained = (
        f"The freeze, when soft masks become exact, means over the runs; {group.headline} on the validation split with the "
        f"soft and with the exact masks.{group.seen and f' {group.seen}'}"
    )
    titles = (*WORDS, "units", "undecided", "mean |f - mask|", "soft", "exact")
    found = [(row, _freezes(row)) for row in group.rows]
    rows = [(row, _entries(group, row, freezes)) for row, freezes in found if any(f.soft and f.softens for f in freezes)]
    return [Table(titles, rows, WORDS, explained)]


def pictures(group: Group) -> Iterator[Picture]:
    """Returns the figures of a task whose runs observe layers or a search."""
    if budgets := _budgets(group):
        yield Picture("layers", "density of each layer", layers_chart(group, budgets))
    if searches := _searches(group):
        yield Picture("search", "masks and temperature over the search", search_chart(group, searches))


def layers_chart(group: Group, budgets: Budgets) -> Chart:
    """Returns the density of each layer in the order of the network, one panel for each budget, means over seeds."""
    methods = sorted({row.method for rows in budgets.values() for row in rows})
    panels = [
        Panel(
            Axis("layer" if pattern != "channel" else "group of coupled channels", whole=True),
            Axis("density", limits=(0, 1.02)),
            [_layers(row, methods.index(row.method)) for row in rows],
            title=f"{pattern}, {asked}",
        )
        for (pattern, asked), rows in budgets.items()
    ]
    return Chart(group.title, panels, size=(9, 1 + 3 * len(panels)), legend=7, height=160 + 240 * len(panels))


def search_chart(group: Group, searches: Sequence[tuple[Row, Search]]) -> Chart:
    """Returns the distribution of mask values in [0, 1] over the steps, and the temperature."""
    panels = [_search(row, search) for row, search in searches]
    return Chart(group.title, panels, size=(8, 1 + 2.6 * len(panels)), legend=-1, height=160 + 240 * len(panels))


def _freezes(row: Row) -> list[Freeze]:
    found = [record.observed(Search) for record in row.records]
    return [search.freeze for search in found if search is not None and search.freeze is not None]


def _entries(group: Group, row: Row, freezes: Sequence[Freeze]) -> list[Entry]:
    undecided, mean = fmean(f.undecided for f in freezes), fmean(f.mean for f in freezes)
    soft, hard = (
        group.scale * fmean(metrics.get(group.headline, math.nan) for metrics in moment)
        for moment in ([f.soft for f in freezes], [f.hard for f in freezes])
    )
    return [
        *map(of_words, (row.method, row.pattern, row.asked)),
        Entry(f"{freezes[0].units:,}", freezes[0].units),
        Entry(f"{undecided:,.1f}", undecided),
        Entry(f"{mean:.2g}", mean),
        *(Entry(f"{value:.2f}{group.unit}", value if math.isfinite(value) else -math.inf) for value in (soft, hard)),
    ]


def _budgets(group: Group) -> Budgets:
    """Returns the rows of each budget whose methods can be compared by layer; at least one is learned."""
    found: Budgets = {}
    for row in group.rows:
        if densities(row.records[0]):
            found.setdefault((row.pattern, row.asked), []).append(row)
    return {
        key: rows
        for key, rows in found.items()
        if len({row.method for row in rows}) > 1 and any(row.records[0].observed(Search) is not None for row in rows)
    }


def _searches(group: Group) -> list[tuple[Row, Search]]:
    """Returns the search of the first run of each row with temperatures."""
    found = [(row, row.records[0].observed(Search)) for row in group.rows]
    return [(row, s) for row, s in found if s is not None and any(h.temperature is not None for h in s.history)]


def _layers(row: Row, number: int) -> Line:
    means = np.mean([list(densities(record).values()) for record in row.records], axis=0).tolist()
    return Line(row.method, range(1, len(means) + 1), means, look=look(number, size=5), method=row.method)


def _search(row: Row, search: Search) -> Panel:
    steps = [snapshot.step for snapshot in search.history]
    counts = np.array([snapshot.histogram for snapshot in search.history]).T
    ends = [*steps, steps[-1] + max(1, steps[-1] - steps[-2] if len(steps) > 1 else 1)]
    units = Field(ends, np.linspace(0, 1, len(counts) + 1).tolist(), np.where(counts > 0, counts, np.nan), "units", log=True)
    temperatures = [math.nan if snapshot.temperature is None else snapshot.temperature for snapshot in search.history]
    return Panel(
        Axis("step of the training"),
        Axis("mask"),
        field=units,
        title=f"{row.line}, {row.asked}",
        right=Axis("temperature", "log", color=COLORS[1]),
        right_lines=[Line("temperature", steps, temperatures, look=Look(COLORS[1]), method=row.method)],
    )


register(Section("search", tables=tables, pictures=pictures))
