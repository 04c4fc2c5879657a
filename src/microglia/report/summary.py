"""The final table for a reader: accuracy, parameters, operations, measured time and bytes, dense beside pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from microglia.lab.result import typed_observations
from microglia.storage.observations import Observation

Json = Mapping[str, Any]
Row = tuple[str, Callable[[Json], Any], Callable[[Any], str]]
"""(label, reader of a moment's value, formatter of the value)."""
NAMES = {"top5": "top-5"}
"""Names of metrics in the table, if they differ from the metric's own name."""
UNITS = {"accuracy": "%", "top5": "%"}
"""Units of the metrics of classification, for results of versions without stored units."""
LAST_OF_MACS = "MACs of kept weights"


def result_table(result: Json) -> Table:
    """Returns the table of a run's result, as `microglia.lab.execute.execute` returns it or as ``result.json`` holds it."""
    told = typed_observations(result)
    columns = {name: dict(result[name]) for name in ("dense", "before", "pruned") if name in result}
    columns["pruned"]["saved"] = result.get("saved")
    whole = result["dense"]["macs"]["total"]
    for label, fraction in _computed(told).items():
        columns["dense"].setdefault("computed", {})[label] = whole
        columns["pruned"].setdefault("computed", {})[label] = fraction * whole
    asked = ", ".join(f"{k} {v:g}" for k, v in result["asked"].items() if v is not None) or "the pattern's own"
    recipe = result["recipe"]
    return comparison_table(
        columns,
        result.get("latency"),
        units=result.get("units"),
        title=f"{result['task']}: {recipe['method']}, {recipe['prune']['pattern']}, {recipe['prune'].get('scope', 'global')}",
        caption=f"asked: {asked}; {_kept(result, told)}. MACs (one multiply-add each) alone are theory.",
    )


def _computed(told: Mapping[str, Any]) -> dict[str, float]:
    return {label: value for one in told.values() if isinstance(one, Observation) for label, value in one.computed().items()}


def _kept(result: Json, told: Mapping[str, Any]) -> str:
    if removed := result.get("removed"):
        got = ", ".join(f"{term} {value:.4g}" for term, value in removed["got"].items() if term != "round_to")
        return f"got {got}, the channels removed physically" if got else "the channels removed physically"
    for one in told.values():
        if isinstance(one, Observation) and (words := one.kept(told)):
            return words
    masks = result["masks"]
    part = f"{masks['kept']:,} of {masks['total']:,} = {masks['kept'] / masks['total']:.6g}" if masks["total"] else "none"
    order = result.get("permutation")
    gained = f"; permuted, blocks hold {_percent(order['after'])} of |w|, not {_percent(order['before'])}" if order else ""
    return f"kept {part} of the prunable weights{gained}"


def comparison_table(
    columns: Mapping[str, Json],
    latency: Json | None,
    *,
    units: Mapping[str, str] | None = None,
    title: str,
    caption: str,
) -> Table:
    """Returns the table of several moments of one model, with the ratio of the first to the last.

    Args:
        columns: Name -> observation; if the first is dense, the others are relative to it.
        latency: Times of models by the same names, or None.
        units: Unit of each metric, ``%`` for a fraction that is shown in per cent; None for the usual ones.
        title: Title of the table.
        caption: Text below it.
    """
    names = list(columns)
    titles = ["before recovery" if name == "before" else name for name in names]
    table = Table("", *titles, f"{names[0]} / {names[-1]}", title=title, caption=caption)
    against = columns.get("dense")
    for label, read, show in [*_metrics(columns, units or {}), *_rows(columns)]:
        values = [read(_against(column, against)) for column in columns.values()]
        if all(value is None for value in values):
            continue
        changed = label in _RATIOS or label in _more(columns) or (label in _PHYSICAL and values[0] != values[-1])
        ratio = values[0] / values[-1] if changed and values[0] and values[-1] else None
        table.add_row(label, *("-" if v is None else show(v) for v in values), "" if ratio is None else f"{ratio:.2f}x")
    _add_latency(table, latency, names)
    return table


def _against(column: Json, dense: Json | None) -> Json:
    """Returns the observation with density and compression relative to the dense model: a shrunk one has no zeros."""
    if dense is None:
        return column
    own, whole = column["parameters"], dense["parameters"]
    left = own["all"] - own["prunable"] + own["kept"]
    ratios = {"density": own["kept"] / whole["prunable"], "compression": whole["all"] / left if left else None}
    return {**column, "parameters": {**own, **ratios}}


def measurement_table(name: str, measured: Json) -> Table:
    """Returns the table of one model's measurement."""
    table = Table("", "measured", title=name)
    for label, (before, after) in measured.get("shrunk_from", {}).items():
        table.add_row(f"{label}, dense / shrunk", f"{before:,} / {after:,} = {before / max(1, after):.2f}x")
    for label, read, show in [*_metrics({name: measured}, {}), *_ROWS]:
        value = read(measured)
        if value is not None:
            table.add_row(label, show(value))
    for execution, timing in ((measured.get("latency") or {}).get("timings", {}).get("model", {})).items():
        table.add_row(f"latency, {execution} (ms)", _time(timing))
    return table


def _metrics(columns: Mapping[str, Json], units: Mapping[str, str]) -> list[Row]:
    """Returns a row for every metric of any column."""
    names = dict.fromkeys(name for column in columns.values() for name in column.get("metrics", {}))
    return [
        (f"{NAMES.get(name, name)}, test", _metric(name), _percent if units.get(name, UNITS.get(name)) == "%" else _decimal)
        for name in names
    ]


def _metric(name: str) -> Callable[[Json], Any]:
    return lambda column: column.get("metrics", {}).get(name)


def _at(group: str, name: str) -> Callable[[Json], Any]:
    return lambda column: column[group][name]


def _own(label: str) -> Callable[[Json], Any]:
    return lambda column: column.get("computed", {}).get(label)


def _more(columns: Mapping[str, Json]) -> list[str]:
    """Returns the labels of a method's own counts of operations."""
    return list(dict.fromkeys(label for column in columns.values() for label in column.get("computed", {})))


def _rows(columns: Mapping[str, Json]) -> list[Row]:
    """Returns the rows of the table; the method's own counts are below the other operations."""
    more: list[Row] = [(label, _own(label), _count) for label in _more(columns)]
    place = next(number for number, (label, *_) in enumerate(_ROWS) if label == LAST_OF_MACS) + 1
    return [*_ROWS[:place], *more, *_ROWS[place:]]


def _decimal(value: float) -> str:
    return f"{value:.4f}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _count(value: float) -> str:
    return f"{value:,.0f}"


_ROWS: list[Row] = [
    ("parameters", _at("parameters", "all"), _count),
    ("  not zero", _at("parameters", "nonzero_all"), _count),
    ("density of prunable weights", _at("parameters", "density"), lambda v: f"{v:.4f}"),
    ("compression (all / left)", _at("parameters", "compression"), lambda v: f"{v:.2f}x"),
    ("MACs, all", _at("macs", "total"), _count),
    (LAST_OF_MACS, _at("macs", "effective"), _count),
    ("bytes of the weights alone, raw", _at("bytes", "raw"), _count),
    ("bytes of the weights alone, zipped", _at("bytes", "zipped"), _count),
    ("bytes of the saved model.safetensors", lambda column: column.get("saved"), _count),
]
_PHYSICAL = {"parameters", "MACs, all"}
_RATIOS = {
    "  not zero",
    LAST_OF_MACS,
    "bytes of the weights alone, raw",
    "bytes of the weights alone, zipped",
}


def _add_latency(table: Table, latency: Json | None, columns: list[str]) -> None:
    if latency is None:
        table.add_row("latency", *["not measured"] * len(columns), "")
        return
    timings, best = latency["timings"], latency["best"]
    for execution in dict.fromkeys(name for own in timings.values() for name in own):
        row = [timings.get(c, {}).get(execution) for c in columns]  # a model may have executions that the dense model lacks
        ratio = row[0]["median"] / row[-1]["median"] if row[0] and row[-1] else None
        label = f"latency, {execution}, batch {latency['batch']} (ms)"
        table.add_row(label, *("" if t is None else _time(t) for t in row), "" if ratio is None else f"{ratio:.2f}x")
    first, last = columns[0], columns[-1]
    fastest = timings[first][best[first]]["median"] / timings[last][best[last]]["median"]
    table.add_row("  best against best", *(best.get(c, "") for c in columns), f"{fastest:.2f}x", style="bold")
    table.caption = f"{table.caption}\n{latency['device']}, {latency['threads']} threads, torch {latency['torch_version']}."


def _time(timing: Json) -> str:
    return f"{timing['median']:.3f} ({timing['low']:.3f} .. {timing['high']:.3f})"
