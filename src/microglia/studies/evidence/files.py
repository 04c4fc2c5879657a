"""The files of a queue of evidence: studies with rows, pilots and seeds, and the order of their parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from microglia.lab.recipe import RecipeError, read_yaml
from microglia.storage.validation import problems

Step = dict[str, list[Any]]
"""Keys of the recipe and the values that pilots try; several keys change together, so that their lists are equally long."""


def tries(step: Step) -> list[dict[str, Any]]:
    """Returns the settings that a step tries."""
    return [dict(zip(step, values, strict=True)) for values in zip(*step.values(), strict=True)]


def _check_steps(steps: list[Step]) -> None:
    for step in steps:
        lengths = {len(values) for values in step.values()}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"a step of pilots has keys with equally long lists, such as train.lr: [0.1, 0.01]; got {step}")


@dataclass(frozen=True)
class Pilots:
    """Short runs that choose a row's settings on validation images.

    Attributes:
        set: Dotted recipe key -> value of every pilot, over the study's and the row's own.
        at: Dotted key of the grid -> its value in pilots of rows with this key.
        steps: Steps of every row. Each changes the best pilot so far.
        seed: Seed of the pilots.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    set: dict[str, Any]
    steps: list[Step]
    at: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        _check_steps(self.steps)


@dataclass(frozen=True)
class Row:
    """One row of a study's table.

    Attributes:
        set: Dotted recipe key -> value, over the study's base.
        steps: Steps of pilots after the study's.
        short: Dotted recipe key -> value of its pilots, over those of all.
        grid: The grid of this row in place of the study's; ``{}`` for a row without one.
        pilots: Whether the row has pilots.
        control: Whether the row is a control, which can be no winner.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    set: dict[str, Any]
    steps: list[Step] = field(default_factory=list)
    short: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] | None = None
    pilots: bool = True
    control: bool = False

    def __post_init__(self) -> None:
        _check_steps(self.steps)


@dataclass(frozen=True)
class EvidenceStudy:
    """One table: rows that differ in their method, at equal budgets and seeds.

    Attributes:
        title: Title of the table.
        base: The common recipe.
        rows: Rows by name.
        grid: Dotted recipe key -> values; every row is run at all combinations.
        seeds: Seeds of every cell; equal seeds are pairs.
        pilots: Choice of settings; None for no pilots.
        better: Whether a higher or a lower headline metric is better.
        seconds_per_epoch: Time of an epoch on one core, for estimates before anything was measured.
        name: Path of the file below that of the queue, without suffix.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    title: str
    base: dict[str, Any]
    rows: dict[str, Row]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    pilots: Pilots | None = None
    better: Literal["higher", "lower"] = "higher"
    seconds_per_epoch: float = 60.0
    name: str = ""


@dataclass(frozen=True)
class Part:
    """A part of a study at one place of the queue.

    Attributes:
        study: Path of the study's file below the queue's.
        worth: Parts of higher worth run first.
        seeds: Seeds of this part; None for all of the study's.
        rows: Rows of this part; None for all.
        only: Dotted key of the grid -> values of this part.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    study: str
    worth: float
    seeds: list[int] | None = None
    rows: list[str] | None = None
    only: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Queue:
    """The parts of studies in the order of their worth.

    Attributes:
        parts: The parts.
        results: Directory of the finished results, below that of the queue's file.
        jobs: Processes side by side, each with one thread.
        name: Name for readers and for the default directory of the runs.
        path: The queue's file.
        studies: The studies by the name in `Part.study`.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    parts: list[Part]
    results: str
    jobs: int = 2
    name: str = "evidence"
    path: Path = Path()
    studies: dict[str, EvidenceStudy] = field(default_factory=dict)

    @property
    def ledger(self) -> Path:
        """Directory of the finished results."""
        return self.path.parent / self.results

    @property
    def ordered(self) -> list[Part]:
        """The parts, the worthiest first; of equal worth as in the file."""
        return sorted(self.parts, key=lambda part: -part.worth)


_queue, _study = TypeAdapter(Queue), TypeAdapter(EvidenceStudy)


def is_queue(path: Path) -> bool:
    """Tells whether a YAML file is a queue and not a sweep."""
    return "parts" in read_yaml(path, "sweep or queue")


def read_queue(path: str | Path) -> Queue:
    """Returns the queue of a YAML file with all of its studies.

    Raises:
        RecipeError: The queue or a study is not valid; the text names the file and the field.
    """
    path = Path(path)
    source = read_yaml(path, "queue")
    queue = _read(_queue, {**source, "path": path}, path, "queue")
    for name in dict.fromkeys(part.study for part in queue.parts):
        file = path.parent / f"{name}.yaml"
        queue.studies[name] = _read(_study, {**read_yaml(file, "study"), "name": name}, file, "study")
    for part in queue.parts:
        _check_part(part, queue.studies[part.study], path)
    return queue  # type: ignore[no-any-return]


def _read(adapter: TypeAdapter[Any], source: Mapping[str, Any], path: Path, what: str) -> Any:
    try:
        return adapter.validate_python(dict(source))
    except ValidationError as error:
        raise RecipeError(f"The {what} {path} is not valid: {problems(error, what)}") from None


def _check_part(part: Part, study: EvidenceStudy, path: Path) -> None:
    """Raises for a row, a seed or a value of the grid that the study does not have."""
    known: dict[str, list[Any]] = {"rows": list(study.rows), "seeds": study.seeds, **study.grid}
    asked: dict[str, list[Any]] = {"rows": part.rows or [], "seeds": part.seeds or [], **part.only}
    for key, values in asked.items():
        if wrong := [value for value in values if value not in known.get(key, [])]:
            has = known.get(key, "no such key")
            raise RecipeError(f"{path} asks for {key} {wrong[0]!r} of {part.study}, which has {has}.")
