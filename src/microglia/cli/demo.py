"""The command `demo`: three roads of pruning on real digits, and one table of milliseconds, bytes and accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from microglia.cli.app import command
from microglia.cli.options import Json, Shown
from microglia.lab.accelerating import accelerated
from microglia.lab.execute import execute
from microglia.lab.recipe import resolve
from microglia.lab.target import open_target
from microglia.measure import measure_latency

BATCH = 32
"""Images of a timed call: one 8x8 image is so little work that only call overhead would be timed."""
EXECUTIONS = ("eager", "packed", "compiled")
BASE = {
    "model": "conv-2",
    "data": "digits",
    "dense": {"epochs": 12, "lr": 0.05, "batch_size": 64},
    "train": {"epochs": 8, "lr": 0.02, "batch_size": 64},
    "device": "cpu",
}
ROADS: dict[str, dict[str, Any]] = {
    "masks": {
        "method": "magnitude",
        "prune": {"density": 0.1, "scope": "global"},
        "measure": {"batch": BATCH, "executions": ["eager", "packed"]},
    },
    "channels": {"method": "channels", "prune": {"flops": 0.25}, "measure": {"latency": False}},
    "blocks": {
        "method": "magnitude",
        "prune": {"density": 0.2, "scope": "layer", "pattern": "block:16x1"},
        "measure": {"latency": False},
    },
}
"""Settings of each road, added to `BASE`. They share one dense network, which the first trains."""
STARTS = ".starts"
PLACES = {"masks": ".", "channels": "channels", "blocks": "blocks"}
"""Directory of each run in the directory of the demo."""


def demo(
    out: Annotated[Path, typer.Option(help="Directory of the three runs; the same command resumes there.")] = Path("runs/demo"),
    json_: Json = False,
) -> Shown:
    """Take all three roads on real 8x8 digits: masks, removed channels, accelerated blocks; one table."""
    results = {
        road: execute(resolve({**BASE, **recipe}), out / PLACES[road], starts=out / STARTS) for road, recipe in ROADS.items()
    }
    latency, record = _timed(out)
    value = {"roads": results, "latency": latency, "accelerated": record}
    agreed = record["agreement"]
    lines = [
        "masks: a tenth of the weights is left. Zeros make the zipped file small; dense kernels multiply by them all the same.",
        "channels: a quarter of the operations is left. What is left is an ordinary dense model, for any engine.",
        "blocks: a fifth of the blocks of 16 outputs x 1 input is left, and kernels skip the zeros: `accelerate` picks them.",
        f"Accelerated, {agreed['equal']} of {agreed['images']} test images are classified as by the masked model.",
        f"Each model was saved, loaded again and is equal to the one in memory, bit for bit: {out / 'model'}",
        f"Recipe, metrics, result: {out}/recipe.yaml, metrics.jsonl, result.json; likewise in {out}/channels and {out}/blocks",
        f"Go on: microglia eval {out}   |   microglia report {out} --out {out}/report",
    ]
    return value, [_table(results, latency), *lines]


def _timed(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the times of all models, interleaved in this process, and the record of the accelerated one."""
    opened = {road: open_target(str(out / place)) for road, place in PLACES.items()}
    models = {road: model for road, (model, _) in opened.items()}
    task = opened["blocks"][1]
    fast, record = accelerated(models["blocks"], task, BATCH, against=EXECUTIONS)
    example = task.example.repeat(BATCH, *[1] * (task.example.ndim - 1))
    ready = {"blocks": {"accelerated": lambda: fast(example)}}
    report = measure_latency({"dense": task.build(), **models}, example, executions=EXECUTIONS, ready=ready, rounds=30)
    return report.to_dict(), record


def _table(results: Mapping[str, Mapping[str, Any]], latency: Mapping[str, Any]) -> Table:
    """Returns the table: a row for each road, with measured numbers only."""
    table = Table(
        "", "accuracy, %", "zipped bytes", f"ms, batch {latency['batch']}", "execution", title="conv-2 on real 8x8 digits"
    )
    told = {"dense": results["masks"]["dense"], **{road: result["pruned"] for road, result in results.items()}}
    dense_bytes, dense_ms = told["dense"]["bytes"]["zipped"], _best(latency, "dense")
    for name, seen in told.items():
        zipped, ms = seen["bytes"]["zipped"], _best(latency, name)
        ratios = ("", "") if name == "dense" else (f" ({dense_bytes / zipped:.1f}x)", f" ({dense_ms / ms:.2f}x)")
        accuracy = f"{100 * seen['metrics']['accuracy']:.1f}"
        table.add_row(name, accuracy, f"{zipped:,}{ratios[0]}", f"{ms:.3f}{ratios[1]}", latency["best"][name])
    table.caption = (
        "Test accuracy; median ms of interleaved rounds, each in its fastest execution.\n"
        f"{latency['device']}, {latency['threads']} threads, torch {latency['torch_version']}."
    )
    return table


def _best(latency: Mapping[str, Any], name: str) -> float:
    return float(latency["timings"][name][latency["best"][name]]["median"])


command(demo, example="microglia demo --out runs/demo")
