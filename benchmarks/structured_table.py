"""Every way to remove channels from a trained network, on one bench: the rows of docs/structured/results.md.

All start from one trained network and keep --flops of its multiply-accumulates; all recover for --epochs epochs with the same
settings, in the same order of the data. A method that trains before its cut has as many epochs for that; the column `epochs` is
the sum. `scratch` trains the shape of the first row from fresh weights for its epochs: the control of all.

Every run is a directory under --runs and goes on where it stopped; a finished one is not repeated. The document is written anew
after each row. A method that refuses the network has its sentence in the row.

Run, for hours in the background: ``OMP_NUM_THREADS=1 python benchmarks/structured_table.py --checkpoint resnet56-4bfd9763.th``
``--limit 2`` takes two batches of each epoch, to see that it works: the numbers mean nothing then, and the document says so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

import microglia as mg
from microglia.core.errors import MicrogliaError
from microglia.graph import plan_of, replay
from microglia.lab.execute import execute, make_task
from microglia.lab.recipe import Recipe, method_config, resolve
from microglia.measure import count_macs
from microglia.measure.published import producer_macs
from microglia.methods import ChannelConfig, methods
from microglia.methods.procedure import train
from microglia.report.cells import Entry, markdown_table, of_spread, of_words
from microglia.report.spread import Spread
from microglia.storage.archive import load
from microglia.storage.files import write_atomic
from microglia.storage.run import Run
from microglia.train.evaluate import evaluate

SCORES = ("l2", "scale", "taylor-weights", "nisp", "lamp", "random")
"""Scores of the method `channels`: one row for each. `l1` and `taylor` are methods of their own."""
VARIANTS = ("edge", "random", "reverse")
"""Variants of HRank beside its own."""
SCRATCH = "scratch"
TITLES = (
    "method", "n", "before recovery, %", "after, %", "MACs, exact", "MACs, papers' count", "parameters", "ms", "epochs",
    "seconds",
)  # fmt: skip
PUBLISHED = (
    ("L1", "93.06", "90.90 M"), ("HRank", "93.52", "88.72 M"), ("HRank", "93.17", "62.72 M"), ("HRank", "90.72", "32.52 M"),
    ("GAL", "92.98", "78.3 M"), ("GAL", "90.36", "49.99 M"), ("He et al.", "90.80", "62.0 M"), ("NISP", "93.01", "81.0 M"),
    ("polarization", "93.83", "-47 %"), ("FPGM", "93.49", "-53 %"), ("SFP", "93.35", "-51 %"), ("slimming", "93.27", "-48 %"),
    ("DCP", "about 93.5", "-50 %"), ("group norm", "93.77", "-53 %"),
)  # fmt: skip
"""Method, accuracy and multiply-accumulates of ResNet-56 on CIFAR-10, as the papers print them."""
REACH = (
    "The dense network has 125.49 M multiply-accumulates by both counts. The published rows take 100 to 400 epochs, HRank 30 "
    "for each of 55 layers. A few epochs compare methods at one short budget, and can come near the rows of L1, NISP and HRank "
    "at about 90 M. They do not reach the rows at half of the operations: these wait for a GPU and --epochs of their length."
)


@dataclass(frozen=True)
class Row:
    """One method on one seed.

    Attributes:
        name: Name of the row.
        before: Accuracy after the cut, without recovery; None if the method has no such moment.
        after: Accuracy in the end.
        macs: Multiply-accumulates, exact.
        published: The same by the papers' count.
        parameters: All parameters.
        ms: Median milliseconds of the fastest execution of one image; None if it was not timed.
        epochs: Epochs of all trainings after the dense network.
        seconds: Duration of the run.
        refused: Sentence of a method that does not take the network; the numbers are 0 then.
    """

    name: str
    before: float | None = None
    after: float = 0.0
    macs: int = 0
    published: int = 0
    parameters: int = 0
    ms: float | None = None
    epochs: int = 0
    seconds: float = 0.0
    refused: str = ""


@dataclass(frozen=True)
class Bench:
    """What all rows have in common."""

    model: str
    data: str
    checkpoint: str | None
    flops: float
    epochs: int
    lr: float
    limit: int | None
    timed: bool
    runs: Path

    def source(self, seed: int) -> dict[str, Any]:
        """Returns the fields of a recipe that all rows share."""
        return {
            "model": self.model,
            "data": self.data,
            "checkpoint": self.checkpoint,
            "dense": {"epochs": self.epochs, "max_batches": self.limit},
            "train": {"epochs": self.epochs, "lr": self.lr, "max_batches": self.limit},
            "measure": {"latency": self.timed, "executions": ["eager", "packed"], "rounds": 30 if self.limit is None else 3},
            "seed": seed,
            "threads": 1,
        }

    def recipe(self, name: str, seed: int) -> Recipe:
        """Returns the recipe of a row."""
        method, prune = settings_of(name)
        return resolve({**self.source(seed), "method": method, "prune": {"flops": self.flops, **prune}})

    def row(self, name: str, seed: int) -> Row:
        """Returns a row, from its file or by running it."""
        kept = self.runs / f"{name}-{seed}" / "row.json"
        if kept.exists():
            return Row(**json.loads(kept.read_text()))
        try:
            row = self.scratch(seed) if name == SCRATCH else self.made(name, seed)
        except MicrogliaError as error:
            row = Row(name, refused=str(error))
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, json.dumps(asdict(row), indent=1) + "\n")
        return row

    def made(self, name: str, seed: int) -> Row:
        """Runs a method."""
        recipe = self.recipe(name, seed)
        result = execute(recipe, self.place(name, seed), starts=self.runs / "starts")
        config = method_config(recipe)
        before_cut = getattr(config, "sparse", None)
        return Row(
            name,
            before=None if result.before is None else result.before.metrics[result.headline],
            after=result.pruned.metrics[result.headline] or 0.0,
            macs=result.pruned.macs.total,
            published=self.published(name, seed),
            parameters=result.pruned.parameters.all,
            ms=result.latency.best("pruned")[1].median if result.latency is not None else None,
            epochs=config.train.epochs + (before_cut.epochs if before_cut is not None else 0),
            seconds=result.seconds,
        )

    def place(self, name: str, seed: int) -> Path:
        """Returns the directory of a run."""
        return self.runs / f"{name}-{seed}" / "run"

    def published(self, name: str, seed: int) -> int:
        """Returns the multiply-accumulates of a finished run's model by the papers' count."""
        task = make_task(self.recipe(name, seed))
        plan = plan_of(load(self.place(name, seed) / "model", task.build()))
        filters = {weight: (before[0], after[0]) for weight, (before, after) in plan.shapes.items() if before}
        return producer_macs(count_macs(task.build(), task.example), filters)

    def scratch(self, seed: int) -> Row:
        """Trains the shape of the first row from fresh weights, as long as that row was trained."""
        first = self.row(SCORES[0], seed)
        if first.refused:
            return Row(SCRATCH, refused=f"There is no shape to train: {first.refused}")
        begun = time.perf_counter()
        task = make_task(self.recipe(SCORES[0], seed))
        plan = plan_of(load(self.place(SCORES[0], seed) / "model", task.build()))
        torch.manual_seed(seed)
        small = replay(make_task(resolve({**self.source(seed), "checkpoint": None})).build(), plan)
        run = Run(self.place(SCRATCH, seed), {"scratch": self.source(seed)}, seed=seed)
        try:
            train(task, run, "scratch", small, mg.FitConfig(epochs=first.epochs, max_batches=self.limit))
        finally:
            run.close()
        accuracy = float(evaluate(small, task, "test")[task.headline])
        seconds = round(time.perf_counter() - begun, 2)
        return replace(first, name=SCRATCH, before=None, after=accuracy, seconds=seconds)


def settings_of(name: str) -> tuple[str, dict[str, Any]]:
    """Returns the method of a row and the settings that it adds."""
    if name in SCORES:
        return "channels", {"score": name, "scope": "uniform", "round_to": 1}
    if name.startswith("hrank-"):
        return "hrank", {"variant": name.removeprefix("hrank-")}
    return name, {}


def names_of_rows() -> list[str]:
    """Returns every row: the scores, each registered method that removes channels by a config of its own, and the control."""
    own = [
        name for name, method in methods.items() if issubclass(method.config, ChannelConfig) and method.original in ("", name)
    ]
    return [*SCORES, *sorted(own), "ddnp", *(f"hrank-{variant}" for variant in VARIANTS), SCRATCH]


def document(bench: Bench, found: Sequence[Row]) -> str:
    """Returns the document of all rows so far."""
    by_name: dict[str, list[Row]] = {}
    for row in found:
        by_name.setdefault(row.name, []).append(row)
    kept = [rows for rows in by_name.values() if not rows[0].refused]
    kept.sort(key=lambda rows: -sum(row.after for row in rows) / len(rows))
    lines = [
        f"# Removing channels: {bench.model} on {bench.data}",
        "",
        f"All rows start from the same weights and keep {100 * bench.flops:g} % of the multiply-accumulates. All recover for "
        f"{bench.epochs} epochs at a learning rate of {bench.lr:g}, in the same order of the data. The exact count is that of "
        "the smaller model; the papers' count leaves out that layers read fewer channels. Written by "
        "`benchmarks/structured_table.py`.",
        "",
    ]
    if bench.limit is not None:
        lines += [
            f"**A trial of {bench.limit} batches in each epoch: it shows that the bench works, and the numbers mean nothing.**",
            "",
        ]
    lines += [*markdown_table(TITLES, map(_entries, kept), TITLES[:1]), ""]
    refused = [rows[0] for rows in by_name.values() if rows[0].refused]
    lines += [f"- `{row.name}`: {row.refused}" for row in refused] + ([""] if refused else [])
    if bench.model == "resnet56":
        published = [list(map(of_words, row)) for row in PUBLISHED]
        titles = ("method", "accuracy, %", "MACs, papers' count")
        lines += ["## As published", "", REACH, "", *markdown_table(titles, published, titles[:1]), ""]
    return "\n".join(lines)


def _entries(rows: Sequence[Row]) -> list[Entry]:
    before = [row.before for row in rows if row.before is not None]
    times = [row.ms for row in rows if row.ms is not None]
    mean = {
        name: sum(getattr(row, name) for row in rows) / len(rows) for name in ("macs", "published", "parameters", "seconds")
    }
    return [
        of_words(rows[0].name),
        Entry(str(len(rows)), len(rows)),
        of_spread(Spread.of(before) if before else None, 100),
        of_spread(Spread.of(row.after for row in rows), 100),
        *(Entry(f"{mean[name] / 1e6:.2f} M", mean[name]) for name in ("macs", "published")),
        Entry(f"{mean['parameters'] / 1e6:.3f} M", mean["parameters"]),
        Entry(f"{median(times):.2f}" if times else "", median(times) if times else 0.0),
        Entry(str(rows[0].epochs), rows[0].epochs),
        Entry(f"{mean['seconds']:,.0f}", mean["seconds"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--checkpoint")
    parser.add_argument("--flops", type=float, default=0.5, help="kept fraction of the multiply-accumulates")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=names_of_rows(), default=names_of_rows(), metavar="NAME")
    parser.add_argument("--limit", type=int, help="batches in an epoch, for a trial")
    parser.add_argument("--untimed", action="store_true", help="leave the milliseconds out")
    parser.add_argument("--runs", type=Path, default=Path("runs/structured"))
    parser.add_argument("--document", type=Path, default=Path("docs/structured/results.md"))
    asked = parser.parse_args()
    bench = Bench(
        asked.model,
        asked.data,
        asked.checkpoint,
        asked.flops,
        asked.epochs,
        asked.lr,
        asked.limit,
        not asked.untimed,
        asked.runs,
    )
    asked.document.parent.mkdir(parents=True, exist_ok=True)
    found: list[Row] = []
    for seed in asked.seeds:
        for name in asked.methods:
            found.append(bench.row(name, seed))
            write_atomic(asked.document, document(bench, found))
            told = found[-1].refused or f"{100 * found[-1].after:.2f} %"
            Console().print(f"{name}, seed {seed}: {told}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
