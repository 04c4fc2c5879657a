"""Every way to remove channels from a trained network, on one bench: the rows of docs/structured/results.md.

All start from one trained network and keep --flops of its multiply-accumulates; all recover for --epochs epochs with the same
settings, in the same order of the data. A method that trains before its cut has as many epochs for that; the column `epochs` is
the sum. A method that removes channels while it trains has only one training. `scratch` trains the shape of the first row from
fresh weights for its epochs: the control of all.

Every run is a directory under --runs and goes on where it stopped. A finished row is kept in --results, one file for each
network and setting, and is not run again, also on a machine without the runs. The document holds the tables of all these
files, and HRank's claims as `hrank_claims.py` measured them; it is written anew after each row, and by --write alone. Two
processes may share the files if their --methods or --seeds differ. A method that refuses the network has its sentence.

Times of rows that ran beside other work are not comparable: leave them out with ``--untimed``, and time all models of a table
side by side with ``--times`` when the machine is free.

Run, for hours in the background: ``OMP_NUM_THREADS=1 python benchmarks/structured_table.py --checkpoint resnet56-4bfd9763.th``
``--limit 2`` takes two batches of each epoch and a few candidates of each search, to see that it works: the numbers mean
nothing then, and the document says so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import microglia as mg
from microglia.core.errors import DataError, FileError, MicrogliaError, MissingLibraryError
from microglia.core.timing import processor_name
from microglia.graph import plan_of, replay
from microglia.lab.execute import execute, make_task
from microglia.lab.recipe import Recipe, method_config, resolve
from microglia.measure import count_macs, measure_latency
from microglia.measure.published import producer_macs
from microglia.methods import ChannelConfig, UnitConfig, methods
from microglia.methods.procedure import train
from microglia.report.read import METRICS
from microglia.storage.archive import load
from microglia.storage.files import write_atomic
from microglia.storage.run import DENSE_STAGES, Run, RunError
from microglia.train.evaluate import evaluate
from structured_rows import Row, claims_in, document, locked, read, tables_in
from trial import shortened

SCORES = ("l2", "scale", "taylor-weights", "nisp", "lamp", "random")
"""Scores of the method `channels`: one row for each. `l1` and `taylor` are methods of their own."""
GLOBAL = "l2-global"
"""The score `l2`, all groups in one order."""
VARIANTS = ("edge", "random", "reverse")
"""Variants of HRank beside its own."""
SCRATCH = "scratch"
TIMED_IN = ("eager", "packed", "onnxruntime", "openvino")
"""Executions that are timed; the fastest counts."""
OF_THE_MACHINE = (RunError, FileError, DataError, MissingLibraryError)
"""Errors that say nothing of a method, such as another process on the same row: its row stays open."""


@dataclass(frozen=True)
class Bench:
    """What all rows have in common.

    Attributes:
        model: Name of the network.
        data: Name of the data.
        checkpoint: File of the trained weights; None trains the network first.
        flops: Kept fraction of the multiply-accumulates.
        epochs: Epochs of each training.
        lr: Learning rate of the recovery.
        limit: Batches in an epoch, for a trial.
        timed: Whether models are timed.
        runs: Directory of the runs.
        results: Directory of the rows; that of the runs where left out.
        precision: Precision of every training, as in `FitConfig`.
    """

    model: str
    data: str
    checkpoint: str | None
    flops: float
    epochs: int
    lr: float
    limit: int | None
    timed: bool
    runs: Path
    results: Path | None = None
    precision: str = "float32"

    @property
    def setting(self) -> dict[str, Any]:
        """What the rows of one file share, JSON-ready."""
        return {
            "model": self.model,
            "data": self.data,
            "checkpoint": None if self.checkpoint is None else Path(self.checkpoint).name,
            "flops": self.flops,
            "epochs": self.epochs,
            "lr": self.lr,
            "limit": self.limit,
            "precision": self.precision,
        }

    @property
    def steps(self) -> dict[str, Any]:
        """What the steps of all trainings share."""
        return {"max_batches": self.limit, "precision": self.precision}

    @property
    def file(self) -> Path:
        """The file of the finished rows."""
        trial = "" if self.limit is None else "-trial"
        return (self.results or self.runs) / f"{self.model}-{100 * self.flops:g}{trial}.json"

    def kept(self) -> list[Row]:
        """Returns the finished rows.

        Raises:
            SystemExit: The file holds rows of other settings.
        """
        if not self.file.exists():
            return []
        setting, rows = read(self.file)
        if setting != self.setting:
            other = [f"{key} {setting.get(key)!r}" for key, value in self.setting.items() if setting.get(key) != value]
            raise SystemExit(f"{self.file} holds rows of other settings ({', '.join(other)}): give another --results.")
        return rows

    def keep(self, row: Row) -> None:
        """Adds a finished row to the file; another process may do the same."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.runs.mkdir(parents=True, exist_ok=True)
        with locked(self.runs / ".rows.lock"):
            self.write([*self.kept(), row])

    def time(self, rounds: int = 30) -> None:
        """Times the models of all finished rows side by side in one process; a row without its run has no time then."""
        rows = self.kept()
        if not rows:
            raise SystemExit(f"{self.file} holds no finished row to time: run some methods first.")
        shapes = [(SCORES[0] if row.name == SCRATCH else row.name, row.seed) for row in rows]  # one trains another's shape
        places = [place for shape in shapes if (place := self.place(*shape) / "model").exists()]
        task = make_task(self.recipe(SCORES[0], 0))
        built = {str(place.parent): load(place, task.build()) for place in places}
        times: dict[str, float] = {}
        if built:
            report = measure_latency(built, task.example, executions=TIMED_IN, rounds=rounds)
            times = {place: report.best(place)[1].median for place in built}
        ms = [times.get(str(self.place(*shape))) for shape in shapes]
        self.write([replace(row, ms=own) for row, own in zip(rows, ms, strict=True)])

    def write(self, rows: Sequence[Row]) -> None:
        """Writes the file of the finished rows."""
        machine = {"processor": processor_name(), "torch": torch.__version__, "microglia": mg.__version__}
        found = {"setting": self.setting, "machine": machine, "rows": [asdict(row) for row in rows]}
        write_atomic(self.file, json.dumps(found, indent=1) + "\n")

    def source(self, seed: int) -> dict[str, Any]:
        """Returns the fields of a recipe that all rows share."""
        return {
            "model": self.model,
            "data": self.data,
            "checkpoint": self.checkpoint,
            "dense": {"epochs": self.epochs, **self.steps},
            "train": {"epochs": self.epochs, "lr": self.lr, **self.steps},
            "measure": {
                "latency": self.timed,  # untimed runs keep the recipe of earlier ones, so that those can be resumed
                "executions": list(TIMED_IN if self.timed else TIMED_IN[:2]),
                "rounds": 30 if self.limit is None else 3,
            },
            "seed": seed,
            "threads": 1,
        }

    def recipe(self, name: str, seed: int) -> Recipe:
        """Returns the recipe of a row at its full length of search."""
        method, prune = settings_of(name, self.epochs)
        return resolve({**self.source(seed), "method": method, "prune": {"flops": self.flops, **prune}})

    def row(self, name: str, seed: int) -> Row:
        """Returns a row, from the file or by running it."""
        for row in self.kept():
            if (row.name, row.seed) == (name, seed):
                return row
        try:
            row = self.scratch(seed) if name == SCRATCH else self.made(name, seed)
        except OF_THE_MACHINE:
            raise
        except MicrogliaError as error:
            row = Row(name, seed, refused=str(error))
        self.keep(row)
        return row

    def made(self, name: str, seed: int) -> Row:
        """Runs a method."""
        recipe = self.recipe(name, seed)
        run = recipe if self.limit is None else shortened(recipe)
        result = execute(run, self.place(name, seed), starts=self.runs / "starts")
        return Row(
            name,
            seed,
            before=None if result.before is None else result.before.metrics[result.headline],
            after=result.pruned.metrics[result.headline] or 0.0,
            macs=result.pruned.macs.total,
            published=self.published(name, seed),
            parameters=result.pruned.parameters.all,
            ms=result.latency.best("pruned")[1].median if result.latency is not None else None,
            epochs=epochs_of(method_config(recipe)),
            seconds=max(result.seconds, self.logged(name, seed)),
        )

    def logged(self, name: str, seed: int) -> float:
        """Returns the seconds of a run's logged epochs, also of killed attempts, without those of its dense network."""
        file = self.place(name, seed) / METRICS
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return round(sum(row.get("seconds", 0.0) for row in rows if row["stage"] != DENSE_STAGES[0]), 2)

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
            return Row(SCRATCH, seed, refused=f"There is no shape to train: {first.refused}")
        if not self.place(SCORES[0], seed).exists():  # the row was kept on another machine
            self.made(SCORES[0], seed)
        begun = time.perf_counter()
        task = make_task(self.recipe(SCORES[0], seed))
        plan = plan_of(load(self.place(SCORES[0], seed) / "model", task.build()))
        torch.manual_seed(seed)
        small = replay(make_task(resolve({**self.source(seed), "checkpoint": None})).build(), plan)
        run = Run(self.place(SCRATCH, seed), {"scratch": self.source(seed)}, seed=seed)
        try:
            train(task, run, "scratch", small, mg.FitConfig(epochs=first.epochs, **self.steps))
        finally:
            run.close()
        accuracy = float(evaluate(small, task, "test")[task.headline])
        seconds = max(round(time.perf_counter() - begun, 2), self.logged(SCRATCH, seed))
        return replace(first, name=SCRATCH, before=None, after=accuracy, seconds=seconds)


def settings_of(name: str, epochs: int) -> tuple[str, dict[str, Any]]:
    """Returns the method of a row and the settings that it adds, with as many epochs for a search as for the recovery."""
    if name in SCORES:
        return "channels", {"score": name, "scope": "uniform", "round_to": 1}
    if name == GLOBAL:
        return "channels", {"score": "l2", "scope": "global", "round_to": 1}
    if issubclass(methods[name].config if name in methods else object, UnitConfig):
        return name, {"pattern": "channel"}
    if name.startswith("hrank-"):
        return "hrank", {"variant": name.removeprefix("hrank-")}
    if name == "ddnp":
        return name, {"search_epochs": round(epochs / methods[name].config.search_share)}
    return name, {}


def epochs_of(config: Any) -> int:
    """Returns the epochs of all trainings after the dense network; a search may pass over a share of the images."""
    before_cut = getattr(config, "sparse", None)
    search = getattr(config, "search_epochs", 0) * getattr(config, "search_share", 1.0)
    return int(config.train.epochs + (before_cut.epochs if before_cut is not None else 0) + round(search))


def names_of_rows() -> list[str]:
    """Returns every row.

    These are the scores, each registered method that removes channels by a config of its own, each that chooses channels while
    it trains, and the control.
    """
    kinds = (ChannelConfig, UnitConfig)
    own = [name for name, method in methods.items() if issubclass(method.config, kinds)]
    return [*SCORES, GLOBAL, *sorted(own), "ddnp", *(f"hrank-{variant}" for variant in VARIANTS), SCRATCH]


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
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="precision of every training")
    parser.add_argument("--untimed", action="store_true", help="leave the milliseconds out")
    parser.add_argument("--times", action="store_true", help="only time the models of the finished rows, side by side")
    parser.add_argument("--write", action="store_true", help="only write the document from the finished rows")
    parser.add_argument("--runs", type=Path, default=Path("runs/structured"))
    parser.add_argument("--results", type=Path, default=Path("results/structured"))
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
        asked.runs / f"{asked.model}-{100 * asked.flops:g}",
        asked.results,
        asked.precision,
    )
    asked.document.parent.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    if asked.times:
        bench.time()
    for seed, name in [] if asked.write or asked.times else product(asked.seeds, asked.methods):
        try:
            row = bench.row(name, seed)
        except Exception:  # the other rows of a long table do not wait for this one
            failed.append(f"{name}, seed {seed}")
            Console().print_exception()
            continue
        write_atomic(asked.document, document(tables_in(asked.results), claims_in(asked.results)))
        told = row.refused or f"{100 * row.after:.2f} %"
        Console().print(f"{name}, seed {seed}: {told}", highlight=False, soft_wrap=True)
    write_atomic(asked.document, document(tables_in(asked.results), claims_in(asked.results)))
    if failed:
        raise SystemExit(f"These rows failed, and the same command tries them again: {'; '.join(failed)}.")


if __name__ == "__main__":
    main()
