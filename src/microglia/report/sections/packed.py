"""The section of packed files: bytes after each step, accuracy against compression, distributions, and EIE's balance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

import numpy as np

from microglia.compress.histograms import DEPTHS, Distributions
from microglia.methods import Packed
from microglia.report.cells import Entry, of_words
from microglia.report.chart import COLORS, Axis, Bars, Chart, Line, Panel, Rule, look
from microglia.report.records import Record
from microglia.report.rows import Group, Row
from microglia.report.section import Picture, Section, Table, register

WORDS = ("method", "kept (asked)", "settings")
STEPS = {"dense": "dense", "pruned": "pruned", "shared": "+ shared values", "coded": "+ coded"}
"""Step of `microglia.compress.Contents.steps` -> its name in tables and figures."""
WHOLE = 0.999
"""Density from which on a run counts as one that shares weights without pruning."""
SHOWN = 4
"""Layers whose distributions are drawn: those with the most weights."""


def packed_of(row: Row) -> list[Packed]:
    """Returns the packed files of a row's runs that know the bytes after each step."""
    found = [record.observed(Packed) for record in row.records]
    return [one for one in found if one is not None and one.steps]


def tables(group: Group) -> list[Table]:
    """Returns the table of bytes after each step; methods that pack no file have no row."""
    explained = (
        "Packed files, means over the runs. *pruned*: kept weights of 32 bits and positions of a fixed number of bits; "
        "*shared*: codes of a fixed number of bits and codebooks instead; *coded*: the file that was written, measured."
    )
    titles = (*WORDS, "n", *(f"{step}, bytes" for step in STEPS), "smaller", f"{group.headline}, change")
    rows = [(row, _entries(group, row, found)) for row in group.rows if (found := packed_of(row))]
    return [Table(titles, rows, WORDS, explained)]


def _entries(group: Group, row: Row, found: Sequence[Packed]) -> list[Entry]:
    means = {step: fmean(one.steps[step] for one in found) for step in STEPS}
    ratio = fmean(one.dense / one.bytes for one in found)
    change = group.scale * fmean(record.value(record.pruned) - record.value(record.dense) for record in row.records)
    return [
        *map(of_words, (row.method, row.asked, row.settings)),
        Entry(str(len(found)), len(found)),
        *(Entry(f"{value:,.0f}", value) for value in means.values()),
        Entry(f"{ratio:.1f}x", ratio),
        Entry(f"{change:+.2f}", change),
    ]


def pictures(group: Group) -> Iterator[Picture]:
    """Returns the figures of a task whose runs packed their models."""
    rows = [(row, found) for row in group.rows if (found := packed_of(row))]
    if not rows:
        return
    yield Picture("packedbytes", "bytes after each step of Deep Compression", steps_chart(group, rows))
    yield Picture("packedaccuracy", "accuracy against compression in bytes", accuracy_chart(group, rows))
    layers = [(name, layer.distributions) for name, layer in rows[0][1][0].layers.items() if layer.distributions is not None]
    shown = sorted(layers, key=lambda pair: -sum(pair[1].counts))[:SHOWN]
    if shown:
        yield Picture("packedhistograms", "shared weights and gaps between kept weights", histograms_chart(group, shown))
    balanced = [(name, found) for name, found in layers if found.balance]
    if balanced:
        yield Picture("packedbalance", "load balance of EIE by the depth of its queues", balance_chart(group, balanced))


def steps_chart(group: Group, rows: Sequence[tuple[Row, Sequence[Packed]]]) -> Chart:
    """Returns the bytes after each step, one group of bars for each step, on a log scale."""
    width = 0.8 / len(rows)
    bars = [
        Bars(
            f"{row.line}, {row.asked}",
            [place + (number - (len(rows) - 1) / 2) * width for place in range(len(STEPS))],
            [fmean(one.steps[step] for one in found) for step in STEPS],
            COLORS[number % len(COLORS)],
            width,
        )
        for number, (row, found) in enumerate(rows)
    ]
    across = Axis(ticks=range(len(STEPS)), labels=list(STEPS.values()))
    return Chart(group.title, [Panel(across, Axis("bytes", "log"), bars=bars)], legend=2)


def accuracy_chart(group: Group, rows: Sequence[tuple[Row, Sequence[Packed]]]) -> Chart:
    """Returns the headline against compression in bytes for pruning alone, sharing alone, and both with coding (figure 6)."""
    points: dict[str, list[tuple[float, float]]] = {"pruning alone": [], "sharing alone": [], "both, coded": []}
    dense = []
    for row, _ in rows:
        for record in row.records:
            one = record.observed(Packed)
            if one is None or not one.steps:
                continue
            dense.append(group.scale * record.value(record.dense))
            _place(points, group, record, one)
    lines = [
        Line(name, [x for x, _ in sorted(found)], [y for _, y in sorted(found)], look=look(number))
        for number, (name, found) in enumerate(points.items())
        if found
    ]
    unit = f", {group.unit.strip()}" if group.unit.strip() else ""
    across = Axis("dense bytes / bytes", "log")
    return Chart(group.title, [Panel(across, Axis(f"{group.headline}{unit}"), lines, [Rule(fmean(dense), "dense")])], legend=4)


def _place(points: dict[str, list[tuple[float, float]]], group: Group, record: Record, one: Packed) -> None:
    """Adds a run's points: its pruned network before sharing, and its final one."""
    final = group.scale * record.value(record.pruned)
    if min((layer.density for layer in one.layers.values()), default=0.0) >= WHOLE:
        points["sharing alone"].append((one.dense / one.steps["shared"], final))
        return
    points["both, coded"].append((one.dense / one.bytes, final))
    if record.before is not None:
        points["pruning alone"].append((one.dense / one.steps["pruned"], group.scale * record.value(record.before)))


def histograms_chart(group: Group, layers: Sequence[tuple[str, Distributions]]) -> Chart:
    """Returns how often each shared value and each gap occurs, of the first run, a row of panels for each layer (figure 5)."""
    panels = []
    for name, found in layers:
        width = float(np.median(np.diff(found.table))) if len(found.table) > 1 else 1.0
        weights = Bars("weights", found.table, found.counts, COLORS[0], 0.8 * width)
        gaps = Bars("gaps", range(1, len(found.gaps) + 1), found.gaps, COLORS[1])
        panels.append(Panel(Axis("shared value"), Axis("weights"), title=name, bars=[weights]))
        panels.append(Panel(Axis("gap, the last with fillers"), Axis("weights"), title=name, bars=[gaps]))
    return Chart(group.title, panels, 2, (9, 1 + 2.4 * len(layers)), legend=-1, height=120 + 220 * len(layers))


def balance_chart(group: Group, layers: Sequence[tuple[str, Distributions]]) -> Chart:
    """Returns the busy fraction of EIE's 64 elements against the depth of their queues, one line for each linear layer."""
    lines = [Line(name, list(DEPTHS), [100 * b for b in found.balance], look=look(n)) for n, (name, found) in enumerate(layers)]
    across = Axis("depth of the queues", "log", ticks=DEPTHS, labels=[str(depth) for depth in DEPTHS])
    return Chart(group.title, [Panel(across, Axis("load balance, %", limits=(0, 102)), lines)], legend=4)


register(Section("packed", tables=tables, pictures=pictures))
