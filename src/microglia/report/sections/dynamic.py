"""The section of dynamic runs, whose gates choose the computation for each input: labels, table and figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np

from microglia.methods import Predicted, Routing
from microglia.report.cells import Entry, of_spread, of_words
from microglia.report.chart import Axis, Chart, Line, Panel, Rule, look
from microglia.report.families import Family
from microglia.report.records import Record
from microglia.report.rows import Group, Row
from microglia.report.section import Picture, Section, Table, register
from microglia.report.spread import Spread

WORDS = ("method", "rule", "asked", "settings")
EXPLAINED = (
    "Gates choose the computation for each input; shares are in % of the dense model's multiply-accumulates. Honest: all "
    "computed operations, including heads, depthwise layers and full residual widths. Paper: as published, without heads and "
    "depthwise layers. Predicted: before the training, on training images. Precision and recall: masks against targets. "
    "Routes: distinct routes among the test inputs. ± is over seeds unless a column says inputs. The figure also shows static "
    "runs, by the multiply-accumulates of their kept weights."
)
OVER_STATIC = (
    " Over static: the difference to static masks at the gates (mode static) with the same budget, places, training and seed."
)
STATIC = "over static at the gates, points"
AXIS = "FLOPs reduction, % of dense (with gates: honest mean over inputs, heads counted)"
USUAL_RULE = "prefix_le"
"""The usual rule of targets, which the name of a row omits."""
Point = tuple[Spread, Spread, Row]
"""(fraction of operations saved, headline, row)."""


# ------------------------------------------------------------------------------------------------------------ the labels
def gated(record: Record) -> bool:
    """Tells whether gates of a run's model choose the computation for each input."""
    return record.observed(Routing) is not None


def left(record: Record) -> float | None:
    """Returns the fraction of the dense operations that a gated model computes on average."""
    routing = record.observed(Routing)
    return routing.honest.mean if routing is not None else None


def method(record: Record) -> str:
    """Returns a run's method with its mode, and with its rule unless that is the usual one."""
    rule = rule_of(record)
    return " ".join(
        filter(None, (record.recipe["method"], record.recipe["prune"].get("mode", ""), "" if rule == USUAL_RULE else rule))
    )


def rule_of(record: Record) -> str:
    """Returns the rule of a run's targets."""
    return str(record.recipe["prune"].get("rule", USUAL_RULE if "mode" in record.recipe["prune"] else ""))


def asked(record: Record) -> str:
    """Returns the budget of a run: the operations with the kind of count, or r."""
    prune: Mapping[str, Any] = record.recipe["prune"]
    flops, r = prune.get("flops"), prune.get("r")
    if flops is not None:
        return f"flops {flops:g}{' by the paper count' if prune.get('count') == 'paper' else ''}"
    if isinstance(r, dict):  # no number identifies one of several such plans, so it gets a mark
        mark = hashlib.blake2b(json.dumps(r, sort_keys=True).encode(), digest_size=3).hexdigest()
        return f"r by layer, mean {fmean(r.values()):.4g} (plan {mark})"
    return f"r {r:g}"


def strength(record: Record) -> float:
    """Returns the sort key of budgets, from weak to strong."""
    flops, r = record.recipe["prune"].get("flops"), record.recipe["prune"].get("r")
    return -float(flops if flops is not None else fmean(r.values()) if isinstance(r, dict) else r)


def check(record: Record) -> None:
    """Raises ValueError unless the recipe has a budget."""
    if record.recipe["prune"].get("flops") is None and record.recipe["prune"].get("r") is None:
        raise ValueError("the recipe of a run with routes has neither flops nor r")


# ------------------------------------------------------------------------------------------------------------- the table
def tables(group: Group) -> list[Table]:
    """Returns the table of a task's dynamic models."""
    unit = f", {group.unit.strip()}" if group.unit else ""
    titles = ["method", "rule", "asked", "settings", "n", "r", "predicted (honest), %", "computed (honest), %"]
    titles += ["± over inputs", "least to most, %", "predicted (paper), %", "computed (paper), %", f"{group.headline}{unit}"]
    titles += [STATIC, "precision, %", "recall, %", "routes"]
    baseline = _static(group)
    rows = [(row, _entries(row, group.scale, baseline)) for row in _rows(group)]
    return [
        Table(titles, rows, WORDS, EXPLAINED + (OVER_STATIC if baseline else ""))
        .without_empty("settings")
        .without_empty(STATIC)
    ]


def _pair(record: Record) -> tuple[Any, ...]:
    """Returns what a run and its baseline have in common: budget, places of the gates, training and seed."""
    prune, fixed = record.recipe["prune"], ("gates", "block", "layers", "exclude")
    places = [prune.get(name, usual) for name, usual in zip(fixed, ("all", 1, ["*"], []), strict=True)]
    return (
        asked(record),
        *(json.dumps(value, sort_keys=True) for value in (places, record.recipe.get("train"))),
        int(record.recipe["seed"]),
    )


def _static(group: Group) -> dict[tuple[Any, ...], float]:
    """Returns the headline of each static baseline at the gates."""
    records = [record for row in _rows(group) for record in row.records if record.recipe["prune"].get("mode") == "static"]
    return {_pair(record): record.value(record.pruned) for record in records}


def _over_static(row: Row, baseline: Mapping[tuple[Any, ...], float]) -> Spread | None:
    """Returns a row's difference to its static baseline over the seeds that both have; None for the baseline itself."""
    pairs = [(record.value(record.pruned), baseline.get(_pair(record))) for record in row.records]
    found = [value - other for value, other in pairs if other is not None]
    return Spread.of(found) if found and row.records[0].recipe["prune"].get("mode") != "static" else None


def routings(row: Row) -> list[Routing]:
    """Returns the observed routing of each of a row's runs."""
    found = [record.observed(Routing) for record in row.records]
    return [routing for routing in found if routing is not None]


def _estimates(row: Row) -> list[Predicted]:
    found = [record.observed(Predicted) for record in row.records]
    return [estimate for estimate in found if estimate is not None]


def _rows(group: Group) -> list[Row]:
    return [row for row in group.rows if row.family is FAMILY]


def _entries(row: Row, scale: float, baseline: Mapping[tuple[Any, ...], float]) -> list[Entry]:
    routes = routings(row)
    over = fmean(one.honest.std for one in routes)
    least, most = min(one.honest.min for one in routes), max(one.honest.max for one in routes)
    return [
        of_words(row.method),
        of_words(rule_of(row.records[0])),
        Entry(row.asked, Spread.of(one.honest.mean for one in routes).mean),
        of_words(row.settings),
        Entry(str(row.after.n), row.after.n),
        _r(row),
        _predicted(row, "honest"),
        of_spread(Spread.of(one.honest.mean for one in routes), 100),
        Entry(f"{100 * over:.2f}", over),
        Entry(f"{100 * least:.1f} to {100 * most:.1f}", most - least),
        _predicted(row, "paper"),
        of_spread(Spread.of(one.paper.mean for one in routes), 100),
        of_spread(row.after, scale),
        of_spread(_over_static(row, baseline), scale, signed=True),
        of_spread(Spread.of(one.agreement.precision for one in routes), 100),
        of_spread(Spread.of(one.agreement.recall for one in routes), 100),
        _routes(routes),
    ]


def _r(row: Row) -> Entry:
    each = [set(one.r.values()) if isinstance(one.r, dict) else {one.r} for one in _estimates(row) if one.r is not None]
    if not each or max(map(len, each)) > 1:
        return Entry("by layer" if each else "", 0.0)
    mean = fmean(value for values in each for value in values)
    return Entry(f"{mean:.4f}", mean)


def _predicted(row: Row, count: str) -> Entry:
    found = [getattr(one, count) for one in _estimates(row)]
    return of_spread(Spread.of(found) if found else None, 100)


def _routes(routes: list[Routing]) -> Entry:
    distinct, inputs = fmean(one.routes for one in routes), fmean(one.inputs for one in routes)
    return Entry(f"{distinct:,.0f} of {inputs:,.0f}", distinct)


# ----------------------------------------------------------------------------------------------------------- the figures
def pictures(group: Group) -> Iterator[Picture]:
    """Returns the figures of a task with dynamic runs."""
    yield Picture("flops", "the metric against FLOPs reduction, dynamic and static", savings_chart(group))
    yield Picture("gates", "kept and core filters of each layer", gates_chart(group))


def saved_points(rows: Sequence[Row]) -> list[Point]:
    """Returns the points of a line, least saved first; rows with no operations left are skipped."""
    found = [(row.reduction, row.after, row) for row in rows]
    return sorted(((x, y, row) for x, y, row in found if x is not None), key=lambda point: point[0].mean)


def lines_of(group: Group) -> dict[str, list[Point]]:
    """Returns the points of each line, dynamic and static; lines without any saving are left out."""
    found = {line: saved_points(rows) for line, rows in group.lines.items()}
    return {line: points for line, points in found.items() if any(x.mean > 0 for x, _, _ in points)}


def savings_chart(group: Group) -> Chart:
    """Returns the headline against the operations saved: dynamic runs solid, static ones dashed; error bars over seeds."""
    lines = []
    for number, (name, points) in enumerate(lines_of(group).items()):
        own = points[0][2].family is FAMILY
        lines.append(
            Line(
                name,
                [100 * x.mean for x, _, _ in points],
                [group.scale * y.mean for _, y, _ in points],
                x_error=[100 * (x.deviation or 0.0) for x, _, _ in points],
                y_error=[group.scale * (y.deviation or 0.0) for _, y, _ in points],
                notes=[f"{row.asked}, n = {row.after.n}" for _, _, row in points],
                method=points[0][2].method,
                look=replace(look(number), dash="solid" if own else "dash", hollow=not own),
            )
        )
    rules = [Rule(group.scale * row.after.mean, row.line, dash="dot") for row in group.baselines]
    panel = Panel(Axis(AXIS, unit=" % saved"), Axis(f"{group.headline}{group.in_unit}", unit=group.unit), lines, rules)
    return Chart(group.title, [panel], note="dotted: the dense model; dashed: static pruning")


def gates_chart(group: Group) -> Chart:
    """Returns the fraction of each layer's filters kept on average (solid) and always, the core (dotted), by budget."""
    budgets: dict[str, list[Row]] = {}
    for row in _rows(group):
        budgets.setdefault(row.asked, []).append(row)
    names = sorted({row.line for row in _rows(group)})
    panels = [
        Panel(
            Axis("gated layer", whole=True),
            Axis("fraction of filters", limits=(0, 1.02)),
            [line for row in rows for line in _gates(row, names.index(row.line))],
            title=asked,
        )
        for asked, rows in budgets.items()
    ]
    size = (9, 1.2 + 3 * len(panels))
    return Chart(group.title, panels, size=size, legend=4, height=160 + 240 * len(panels))


def _gates(row: Row, number: int) -> Iterator[Line]:
    """Returns the fractions of the filters of each layer that are kept and core, means over the runs."""
    layers = [routing.layers for routing in routings(row)]
    kept = np.mean([[layer.kept for layer in one] for one in layers], axis=0).tolist()
    core = np.mean([[layer.core / layer.filters for layer in one] for one in layers], axis=0).tolist()
    for name, values, size, dash in (("kept", kept, 4, "solid"), ("core", core, 3, "dot")):
        style = replace(look(number, size), dash=dash)
        yield Line(f"{row.line}: {name}", range(1, len(values) + 1), values, look=style, method=row.method)


FAMILY = Family(
    gated,
    method,
    asked,
    strength,
    left,
    shown=("prune.r", "prune.count", "prune.mode", "prune.rule"),
    patterned=False,
    check=check,
)
register(Section("dynamic", applies=lambda group: bool(_rows(group)), tables=tables, pictures=pictures, family=FAMILY))
