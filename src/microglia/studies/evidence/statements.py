"""Statements of papers and their outcome here: a winner only beyond two standard errors of paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from microglia.lab.recipe import RecipeError, read_yaml
from microglia.report.records import Record
from microglia.storage.validation import problems
from microglia.studies.evidence.files import Queue
from microglia.studies.evidence.ledger import Entry, Ledger
from microglia.studies.evidence.plan import Job, Planner, grid_of

Verdict = Literal["holds", "does not hold", "cannot be told"]
PAIRS = 3
"""Smallest number of pairs for a verdict."""
ERRORS = 2.0
"""Standard errors that a difference must exceed."""


@dataclass(frozen=True)
class Statement:
    """One statement of a paper.

    Attributes:
        document: Document that states it.
        text: The statement.
        source: Its place there.
        published: Published numbers, on other networks and data; shown beside ours, never mixed.
        study: Name of the study that tests it; empty where small machines cannot.
        first: Row that is said to be above every row that is no control.
        above: Two rows, the first of which is said to be above the second.
        costless: Two rows, the second of which is said to be less than ``points`` below the first.
        points: Difference in percentage points for ``costless``.
        hours: Hours of one core that a test needs, for a statement that was not run.
        why: Reason that it was not run.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    document: str
    text: str
    source: str
    published: str = ""
    study: str = ""
    first: str = ""
    above: tuple[str, str] | None = None
    costless: tuple[str, str] | None = None
    points: float = 0.5
    hours: float | None = None
    why: str = ""

    def __post_init__(self) -> None:
        claims = [claim for claim in (self.first, self.above, self.costless) if claim]
        if len(claims) != (1 if self.study else 0):
            raise ValueError("a statement with a study has one of first, above and costless; one without a study has none")

    @property
    def rows(self) -> tuple[str, ...]:
        """Rows that it names."""
        return (*filter(None, [self.first]), *(self.above or ()), *(self.costless or ()))


@dataclass(frozen=True)
class Difference:
    """Paired differences of two rows, in the headline metric; positive where the first row is better.

    Attributes:
        mean: Their mean; NaN without pairs.
        error: Standard error of the mean; infinite for less than two pairs.
        n: Number of pairs.
    """

    mean: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Difference:
        """Returns the summary of differences."""
        if not values:
            return cls(math.nan, math.inf, 0)
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        return cls(fmean(values), error, len(values))

    @property
    def sign(self) -> int:
        """1 or -1 if the difference is beyond `ERRORS` standard errors of at least `PAIRS` pairs; else 0."""
        if self.n < PAIRS or not abs(self.mean) > ERRORS * self.error:
            return 0
        return 1 if self.mean > 0 else -1

    def told(self, scale: float) -> str:
        """Returns the difference in words, such as ``+0.52 ± 0.11 (n = 3)``."""
        if not self.n:
            return "no pairs"
        error = f" ± {self.error * scale:.2f}" if math.isfinite(self.error) else ""
        return f"{self.mean * scale:+.2f}{error} (n = {self.n})"


@dataclass(frozen=True)
class Finished:
    """One finished cell of a table."""

    job: Job
    entry: Entry
    record: Record

    @property
    def value(self) -> float:
        """Headline metric on the test images."""
        return self.record.value(self.record.pruned)


@dataclass
class Cells:
    """The cells of one study: finished ones by row and values of the grid.

    Attributes:
        queue: The queue.
        study: Name of the study.
        jobs: All cells of the plan.
        ledger: The finished results.
    """

    queue: Queue
    study: str
    jobs: Sequence[Job]
    ledger: Ledger
    found: dict[tuple[str, str], list[Finished]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for job in self.jobs:
            if job.done:
                cell = Finished(job, self.ledger.cells[job.identity], self.ledger.records[job.identity])
                self.found.setdefault((job.row, _key(job.values)), []).append(cell)

    def of(self, row: str, values: Mapping[str, Any]) -> list[Finished]:
        """Returns the finished cells of a row; a row without some key of the grid has the same cells for all its values."""
        own = grid_of(self._study, self._study.rows[row])
        return self.found.get((row, _key({key: value for key, value in values.items() if key in own})), [])

    @property
    def _study(self) -> Any:
        return self.queue.studies[self.study]

    def has(self, row: str, values: Mapping[str, Any]) -> bool:
        """Tells whether the grid of a row has a point."""
        own = grid_of(self._study, self._study.rows[row])
        return all(value in own[key] for key, value in values.items() if key in own)

    def difference(self, first: str, second: str, values: Mapping[str, Any]) -> Difference:
        """Returns the paired differences of two rows: cells of equal seeds, and of one dense network where both have one."""
        sign = 1 if self._study.better == "higher" else -1
        others = {cell.entry.seed: cell for cell in self.of(second, values)}
        pairs = [(cell, others[cell.entry.seed]) for cell in self.of(first, values) if cell.entry.seed in others]
        return Difference.of([sign * (a.value - b.value) for a, b in pairs if _comparable(a.entry, b.entry)])


def _comparable(a: Entry, b: Entry) -> bool:
    """Tells whether two cells may be compared: a network with other bits is no pair, one without a start is."""
    return a.start is None or b.start is None or a.start == b.start


def _key(values: Mapping[str, Any]) -> str:
    return repr(sorted(values.items()))


@dataclass(frozen=True)
class Outcome:
    """The outcome of a statement at one point of the grid.

    Attributes:
        values: Values of the grid.
        verdict: The verdict.
        words: The difference that decides, and the row that it is about.
    """

    values: dict[str, Any]
    verdict: Verdict
    words: str
    pairs: int


def outcome_of(statement: Statement, cells: Cells, values: dict[str, Any], scale: float) -> Outcome:
    """Returns the outcome of a statement at one point of the grid of its study.

    Args:
        statement: The statement.
        cells: The cells of its study.
        values: Values of the grid.
        scale: Factor of the differences in words: 100 for a fraction that is shown in per cent.
    """
    if statement.costless:
        first, second = statement.costless
        found = cells.difference(first, second, values)
        least, most = (found.mean * scale + side * ERRORS * found.error * scale for side in (-1, 1))
        close: Verdict = (
            "holds" if most < statement.points else "does not hold" if least > statement.points else "cannot be told"
        )
        return Outcome(
            values, close if found.n >= PAIRS else "cannot be told", f"{first} - {second}: {found.told(scale)}", found.n
        )
    if statement.above:
        first, second = statement.above
        found = cells.difference(first, second, values)
        return Outcome(values, _verdict([found]), f"{first} - {second}: {found.told(scale)}", found.n)
    rows = cells.queue.studies[cells.study].rows
    rivals = [name for name, row in rows.items() if not row.control and name != statement.first]
    against = {rival: cells.difference(statement.first, rival, values) for rival in rivals}
    known = {rival: found for rival, found in against.items() if found.n}
    if not known:
        return Outcome(values, "cannot be told", "no pairs", 0)
    nearest = min(known, key=lambda rival: known[rival].mean)
    words = f"{statement.first} - {nearest}, the best of {len(rivals)} others: {known[nearest].told(scale)}"
    return Outcome(values, _verdict(list(against.values())), words, known[nearest].n)


def _verdict(differences: Sequence[Difference]) -> Verdict:
    """The statement holds against all, or it does not against one; else it cannot be told."""
    signs = [found.sign for found in differences]
    return "does not hold" if -1 in signs else "holds" if all(sign == 1 for sign in signs) else "cannot be told"


def cells_of(queue: Queue, ledger: Ledger) -> dict[str, Cells]:
    """Returns the cells of every study of a queue."""
    jobs = [job for job in Planner(queue, ledger).jobs() if job.kind == "cell"]
    return {name: Cells(queue, name, [job for job in jobs if job.study == name], ledger) for name in queue.studies}


_statements = TypeAdapter(list[Statement])


def read_statements(path: Path, queue: Queue) -> list[Statement]:
    """Returns the statements of a YAML file with one list, ``statements``.

    Raises:
        RecipeError: A statement is not valid, or names a study or a row that the queue does not have.
    """
    try:
        found: list[Statement] = _statements.validate_python(read_yaml(path, "list of statements").get("statements"))
    except ValidationError as error:
        raise RecipeError(f"The statements {path} are not valid: {problems(error, 'statements')}") from None
    for statement in found:
        if not statement.study:
            continue
        study = queue.studies.get(statement.study)
        if study is None:
            raise RecipeError(f"{path} names the study {statement.study!r}; the queue has {', '.join(queue.studies)}.")
        if missing := [row for row in statement.rows if row not in study.rows]:
            raise RecipeError(f"{path} names the row {missing[0]!r} of {study.name}, which has {', '.join(study.rows)}.")
    return found
