"""The final table a person reads: accuracy, parameters, operations, measured time and bytes, dense beside pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

Json = Mapping[str, Any]


def result_table(result: Json) -> Table:
    """Returns the table of a run's result (see `microglia.lab.execute.execute`)."""
    columns = [name for name in ("dense", "before", "pruned") if name in result]
    titles = {"dense": "dense", "before": "before recovery", "pruned": "pruned"}
    asked = ", ".join(f"{k} {v:g}" for k, v in result["asked"].items() if v is not None) or "the pattern's own"
    masks = result["masks"]
    got = f"{masks['kept']:,} of {masks['total']:,} = {masks['kept'] / masks['total']:.6g}" if masks["total"] else "none"
    recipe = result["recipe"]
    table = Table(
        "",
        *(titles[c] for c in columns),
        "dense / pruned",
        title=f"{result['task']}: {recipe['method']}, {recipe['prune']['pattern']}, {recipe['prune']['scope']}",
        caption=f"asked: {asked}; kept {got} of the prunable weights. MACs (one multiply-add each) alone are theory.",
    )
    for label, read, show in _ROWS:
        values = [read(result[column]) for column in columns]
        if all(value is None for value in values):
            continue
        ratio = values[0] / values[-1] if columns[0] == "dense" and label in _RATIOS and values[-1] else None
        table.add_row(label, *("-" if v is None else show(v) for v in values), "" if ratio is None else f"{ratio:.2f}x")
    _add_latency(table, result.get("latency"), columns)
    return table


def measurement_table(name: str, measured: Json) -> Table:
    """Returns the table of one model's measurement."""
    table = Table("", "measured", title=name)
    for label, read, show in _ROWS:
        value = read(measured)
        if value is not None:
            table.add_row(label, show(value))
    for execution, timing in ((measured.get("latency") or {}).get("timings", {}).get("model", {})).items():
        table.add_row(f"latency, {execution} (ms)", _time(timing))
    return table


def _metric(name: str) -> Callable[[Json], Any]:
    return lambda column: column.get("metrics", {}).get(name)


def _at(group: str, name: str) -> Callable[[Json], Any]:
    return lambda column: column[group][name]


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _count(value: float) -> str:
    return f"{value:,.0f}"


_ROWS: list[tuple[str, Callable[[Json], Any], Callable[[Any], str]]] = [
    ("accuracy, test", _metric("accuracy"), _percent),
    ("top-5, test", _metric("top5"), _percent),
    ("loss, test", _metric("loss"), lambda v: f"{v:.4f}"),
    ("parameters", _at("parameters", "all"), _count),
    ("  not zero", _at("parameters", "nonzero_all"), _count),
    ("density of prunable weights", _at("parameters", "density"), lambda v: f"{v:.4f}"),
    ("compression (all / left)", _at("parameters", "compression"), lambda v: f"{v:.2f}x"),
    ("MACs, all", _at("macs", "total"), _count),
    ("MACs of kept weights", _at("macs", "effective"), _count),
    ("bytes on disk, raw", _at("bytes", "raw"), _count),
    ("bytes on disk, zipped", _at("bytes", "zipped"), _count),
]
_RATIOS = {"  not zero", "MACs of kept weights", "bytes on disk, raw", "bytes on disk, zipped"}


def _add_latency(table: Table, latency: Json | None, columns: list[str]) -> None:
    if latency is None:
        table.add_row("latency", *["not measured"] * len(columns), "")
        return
    timings, best = latency["timings"], latency["best"]
    for execution in timings["dense"]:
        row = [timings.get(c, {}).get(execution) for c in columns]
        ratio = row[0]["median"] / row[-1]["median"] if row[0] and row[-1] else None
        label = f"latency, {execution}, batch {latency['batch']} (ms)"
        table.add_row(label, *("" if t is None else _time(t) for t in row), "" if ratio is None else f"{ratio:.2f}x")
    fastest = timings["dense"][best["dense"]]["median"] / timings["pruned"][best["pruned"]]["median"]
    table.add_row("  best against best", *(best.get(c, "") for c in columns), f"{fastest:.2f}x", style="bold")
    table.caption = f"{table.caption}\n{latency['device']}, {latency['threads']} threads, torch {latency['torch_version']}."


def _time(timing: Json) -> str:
    return f"{timing['median']:.3f} ({timing['low']:.3f} .. {timing['high']:.3f})"
