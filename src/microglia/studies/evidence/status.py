"""The state of a queue: done and left, with the hours that are left, estimated from measured ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rich.table import Column, Table

from microglia.studies.evidence.files import Queue
from microglia.studies.evidence.ledger import Entry, Ledger
from microglia.studies.evidence.plan import Job, Planner

USUAL = 60.0
"""Seconds of an epoch where neither a measurement nor a study says it."""


@dataclass(frozen=True)
class StudyStatus:
    """The state of a study, or of the starts.

    Attributes:
        study: Name of the study; ``starts`` for the dense networks.
        worth: Highest worth of its parts.
        cells: Number of cells (of starts: networks).
        done: Finished cells.
        pilots: Number of pilots.
        pilots_done: Finished pilots.
        hours_done: Hours on one core of the finished runs.
        hours_left: Estimated hours on one core of the others.
        rows: Row of the table -> (finished cells, cells).
    """

    study: str
    worth: float
    cells: int
    done: int
    pilots: int
    pilots_done: int
    hours_done: float
    hours_left: float
    rows: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class QueueStatus:
    """The state of a queue.

    Attributes:
        studies: The starts that are needed, then the studies in the order of the queue.
        jobs: Processes side by side.
        next: Names of the first runs that are left.
    """

    studies: tuple[StudyStatus, ...]
    jobs: int
    next: tuple[str, ...]

    @property
    def hours_left(self) -> float:
        """Estimated hours that the queue needs, with its processes side by side."""
        return sum(study.hours_left for study in self.studies) / self.jobs

    @property
    def sentence(self) -> str:
        """Summary for a reader."""
        cells = [study for study in self.studies if study.rows or study.pilots]
        done, all_ = sum(study.done for study in cells), sum(study.cells for study in cells)
        spent = sum(study.hours_done for study in self.studies)
        return (
            f"{done} of {all_} cells are done, {all_ - done} left: {spent:.1f} core hours spent, about "
            f"{self.hours_left * self.jobs:.1f} left, {self.hours_left:.1f} hours with {self.jobs} processes."
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, JSON-ready."""
        return {
            "studies": [asdict(study) for study in self.studies],
            "jobs": self.jobs,
            "next": list(self.next),
            "hours_left": round(self.hours_left, 2),
        }


def status_of(queue: Queue, ledger: Ledger, planner: Planner | None = None) -> QueueStatus:
    """Returns the state of a queue.

    Args:
        queue: The queue.
        ledger: Its finished results.
        planner: The planner that knows the dense networks of this machine; by default all are there that were ever trained.
    """
    jobs = (planner or Planner(queue, ledger)).jobs()
    starts = [job for job in jobs if job.kind == "start"]
    known = [_of_starts(ledger, starts, queue)] if starts or ledger.starts else []
    names = dict.fromkeys(part.study for part in queue.ordered)
    found = [_of_study(name, [job for job in jobs if job.study == name], ledger, queue) for name in names]
    left = [job.name for job in jobs if not job.done]
    return QueueStatus((*known, *found), queue.jobs, tuple(left[:5]))


def _of_starts(ledger: Ledger, needed: Sequence[Job], queue: Queue) -> StudyStatus:
    left = [job for job in needed if not job.done]
    spent = sum(entry.seconds for entry in ledger.starts.values())
    names = {*ledger.starts, *(job.identity for job in needed)}
    return StudyStatus(
        "starts", 0.0, len(names), len(names) - len(left), 0, 0, spent / 3600, _seconds(left, ledger, queue) / 3600, {}
    )


def _of_study(name: str, jobs: Sequence[Job], ledger: Ledger, queue: Queue) -> StudyStatus:
    cells, pilots = ([job for job in jobs if job.kind == kind] for kind in ("cell", "pilot"))
    rows = {row: [job for job in cells if job.row == row] for row in dict.fromkeys(job.row for job in cells)}
    entries = [*ledger.cells.values(), *ledger.pilots.values()]
    spent = {entry.identity: entry.seconds for entry in entries if entry.study == name}
    return StudyStatus(
        name,
        max(part.worth for part in queue.parts if part.study == name),
        len(cells),
        _done(cells),
        len(pilots),
        _done(pilots),
        sum(spent.values()) / 3600,
        _seconds([job for job in jobs if not job.done], ledger, queue) / 3600,
        {row: (_done(own), len(own)) for row, own in rows.items()},
    )


def _done(jobs: Iterable[Job]) -> int:
    return sum(job.done for job in jobs)


def _seconds(jobs: Iterable[Job], ledger: Ledger, queue: Queue) -> float:
    """Returns the estimated seconds of runs; the nearest measurement counts: the row's, the study's, the file's."""
    entries = {entry.identity: entry for entry in [*ledger.cells.values(), *ledger.pilots.values()]}.values()
    return sum(job.epochs * _per_epoch(job, entries, ledger, queue) for job in jobs)


def _per_epoch(job: Job, entries: Iterable[Entry], ledger: Ledger, queue: Queue) -> float:
    if job.kind == "start":
        near = [_rate(entry) for entry in ledger.starts.values() if entry.row == job.row and entry.epochs]
    else:
        study = [entry for entry in entries if entry.study == job.study and entry.epochs]
        near = [_rate(entry) for entry in study if entry.row == job.row] or [_rate(entry) for entry in study]
    named = [study.seconds_per_epoch for study in queue.studies.values() if study.base.get("model") == job.recipe.model]
    return fmean(near) if near else (queue.studies[job.study].seconds_per_epoch if job.study else (named or [USUAL])[0])


def _rate(entry: Entry) -> float:
    return entry.seconds / entry.epochs


def status_table(status: QueueStatus) -> Table:
    """Returns the state as a table for people."""
    table = Table(
        Column("study", no_wrap=True),
        "worth",
        "cells done",
        "left",
        "pilots done",
        "left",
        "hours spent",
        "hours left",
        title="Evidence",
    )
    for study in status.studies:
        table.add_row(
            study.study,
            f"{study.worth:g}" if study.worth else "",
            *(str(number) for number in (study.done, study.cells - study.done)),
            *(str(number) for number in (study.pilots_done, study.pilots - study.pilots_done)),
            f"{study.hours_done:.1f}",
            f"{study.hours_left:.1f}",
        )
    table.caption = "Hours of one core; those left are estimated from measured ones."
    return table
