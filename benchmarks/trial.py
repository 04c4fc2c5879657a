"""A trial of a queue: every row of its studies once, two batches in each epoch, to see that the long runs come to their end.

Each row has the first point of its grid and one seed. Searches inside of methods are short too. The numbers mean nothing: they
are kept in the directories of the runs alone. A failed row ends nothing; its sentence is printed, and the status is 1.

Run, for minutes: ``python benchmarks/trial.py recipes/tasks/queue.yaml --out runs/trial``
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from microglia.core.errors import MicrogliaError
from microglia.lab.execute import execute
from microglia.lab.recipe import Recipe, as_whole_dict, resolve
from microglia.lab.result import Result
from microglia.studies.evidence.files import Queue, read_queue
from microglia.studies.evidence.ledger import Ledger
from microglia.studies.evidence.plan import Job, Planner

SHORT: dict[str, Any] = {
    "recalibrate": 2, "score_batches": 2, "score_batch_size": 16, "images": 32, "candidates": 2, "episodes": 3, "warmup": 2,
    "population": 2, "parents": 2, "mutants": 1, "crossovers": 1, "iterations": 2, "search_epochs": 2,
    "compress": (0.25, 0.75), "decompress": (0.5,),
}  # fmt: skip
"""Setting of a method -> its largest value in a trial, or its values: what a limit of batches does not shorten."""


def shortened(recipe: Recipe) -> Recipe:
    """Returns a recipe whose method has short inner loops; its trainings stay as they are."""
    return resolve({**as_whole_dict(recipe), "prune": {key: _short(key, value) for key, value in recipe.prune.items()}})


def _short(key: str, value: Any) -> Any:
    short: Any = SHORT.get(key, value)
    return short if isinstance(short, tuple) or key not in SHORT or value is None else min(value, short)


def trial(recipe: Recipe, batches: int, epochs: int) -> Recipe:
    """Returns a recipe of the same path in a few batches: short inner loops, trainings and measurements."""
    short = shortened(recipe)
    return replace(
        short,
        dense=replace(short.dense, epochs=min(short.dense.epochs, 1), max_batches=batches, warmup_epochs=0.0),
        train=replace(short.train, epochs=min(short.train.epochs, epochs), max_batches=batches, warmup_epochs=0.0),
        measure=replace(short.measure, rounds=min(short.measure.rounds, 2)),
    )


def firsts(queue: Queue, studies: list[str] | None, rows: list[str] | None) -> Iterator[Job]:
    """Yields one cell of each row: the first in the order of the queue. None stands for all."""
    seen: set[tuple[str, str]] = set()
    for job in Planner(queue, Ledger(queue.ledger)).jobs():
        named = (studies is None or job.study in studies) and (rows is None or job.row in rows)
        if job.kind == "cell" and named and (job.study, job.row) not in seen:
            seen.add((job.study, job.row))
            yield job


def kept(result: Result) -> Mapping[str, Any]:
    """Returns what a row of a table needs of a result, in few words."""
    macs = result.pruned.macs.effective / result.dense.macs.total
    before = None if result.before is None else result.before.metrics[result.headline]
    ms = None if result.latency is None else round(result.latency.best("pruned")[1].median, 2)
    density = result.pruned.parameters.density
    return {
        "before": before,
        "after": result.pruned.metrics[result.headline],
        "macs": round(macs, 3),
        "kept": density,
        "ms": ms,
    }


def main() -> None:
    """Runs the rows one after the other in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queue", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/trial"))
    parser.add_argument("--studies", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these of each study")
    parser.add_argument("--batches", type=int, default=2, help="batches in an epoch")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of a training after (or while) pruning")
    given = parser.parse_args()
    failed, console = 0, Console()
    jobs = list(firsts(read_queue(given.queue), given.studies, given.rows))
    if not jobs:
        raise SystemExit(f"No row of {given.queue} has these names: --studies {given.studies}, --rows {given.rows}.")
    for job in jobs:
        recipe, began, processor = trial(job.recipe, given.batches, given.epochs), time.perf_counter(), time.process_time()
        try:
            words = str(dict(kept(execute(recipe, given.out / job.study / job.name, starts=given.out / "starts"))))
        except Exception as error:  # the trial is there to find it
            words, failed = f"FAILED: {type(error).__name__}: {error}", failed + 1
            if not isinstance(error, MicrogliaError):
                console.print_exception()
        spent = f"{time.perf_counter() - began:.0f} s, {time.process_time() - processor:.0f} s of the processor"
        console.print(f"{job.study} {job.row} {job.values} {words} ({spent})", markup=False, highlight=False, soft_wrap=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
