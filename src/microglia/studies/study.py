"""The base of every study: a frozen config becomes a durable run, a result, tables and charts, and a command.

A new study is one value. Its command line is derived from the config, and no shared file changes:

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Counting:
    ...     '''How far to count.
    ...
    ...     Attributes:
    ...         top: Largest number.
    ...     '''
    ...
    ...     top: int = 3
    >>> def begin(config):
    ...     return Work(lambda run: {"numbers": list(range(1, config.top + 1))})
    >>> @dataclass(frozen=True)
    ... class Numbers(Result):
    ...     numbers: tuple[int, ...]
    >>> counting = Study("counting", "Count.", Counting, begin, tables=lambda found: [str(found.numbers)], result=Numbers)
    >>> told = conduct(counting, Counting(2))
    >>> told
    {'numbers': [1, 2], 'pictures': []}
    >>> told.result
    Numbers(numbers=(1, 2))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from microglia.core.errors import MicrogliaError
from microglia.core.registry import Registry
from microglia.studies.result import PICTURES, Result, Told, decode, encode

if TYPE_CHECKING:
    from microglia.report.chart import Chart
    from microglia.storage.run import Run

Json = dict[str, Any]
C = TypeVar("C")
R = TypeVar("R")


@dataclass(frozen=True)
class Figure:
    """A figure of a study.

    Attributes:
        name: End of its file names, unique in the study.
        chart: The figure itself.
        rows: Its points, one mapping or part of a result each, with the same keys, for the CSV file; None for a picture on
            paper alone.
        told: Content of the JSON file: a result or a mapping.
        slug: Start of its file names; the study's name where it is empty.
    """

    name: str
    chart: Chart
    rows: Sequence[Mapping[str, Any] | Result] | None = None
    told: Mapping[str, Any] | Result | None = None
    slug: str = ""


@dataclass(frozen=True)
class Work(Generic[R]):
    """The work of a study: its config is checked, its models are open, and nothing is written yet.

    Attributes:
        measure: Does it, stage by stage of a run, and returns the result, or its JSON form.
        record: All that the stages depend on: a directory of another record is refused. None for a study that keeps nothing but
            pictures, or runs of its own.
        seed: Root of the run's random numbers.
        device: Where the run computes, ``cpu`` or ``cuda``.
    """

    measure: Callable[[Run], R | Mapping[str, Any]]
    record: Mapping[str, Any] | None = None
    seed: int = 0
    device: str = "cpu"


def no_figures(result: Any) -> tuple[()]:
    """Returns no figure."""
    return ()


def as_measured(result: Any) -> Any:
    """Returns a result as it was measured."""
    return result


def own_directory(config: Any) -> Path | None:
    """Returns the field ``out`` of a config."""
    out: Path | None = getattr(config, "out", None)
    return out


def as_typed(given: Json) -> Json:
    """Returns options as they were typed."""
    return given


@dataclass(frozen=True)
class Study(Generic[C, R]):
    """An experiment, from its config to its command.

    Attributes:
        name: The command, unique.
        sentence: One line that says what it shows.
        config: Frozen dataclass. Its "Attributes" are the help texts of the command; see `microglia.studies.options`.
        begin: Checks a config, opens what it names, and returns the work.
        tables: Returns tables and sentences for a person, from a result.
        figures: Returns the figures of a result.
        result: Class of the result; None for a plain mapping; see `microglia.studies.result`.
        told: Returns the part of a measured result that is written, for one that holds more, such as tensors.
        directory: Where a config keeps everything; None keeps nothing.
        settle: Changes options, by name as typed, where one means something beside another; may add fields of the config that
            have no option.
        details: Help of the command after the sentence.
        example: A command line.
    """

    name: str
    sentence: str
    config: type[C]
    begin: Callable[[C], Work[R]]
    tables: Callable[[Any], Iterable[Any]]
    figures: Callable[[R], Iterable[Figure]] = no_figures
    result: type[Any] | None = None
    told: Callable[[R], Any] = as_measured
    directory: Callable[[C], Path | None] = own_directory
    settle: Callable[[Json], Json] = as_typed
    details: str = ""
    example: str = ""


studies: Registry[Study[Any, Any]] = Registry("study")
"""Every study by name, once its file is imported."""


def register(study: Study[C, R]) -> Study[C, R]:
    """Adds a study to the command line from here on, and returns it.

    Raises:
        ValueError: There is a study of this name.
    """
    return studies.add(study.name)(study)


def conduct(study: Study[C, R], config: C) -> Told[Any]:
    """Runs a study in the directory of its config, draws its figures there and returns the result.

    Every stage is durable: the same call goes on after it was interrupted. The returned mapping is the result's JSON form with
    ``pictures``, the paths of all figures; its attribute ``result`` is the typed result.

    Raises:
        MicrogliaError: A setting is not as it should be, or the directory holds a run of another config.
    """
    return conduct_in(study.directory(config), study, config)


def conduct_in(directory: Path | None, study: Study[C, R], config: C) -> Told[Any]:
    """Runs a study in a directory, or in memory for None; see `conduct`."""
    from microglia.storage.run import Run  # imports torch, which `microglia --help` does without

    check_choices(config)
    work = study.begin(config)
    run = Run(None if work.record is None else directory, work.record, seed=work.seed, device=work.device)
    try:
        measured: Any = typed(study.result, work.measure(run))
        pictures = [] if directory is None else draw(study.name, study.figures(measured), directory)
        told = Told(study.told(measured), **{PICTURES: pictures})
        run.finish(told)
        return told
    finally:
        run.close()


def typed(kind: type[Any] | None, measured: Any) -> Any:
    """Returns a result of its class from a JSON form; anything else as it is.

    Raises:
        ResultError: The JSON form is not one of the class.
    """
    return decode(kind, measured) if kind is not None and isinstance(measured, Mapping) else measured


def draw(slug: str, figures: Iterable[Figure], directory: Path) -> list[str]:
    """Writes figures as PNG and SVG, and where they have rows as a page, JSON and CSV; returns the paths.

    Args:
        slug: Start of the file names.
        figures: The figures.
        directory: Where.

    Raises:
        FileError: They cannot be written.
    """
    paths: list[Path] = []
    for figure in figures:
        from microglia.report.figure_files import write_figure  # matplotlib and plotly are slow to import
        from microglia.report.printed import save

        start = figure.slug or slug
        if figure.rows is None:
            paths += save(figure.chart, directory, start, figure.name)
        else:
            told, rows = encode(figure.told or {}), [encode(row) for row in figure.rows]
            paths += write_figure(directory, start, figure.name, chart=figure.chart, told=told, rows=rows)
    return [str(path) for path in paths]


def check_choices(config: Any) -> None:
    """Raises unless every field of a config with a closed list of words has one of them.

    Raises:
        MicrogliaError: A field has another word; the text lists them.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        if get_origin(hints[field.name]) is Literal and (value := getattr(config, field.name)) not in get_args(
            hints[field.name]
        ):
            *first, last = map(str, get_args(hints[field.name]))
            raise MicrogliaError(f"The {field.name} is {', '.join(first)} or {last}; got {value!r}.")
