"""The section of HRank: ranks of maps by batch, their agreement, and the variants side by side.

Source: Lin et al. 2020, "HRank: Filter Pruning using High-Rank Feature Map", figures 2 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from microglia.methods.widths_observed import Ranks
from microglia.report.cells import Entry, of_count, of_words
from microglia.report.chart import COLORS, Axis, Bars, Chart, Field, Panel
from microglia.report.rows import Group, Row
from microglia.report.section import Picture, Section, Table, register
from microglia.report.sections.widths import widths_of
from microglia.report.spread import Spread

WORDS = ("method", "kept (asked)", "settings")
EXPLAINED = (
    "Ranks of maps in the dense network: Spearman's correlation of two disjoint halves of the batches, by layer. HRank claims "
    "that the order of ranks hardly depends on the images."
)
VARIANTS = ("hrank", "edge", "random", "reverse")
MOMENTS = (("before recovery", COLORS[5]), ("after", COLORS[0]))


def tables(group: Group) -> list[Table]:
    """Returns the table of agreements."""
    titles = (*WORDS, "layers", "least", "mean")
    rows = [(row, _entries(row, ranks)) for row in group.rows if (ranks := _ranks(row)) is not None and ranks.agreement]
    return [Table(titles, rows, WORDS, EXPLAINED).without_empty("settings")]


def pictures(group: Group) -> Iterator[Picture]:
    """Returns the ranks by batch of the first run that has them, and the variants at each budget."""
    found = [ranks for row in group.rows if (ranks := _ranks(row)) is not None and ranks.by_batch]
    if found:
        yield Picture("ranks", "mean rank of each map in each batch of images", ranks_chart(group, found[0]))
    if budgets := _variants(group):
        yield Picture("variants", "variants of HRank at equal widths", variants_chart(group, budgets))


def ranks_chart(group: Group, ranks: Ranks) -> Chart:
    """Returns the mean rank by channel and batch, a panel for each layer; equal columns mean that the ranks are stable."""
    panels = []
    for name, rows in ranks.by_batch.items():
        channels = len(rows[0])
        values = [[batch[channel] for batch in rows] for channel in range(channels)]
        edges = [number + 0.5 for number in range(len(rows) + 1)]
        field = Field(edges, [number - 0.5 for number in range(channels + 1)], values, "mean rank", colors="Viridis")
        panels.append(Panel(Axis("batch of images", whole=True), Axis("map", whole=True), field=field, title=name))
    return Chart(group.title, panels, columns=len(panels), size=(4.5 * len(panels), 4.5), legend=-1)


def variants_chart(group: Group, budgets: dict[str, dict[str, list[Row]]]) -> Chart:
    """Returns the headline of each variant before and after recovery, a panel for each budget, means over the runs."""
    panels = [_bars(group, asked, rows) for asked, rows in budgets.items()]
    return Chart(f"{group.title}: variants of HRank", panels, columns=len(panels), size=(5.5 * len(panels), 4.8), legend=2)


def _ranks(row: Row) -> Ranks | None:
    return next((one.ranks for one in widths_of(row) if one.ranks is not None), None)


def _entries(row: Row, ranks: Ranks) -> list[Entry]:
    values = list(ranks.agreement.values())
    numbers = (Entry(f"{value:.3f}", value) for value in (min(values), fmean(values)))
    return [*map(of_words, (row.method, row.asked, row.settings)), of_count(len(values)), *numbers]


def _variants(group: Group) -> dict[str, dict[str, list[Row]]]:
    """Returns the rows of each variant at each budget at which there are several."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in group.rows:
        variant = row.records[0].recipe["prune"].get("variant")
        if variant in VARIANTS and widths_of(row):
            found.setdefault(row.asked or "rates", {}).setdefault(variant, []).append(row)
    return {asked: rows for asked, rows in found.items() if len(rows) > 1}


def _bars(group: Group, asked: str, rows: dict[str, list[Row]]) -> Panel:
    names = [name for name in VARIANTS if name in rows]
    width = 0.4
    bars = []
    for number, (moment, color) in enumerate(MOMENTS):
        spreads = [_spread(rows[name], before=number == 0) for name in names]
        places = [place + width * (number - 0.5) for place, spread in enumerate(spreads) if spread is not None]
        known = [spread for spread in spreads if spread is not None]
        if known:
            heights = [group.scale * spread.mean for spread in known]
            errors = [group.scale * (spread.deviation or 0.0) for spread in known]
            bars.append(Bars(moment, places, heights, color, width, errors=errors))
    x = Axis("variant", ticks=range(len(names)), labels=names)
    return Panel(x, Axis(f"{group.headline}{group.in_unit}", limits=(0, None)), bars=bars, title=asked)


def _spread(rows: list[Row], *, before: bool) -> Spread | None:
    records = [record for row in rows for record in row.records]
    observed = [record.before if before else record.pruned for record in records]
    values = [record.value(one) for record, one in zip(records, observed, strict=True) if one is not None]
    return Spread.of(values) if values else None


register(Section("ranks", tables=tables, pictures=pictures))
