"""Claim: half of the channels of any traceable model can be removed, with outputs equal to the masked model's.

Each model is built with random weights and non-trivial norm statistics (`models.randomize`). Ours: `prune_channels` to half of
every channel group (no rounding), then
- equal: the plan's largest error at any node in float64, and, recomputed here on other inputs in float32, that of the final
  outputs. ``z``: against the user's own model with the removed entries zeroed. ``r``: where norms or means run over what is
  left, so that zeroing is another function, against the library's masked reference.
- train: forward and backward in training mode, every gradient finite (``-``: the dense model cannot do it alone either);
- saved: `save`, then `load` into a freshly built model, equal in every bit;
- compiled: `torch.compile(fullgraph=True)` with equal outputs; not part of OK (``-``: nor does the dense model compile).
OK means pruned (at least one group), equal, trained and reloaded. Beside it ``keep_class=True``, and Torch-Pruning with its
defaults (`BasePruner`, group magnitude, ratio 0.5, the heads named for it), OK when it removed something and a forward and
backward pass in training mode follows; whether its outputs are right is not asked. Seconds are those of the pruning alone, ours
with tracing and verification.

Both sides run in the same worker process, one model after another, after a warm-up of each. ``--limit`` holds for each step of
each side (build, prune, each check); a worker past it is killed, the step counts as failed, and the next side starts in a new
worker. Run: ``python benchmarks/shrink_coverage.py --set core``
"""
# ruff: noqa: D102

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import importlib.util
import json
import multiprocessing
import statistics
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from coverage_worker import serve
from models import cases
from timm_families import left_out

SETS = ("core", "transformers", "detection", "families")
START = 120.0
"""Seconds a new worker may take to import and warm up."""

Row = dict[str, Any]


class Worker:
    """A process that prunes models one after another, replaced when it hangs or dies."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["coverage_worker", "transformers"])
        self.connection: Connection | None = None

    def start(self) -> Connection:
        self.connection, other = self.context.Pipe()
        self.process = self.context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        if not self.connection.poll(START) or self.connection.recv() != {}:
            raise SystemExit("the worker process does not start")
        return self.connection

    def stop(self) -> None:
        if self.connection is not None:
            self.connection.send(None)
            self.process.join(10)
        self.kill()

    def kill(self) -> None:
        if self.connection is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.connection = None

    def ask(self, row: Row, job: str, options: Row, limit: float) -> None:
        """Adds what one job finds out to a row."""
        connection = self.connection or self.start()
        try:
            connection.send((row["set"], row["name"], job, options))
            while connection.poll(limit):
                if (update := connection.recv()) is None:
                    return
                row |= update
            row[f"{job}_why"] = f"no end within {limit:g} s"
        except (EOFError, ConnectionError):
            row[f"{job}_why"] = "the process died"
        self.kill()


def judge(row: Row) -> None:
    """Adds whether each side succeeded, and why not."""
    checks = ["equal", "saved", *(["train"] if row.get("trains") else [])]
    row["ok"] = bool(row.get("groups_pruned")) and all(row.get(check) for check in checks)
    row["theirs_ok"] = bool(row.get("theirs_prune") and row.get("theirs_runs") and row.get("theirs_kept", 1) < 1)
    if row.get("groups_pruned") == 0:
        row["ours_why"] = "nothing to prune was found"
    if row.get("theirs_prune") and row.get("theirs_kept") == 1:
        row["theirs_why"] = "removed nothing"


COLUMNS = (
    ("model", 42), ("size", 5), ("OK", 4), ("traced", 7), ("groups", 7), ("pruned", 7), ("kind", 7), ("params", 7), ("MACs", 6),
    ("error64", 9), ("error32", 10), ("train", 6), ("saved", 6), ("compiled", 9), ("s", 6), ("keep_class", 11), ("TP", 4),
    ("params", 7), ("s", 6),
)  # fmt: skip

REFERENCES = {"zeroed": "z", "masked": "r"}


def mark(value: Any) -> str:
    return {True: "yes", False: "NO", None: ""}[value]


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def seconds(row: Row, key: str) -> str:
    return f"{row[key]:.1f}" if key in row else ""


def line(row: Row) -> str:
    error64 = f"{row['error64']:.0e}" if "error64" in row else ""
    error32 = f"{row['error32']:.0e} {REFERENCES[row['reference']]}" if "error32" in row else mark(row.get("equal"))
    train = mark(row.get("train")) if row.get("trains") or "prune" not in row else "-"
    compiled = "-" if row.get("dense_compiled") is False else mark(row.get("compiled"))
    keep = percent(row.get("keep_class_kept")) if row.get("keep_class") else mark(row.get("keep_class"))
    cells = [
        row["name"], str(row.get("size", "")), mark(row["ok"]), mark(row.get("traced")), str(row.get("groups", "")),
        str(row.get("groups_pruned", "")), row.get("kind", ""), percent(row.get("params_kept")), percent(row.get("macs_kept")),
        error64, error32, train, mark(row.get("saved")), compiled, seconds(row, "prune_seconds"), keep,
        mark(row.get("theirs_ok")) if "asked_theirs" in row else "",
        percent(row.get("theirs_kept")) if row["theirs_ok"] else "", seconds(row, "theirs_prune_seconds"),
    ]  # fmt: skip
    text = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, (_, w)) in enumerate(zip(cells, COLUMNS, strict=True))]
    reasons = [f"      {key.removesuffix('_why')}: {value[:220]}" for key, value in row.items() if key.endswith("_why")]
    return "\n".join(["".join(text), *reasons])


def run(names: Sequence[tuple[str, str]], arguments: argparse.Namespace) -> list[Row]:
    worker, rows = Worker(), []
    jobs = ["ours", *([] if arguments.no_keep_class else ["keep_class"]), *(["theirs"] if arguments.torch_pruning else [])]
    options = {"compile": None if arguments.no_compile else arguments.compile_backend}
    header = (name.ljust(w) if i == 0 else name.rjust(w) for i, (name, w) in enumerate(COLUMNS))
    print("".join(header), flush=True)
    for family, name in names:
        row: Row = {"set": family, "name": name}
        for job in jobs:
            row[f"asked_{job}"] = True
            worker.ask(row, job, options, arguments.limit)
        judge(row)
        rows.append(row)
        print(line(row), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1, default=str) + "\n")
    worker.stop()
    return rows


def median(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.median(found):.2f}" if found else ""


def summary(rows: list[Row]) -> Table:
    """Returns one line per set."""
    titles = "set,models,ours OK,keep_class,compiled,error64 <=,error32 <=,s (median),TP OK,TP s,ours / TP s,ours slower"
    table = Table(title="Half of the channels; ours / TP s: median where both succeed")
    for title in titles.split(","):
        table.add_column(title, justify="left" if title == "set" else "right")
    for family in [s for s in SETS if any(row["set"] == s for row in rows)] + ["all"]:
        own = [row for row in rows if family in (row["set"], "all")]
        both = [row["prune_seconds"] / row["theirs_prune_seconds"] for row in own if row["ok"] and row["theirs_ok"]]
        largest = [max((row[key] for row in own if key in row), default=0.0) for key in ("error64", "error32")]
        counts = [sum(bool(row.get(key)) for row in own) for key in ("ok", "keep_class", "compiled", "theirs_ok")]
        table.add_row(
            family, str(len(own)), *map(str, counts[:3]), *(f"{error:.0e}" for error in largest),
            median(row["prune_seconds"] for row in own if row["ok"]), str(counts[3]),
            median(row["theirs_prune_seconds"] for row in own if row["theirs_ok"]),
            median(both), str(sum(ratio > 1 for ratio in both)),
        )  # fmt: skip
    return table


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", default=["core"], choices=[*SETS, "all"], help="core by default")
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB", help="only names that contain one of these")
    parser.add_argument("--limit", type=float, default=60.0, metavar="SECONDS", help="for each step of each side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows are written, after every model")
    parser.add_argument(
        "--most", type=float, default=40.0, metavar="MILLIONS", help="of parameters, in the set of timm's families"
    )
    parser.add_argument("--no-torch-pruning", action="store_true")
    parser.add_argument("--no-keep-class", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--compile-backend", default="aot_eager", metavar="NAME", help="aot_eager or inductor")
    arguments = parser.parse_args()
    arguments.torch_pruning = not arguments.no_torch_pruning and importlib.util.find_spec("torch_pruning") is not None
    return arguments


def main() -> None:
    arguments = read_arguments()
    chosen = SETS if "all" in arguments.set else tuple(s for s in SETS if s in arguments.set)
    names = [(family, case.name) for family in chosen for case in cases(family, arguments.most * 1e6)]
    names = [(f, name) for f, name in names if any(fnmatch.fnmatch(name, f"*{glob}*") for glob in arguments.models)]
    peer = importlib.metadata.version("torch-pruning") if arguments.torch_pruning else "left out"
    if not arguments.torch_pruning and not arguments.no_torch_pruning:
        peer = "not installed (pip install 'microglia[bench]')"
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torchvision", "timm", "transformers"))
    print(f"torch {torch.__version__}, {libraries}, {torch.get_num_threads()} threads; Torch-Pruning (TP): {peer}")
    if "families" in chosen:
        print("Families left out (see --most):", "; ".join(left_out(arguments.most * 1e6)))
    rows = run(names, arguments)
    Console(width=150).print(summary(rows))
    print(f"ratio: {sum(row['ok'] for row in rows) / max(1, len(rows)):.4f}")


if __name__ == "__main__":
    main()
