"""The section of methods that remove channels: width vectors before and after, and the progress of searches over them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from statistics import fmean, median

from microglia.methods import WidthSearch, WidthVectors
from microglia.report.cells import Entry, of_count, of_words
from microglia.report.chart import Axis, Chart, Line, Look, Panel, look
from microglia.report.rows import Group, Row
from microglia.report.section import Picture, Section, Table, register

WORDS = ("method", "kept (asked)", "settings", "before", "after")
EXPLAINED = (
    "Widths of the groups of coupled channels in the order of the network, before and after, of the first run of each row; "
    "16x9 is nine groups of 16 channels."
)
SEARCHED = (
    "Searches over widths: evaluated vectors, drawn vectors that missed the budget, rounds, and the best and the median value "
    "of the last round, means over the runs."
)


def widths_of(row: Row) -> list[WidthVectors]:
    """Returns the widths of a row's runs that observe any."""
    found = [record.observed(WidthVectors) for record in row.records]
    return [one for one in found if one is not None and one.counts]


def searches_of(row: Row) -> list[WidthSearch]:
    """Returns the searches of a row's runs."""
    found = [record.observed(WidthSearch) for record in row.records]
    return [one for one in found if one is not None and one.rounds]


def run_lengths(values: list[float]) -> str:
    """Returns numbers with equal neighbours joined: ``16x9, 32x9``."""
    counted = [(value, len(list(same))) for value, same in groupby(values)]
    return ", ".join(f"{value:g}x{count}" if count > 1 else f"{value:g}" for value, count in counted)


def tables(group: Group) -> list[Table]:
    """Returns the table of widths and the table of searches."""
    rows = [(row, _width_entries(row, found[0])) for row in group.rows if (found := widths_of(row))]
    vectors = Table((*WORDS[:3], "groups", *WORDS[3:]), rows, WORDS, EXPLAINED).without_empty("settings")
    titles = ("method", "kept (asked)", "settings", "evaluated", "rejected", "rounds", "best", "median")
    searched = [(row, _search_entries(row, searches)) for row in group.rows if (searches := searches_of(row))]
    return [vectors, Table(titles, searched, WORDS[:3], SEARCHED).without_empty("settings")]


def pictures(group: Group) -> Iterator[Picture]:
    """Returns the figure of kept fractions by group, and that of searches."""
    if rows := [row for row in group.rows if any(one.fractions for one in widths_of(row))]:
        yield Picture("widths", "kept fraction of each group of channels", widths_chart(group, rows))
    if searched := [row for row in group.rows if searches_of(row)]:
        yield Picture("width-search", "best and median value of each round of a search", search_chart(group, searched))


def widths_chart(group: Group, rows: list[Row]) -> Chart:
    """Returns the kept fraction of each group, one panel for each budget and one line for each row, means over the runs."""
    budgets: dict[str, list[Row]] = {}
    for row in rows:
        budgets.setdefault(row.asked, []).append(row)
    names = sorted({row.line for row in rows})
    panels = [
        Panel(
            Axis("group of coupled channels", whole=True),
            Axis("kept channels (%)", limits=(0, 102)),
            [_fractions(row, names.index(row.line)) for row in same],
            title=asked,
        )
        for asked, same in budgets.items()
    ]
    return Chart(group.title, panels, size=(9, 1 + 3 * len(panels)), legend=4, height=160 + 240 * len(panels))


def search_chart(group: Group, rows: list[Row]) -> Chart:
    """Returns the best value so far, and the best and the median of each round, of the first run of each row."""
    panels = [_progress(row, searches_of(row)[0]) for row in rows]
    return Chart(group.title, panels, size=(8, 1 + 2.8 * len(panels)), legend=0, height=160 + 240 * len(panels))


def _width_entries(row: Row, found: WidthVectors) -> list[Entry]:
    before = list(found.widths.values())
    after = list(found.counts.values())
    shown = run_lengths(before) if all(width > 1 for width in before) else ""
    words = map(of_words, (row.method, row.asked, row.settings))
    return [*words, of_count(len(after)), Entry(shown, sum(before)), Entry(run_lengths(after), sum(after))]


def _search_entries(row: Row, found: list[WidthSearch]) -> list[Entry]:
    numbers = (
        fmean(len(one.candidates) for one in found),
        fmean(one.rejected for one in found),
        fmean(len(one.rounds) for one in found),
    )
    values = fmean(one.rounds[-1].best for one in found), fmean(one.rounds[-1].median for one in found)
    words = map(of_words, (row.method, row.asked, row.settings))
    return [*words, *map(of_count, numbers), *(Entry(f"{value:.4g}", value) for value in values)]


def _fractions(row: Row, number: int) -> Line:
    vectors = [list(one.fractions.values()) for one in widths_of(row) if one.fractions]
    means = [100 * fmean(values) for values in zip(*vectors, strict=False)]
    return Line(row.line, range(1, len(means) + 1), means, look=look(number, size=5), method=row.method)


def _progress(row: Row, search: WidthSearch) -> Panel:
    steps = range(1, len(search.rounds) + 1)
    best = [one.best for one in search.rounds]
    so_far = [max(best[:step]) for step in steps]
    lines = [
        Line("best so far", steps, so_far, look=Look("black"), method=row.method),
        Line("best of the round", steps, best, look=look(0, size=5), method=row.method),
        Line("median of the round", steps, [one.median for one in search.rounds], look=look(1, size=5), method=row.method),
    ]
    title = f"{row.line}, {row.asked}: {len(search.candidates):,} vectors, {search.rejected:,} rejected"
    middle = median([one.value for one in search.candidates]) if search.candidates else so_far[-1]
    return Panel(Axis("round", whole=True), Axis("value", limits=(min(middle, *best), None)), lines, title=title)


register(Section("widths", tables=tables, pictures=pictures))
