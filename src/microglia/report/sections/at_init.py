"""The section of masks made before training: weights on a path from input to output, and empty layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import fmean

from microglia.methods import Initialization
from microglia.report.cells import Entry, of_spread, of_words
from microglia.report.chart import Axis, Chart, Line, Panel, look
from microglia.report.rows import Group, Row
from microglia.report.section import Picture, Section, Table, register
from microglia.report.spread import Spread

WORDS = ("method", "asked", "settings")
EXPLAINED = (
    "Masks made before training. On a path: kept weights that lie on a path from input to output; the others are dead. "
    "Emptied: layers that kept nothing, maximum over seeds; one such layer on the trunk collapses the network. Least: the "
    "minimum density of a layer."
)
CAPTION = "weights on a path, emptied layers and the least density against compression, of masks made before training"
LEAST = 2  # minimum number of budgets for a line
PANELS: tuple[tuple[Axis, Callable[[Initialization], float]], ...] = (
    (Axis("kept weights on a path (%)"), lambda found: 100 * found.effective / max(1, found.kept)),
    (Axis("emptied layers", whole=True), lambda found: len(found.emptied)),
    (Axis("least density of a layer (%)", "symlog", (0, None)), lambda found: 100 * found.least),
)


def tables(group: Group) -> list[Table]:
    """Returns the table of a task's runs with pruning before training."""
    unit = f", {group.unit.strip()}" if group.unit else ""
    titles = ["method", "asked", "settings", "n", "on a path, %", "emptied", "least, %", f"{group.headline}{unit}"]
    rows = [(row, _entries(row, group.scale)) for row in _rows(group)]
    return [Table(titles, rows, WORDS, EXPLAINED).without_empty("settings")]


def pictures(group: Group) -> Iterator[Picture]:
    """Returns the collapse figure of a task with several budgets."""
    if lines := _lines(group):
        yield Picture("collapse", CAPTION, collapse_chart(group, lines))


def collapse_chart(group: Group, lines: dict[str, list[Row]]) -> Chart:
    """Returns the three quantities of the table against compression, means over seeds."""
    x = Axis("compression of the prunable weights", "log", suffix="x", unit="x")
    panels = [
        Panel(x, axis, [_line(name, number, rows, read) for number, (name, rows) in enumerate(lines.items())])
        for axis, read in PANELS
    ]
    return Chart(f"{group.title}: masks before training", panels, columns=len(PANELS), size=(15, 5.2), legend=4)


def _found(row: Row) -> list[Initialization]:
    found = [record.observed(Initialization) for record in row.records]
    return [one for one in found if one is not None]


def _rows(group: Group) -> list[Row]:
    return [row for row in group.rows if _found(row)]


def _entries(row: Row, scale: float) -> list[Entry]:
    found = _found(row)
    worst = max(found, key=lambda one: len(one.emptied))
    emptied = f"{len(worst.emptied)} of {len(worst.layers)}" if worst.emptied else "none"
    least = min(one.least for one in found)
    return [
        of_words(row.method),
        Entry(row.asked, found[0].kept / found[0].total),
        of_words(row.settings),
        Entry(str(row.after.n), row.after.n),
        of_spread(Spread.of(one.effective / max(1, one.kept) for one in found), 100),
        Entry(emptied, len(worst.emptied)),
        Entry(f"{100 * least:.2g}", least),
        of_spread(row.after, scale),
    ]


def _lines(group: Group) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in _rows(group):
        lines.setdefault(row.line, []).append(row)
    return {name: rows for name, rows in lines.items() if len({row.asked for row in rows}) >= LEAST}


def _line(name: str, number: int, rows: list[Row], read: Callable[[Initialization], float]) -> Line:
    points = sorted((_found(row)[0].total / max(1, _found(row)[0].kept), fmean(map(read, _found(row)))) for row in rows)
    x, y = zip(*points, strict=True)
    return Line(name, x, y, look=look(number, size=5), method=rows[0].method)


register(Section("at_init", applies=lambda group: bool(_rows(group)), tables=tables, pictures=pictures))
