"""The queue of evidence: runs what is left side by side in the order of its worth, and keeps every finished result at once."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

import microglia
from microglia.core.errors import FileError, MicrogliaError, RunError
from microglia.core.processes import Children, signals_raise
from microglia.lab.recipe import as_dict
from microglia.lab.sweep import CellOutcome, run_cell
from microglia.lab.sweep_grid import Cell
from microglia.report.read import METRICS, RESULT, read_results
from microglia.report.records import exported
from microglia.storage.files import digest, read_state
from microglia.storage.run import DENSE_STAGES, read_json
from microglia.studies.evidence.files import Queue
from microglia.studies.evidence.ledger import Entry, Ledger
from microglia.studies.evidence.plan import Job, Planner

STARTS = "starts"
"""Directory, in that of the queue, of the dense networks that runs begin from."""
DIVERGED = "The loss became"
"""Begin of the sentence with which a training ends whose loss is not finite: an outcome of a pilot, and no failure."""
UNKNOWN = "unknown"
"""Commit of code that is in no repository."""


@dataclass(frozen=True)
class QueueOutcome:
    """The outcome of a queue.

    Attributes:
        done: Names of the runs that were finished now, in order.
        failed: Name -> the end of its log.
        left: Number of runs that are left.
        notes: Sentences for the reader, such as about starts with other bits.
    """

    done: tuple[str, ...]
    failed: dict[str, str]
    left: int
    notes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """Summary for a reader."""
        lines = [f"{len(self.done)} runs finished, {len(self.failed)} failed, {self.left} left.", *self.notes]
        for name, problem in self.failed.items():
            lines += [f"{name} failed; its log ends with:", *(f"    {line}" for line in problem.splitlines())]
        return "\n".join(lines + ["Start the same command again to try these once more."] * bool(self.failed))

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, JSON-ready."""
        return {"done": list(self.done), "failed": self.failed, "left": self.left, "notes": list(self.notes)}


def commit_of(folder: Path) -> str:
    """Returns the commit of the code in a folder, with ``+changes`` if it was edited since, or `UNKNOWN`."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


@dataclass
class QueueRun:
    """One execution of a queue, which may be killed at any moment and started again.

    Attributes:
        queue: The queue.
        out: Directory of the runs and starts.
        jobs: Processes side by side.
    """

    queue: Queue
    out: Path
    jobs: int
    children: Children = field(default_factory=Children)
    failed: dict[str, str] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def ledger(self) -> Ledger:
        """The finished results."""
        return Ledger.read(self.queue.ledger)

    @cached_property
    def commit(self) -> str:
        """Commit of the code that runs."""
        return commit_of(Path(microglia.__file__).parent)

    @property
    def starts(self) -> Path:
        """Directory of the dense networks."""
        return self.out / STARTS

    def run(self) -> QueueOutcome:
        """Runs everything that is left; a failed run stops nothing but what needs it."""
        console, working = Console(stderr=True), dict[Future[CellOutcome], Job]()
        with _only_one(self.out), signals_raise(), ThreadPoolExecutor(self.jobs) as pool:
            try:
                while True:
                    for job in self._ready(list(working.values()), self.jobs - len(working)):
                        working[pool.submit(self._work, job)] = job
                    if not working:
                        break
                    for future in wait(working, return_when=FIRST_COMPLETED).done:
                        job, outcome = working.pop(future), future.result()
                        self._finish(job, outcome)
                        text = f"{'failed' if job.name in self.failed else 'done'} {job.name} ({outcome.seconds:.0f} s)"
                        console.print(text, markup=False, highlight=False)
            except BaseException:
                self.children.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return QueueOutcome(tuple(self.done), self.failed, sum(not job.done for job in self._plan()), tuple(self.notes))

    def _plan(self) -> list[Job]:
        return Planner(self.queue, self.ledger, self.starts).jobs()

    def _ready(self, working: list[Job], places: int) -> list[Job]:
        """Returns the next runs: not done, not failed, and with their pilots and their start finished."""
        if not places:
            return []
        busy = {job.identity for job in working}
        found: list[Job] = []
        for job in self._plan():
            waits = job.kind != "start" and job.start is not None and not self._there(job.start)
            tried = job.name in self.failed or job.name in self.done  # once in an execution, whatever the results say
            if job.done or not job.settled or waits or tried or job.identity in busy:
                continue
            busy.add(job.identity)
            found.append(job)
        return found[:places]

    def _there(self, start: str) -> bool:
        return self._dense(start).is_file() and self.ledger.start(start) is not None

    def _dense(self, start: str) -> Path:
        return self.starts / start / f"{DENSE_STAGES[0]}.safetensors"

    def _directory(self, job: Job) -> Path:
        """Directory of a run: code of another commit never goes on with it."""
        code, plus, changed = self.commit.partition("+")
        return self.out / f"{code[:12]}{plus}{changed}" / (job.study or STARTS) / job.name

    def _work(self, job: Job) -> CellOutcome:
        directory = self._directory(job)
        if job.kind == "start" and (directory / RESULT).is_file() and not self._dense(job.identity).is_file():
            shutil.rmtree(directory)  # finished, and its network was lost since
        return run_cell(
            Cell(job.name, job.values, job.recipe), directory, threads=1, children=self.children, starts=self.starts
        )

    def _finish(self, job: Job, outcome: CellOutcome) -> None:
        """Keeps the result of a run, or notes its failure."""
        diverged = job.kind == "pilot" and DIVERGED in outcome.problem
        if outcome.status == "failed" and not diverged:
            self.failed[job.name] = outcome.problem
            return
        try:
            self._keep(job, outcome)
        except (MicrogliaError, ValueError) as error:
            self.failed[job.name] = str(error)
            return
        self.done.append(job.name)
        shutil.rmtree(self._directory(job) / "stages", ignore_errors=True)  # a hundred runs would fill a small disk

    def _keep(self, job: Job, outcome: CellOutcome) -> None:
        directory = self._directory(job)
        start, value = job.identity if job.kind == "start" else job.start, None
        if outcome.status != "failed":
            result = read_json(directory / RESULT)
            value = result["dense" if job.kind == "start" else "pruned"]["metrics"][result["headline"]]
        if value is None and job.kind != "pilot":
            raise FileError(f"The headline metric of {job.name} is no number: its training diverged.")
        entry = Entry(
            **{name: getattr(job, name) for name in ("identity", "study", "row", "values", "seed", "epochs")},
            commit=self.commit,
            seconds=round(max(outcome.seconds, _logged(directory, dense=job.kind == "start")), 3),
            start=None if start is None else self._digest(start),
            value=value,
        )
        if job.kind == "start":
            self._keep_start(replace(entry, recipe=as_dict(job.recipe)))
        elif job.kind == "pilot":
            self.ledger.add_pilot(replace(entry, recipe=as_dict(job.recipe)))
        else:
            found = read_results([directory])
            if not found.records:
                raise FileError(f"The result of {job.name} cannot be read: {'; '.join(found.left_out)}.")
            self.ledger.add_cell(entry, exported(found.records[0]))

    def _digest(self, start: str) -> str:
        return digest(read_state(self._dense(start))["model"])

    def _keep_start(self, entry: Entry) -> None:
        """Keeps a start unless the results hold its bits already, and notes other bits."""
        before = self.ledger.start(entry.identity)
        if before is not None and before.start == entry.start:
            return
        self.ledger.add_start(entry)
        if before is not None:
            self.notes.append(
                f"The start {entry.identity} ({entry.row}, seed {entry.seed}) has other bits on this machine than before: "
                f"{entry.start} and not {before.start}. Only cells that share a start are compared."
            )


def run_queue(queue: Queue, out: Path, jobs: int | None = None) -> QueueOutcome:
    """Runs what a queue has left, the worthiest first.

    It can be killed at any moment and started again: finished runs are in the results, and interrupted ones resume.

    Args:
        queue: The queue.
        out: Directory of the runs and of the dense networks that they share.
        jobs: Processes side by side, each with one thread; by default as the queue says.

    Raises:
        RunError: Another process runs a queue in the directory, or ``jobs`` is below 1.
        KeyboardInterrupt: Ctrl-C; as after SIGTERM (``SystemExit``), every child was ended first.
    """
    jobs = queue.jobs if jobs is None else jobs
    if jobs < 1:
        raise RunError(f"jobs is the number of runs at a time, 1 or more; got {jobs}.")
    return QueueRun(queue, out, jobs).run()


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".queue.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"Another queue runs in {out}; wait for it or choose another directory.") from None
        yield


def _logged(directory: Path, *, dense: bool) -> float:
    """Returns the seconds of all logged epochs, also of attempts that were killed; the dense network counts for itself."""
    rows = (
        [json.loads(line) for line in (directory / METRICS).read_text().splitlines()] if (directory / METRICS).exists() else []
    )
    return sum(float(row.get("seconds", 0.0)) for row in rows if (row["stage"] == DENSE_STAGES[0]) is dense)
