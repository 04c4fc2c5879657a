"""Reading of results: run directories and exported files to records; damaged ones are named and left out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from microglia.core.errors import FileError
from microglia.report.families import checked
from microglia.report.records import Curves, Record, order, parse, without_paths
from microglia.storage.run import SHOWN, read_json

RESULT, RECIPE, CELL, METRICS = "result.json", "recipe.yaml", "cell.yaml", "metrics.jsonl"


@dataclass(frozen=True)
class Collected:
    """The results that were found.

    Attributes:
        records: Records in sorted order, each run once.
        left_out: One line for each result that was found but left out, with the reason.
    """

    records: tuple[Record, ...]
    left_out: tuple[str, ...]


def read_results(paths: Sequence[str | Path]) -> Collected:
    """Reads every ``result.json`` below directories, and files that `export` wrote.

    Args:
        paths: Run directories, directories of them at any depth, directories of exported files, or such files.

    Raises:
        FileError: A path has no results.
    """
    files: dict[Path, str] = {}
    records: list[Record] = []
    left_out: list[str] = []
    for path in map(Path, paths):
        shown = _shown(path)
        if path.is_dir():
            names = [*path.rglob(RESULT), *(path.glob("*.json") if not (path / RECIPE).exists() else [])]
            others = {file.parent: told for file in path.rglob(RECIPE) if (told := _command(file)) is not None}
            left_out += [f"{_shown_below(shown, run.relative_to(path))}: {told}" for run, told in others.items()]
            names = [name for name in names if name.parent not in others]
            unfinished = [run for run in _unfinished(path) if run not in others]
            left_out += [f"{_shown_below(shown, run.relative_to(path))}: not finished" for run in unfinished]
        elif path.is_file():
            names = [path]
        else:
            raise FileError(f"There is no run directory or results file {path}.")
        for name in names:
            files.setdefault(name.resolve(), shown if name == path else f"{shown}/{name.relative_to(path).as_posix()}")
    for file, source in files.items():
        read = _read_run if file.name == RESULT else _read_export
        read(file, source, records, left_out)
    return _unique(records, left_out)


def _command(recipe: Path) -> str | None:
    """Returns a note about a directory of another command, None for a run."""
    try:
        first = recipe.read_text().partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return None
    return f"of {first.removeprefix('command: ')!r}, which draws figures of its own" if first.startswith("command: ") else None


def _unfinished(root: Path) -> list[Path]:
    begun = {file.parent for name in (RECIPE, CELL) for file in root.rglob(name)}
    return [run for run in begun if not (run / RESULT).exists()]


def _read_run(file: Path, shown: str, records: list[Record], left_out: list[str]) -> None:
    try:
        record = checked(parse({**read_json(file), "source": shown}))
    except (FileError, ValueError) as error:
        left_out.append(f"{shown}: damaged ({_why(error, file)})")
        return
    metrics = file.parent / METRICS
    try:
        curves = _curves(metrics.read_text(), record.headline) if metrics.exists() else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        left_out.append(f"{shown.removesuffix(RESULT)}{METRICS}: damaged, so there are no curves of this run")
        curves = {}
    records.append(replace(record, curves=curves, shown=_shown_examples(file.parent, shown, left_out)))


def _shown_examples(run: Path, shown: str, left_out: list[str]) -> dict[str, Any]:
    """Returns the predictions on a few test examples that a run wrote, by model."""
    found = {}
    for path in sorted((run / SHOWN).glob("*.json")):
        try:
            found[path.stem] = read_json(path)
        except FileError:
            left_out.append(f"{shown.removesuffix(RESULT)}{SHOWN}/{path.name}: damaged, so it is not shown")
    return found


def _read_export(file: Path, shown: str, records: list[Record], left_out: list[str]) -> None:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        left_out.append(f"{shown}: damaged ({_why(error, file)})")
        return
    if not isinstance(content, list):
        left_out.append(f"{shown}: not a list of results")
        return
    for number, item in enumerate(content, 1):
        try:
            inner = item.get("source", number) if isinstance(item, dict) else number
            records.append(checked(parse({**item, "source": f"{shown}#{inner}"})))
        except (TypeError, ValueError) as error:
            left_out.append(f"{shown}, result {number}: damaged ({_why(error, file)})")


def _curves(text: str, headline: str) -> Curves:
    curves: Curves = {}
    for line in text.splitlines():
        row = json.loads(line)
        measured = row.get(f"validation_{headline}", math.nan)  # not every epoch is evaluated
        values = {"epoch": row["epoch"], "loss": row["loss"], "validation": measured}
        stage = curves.setdefault(str(row["stage"]), {name: [] for name in values})
        for name, value in values.items():
            stage[name].append(float(f"{value:.6g}"))
    return curves


def _unique(records: list[Record], left_out: list[str]) -> Collected:
    """Sorts the records; a run that was read twice, or repeated with the same recipe and seed, counts once."""
    seen: dict[tuple[str, float], Record] = {}
    for record in sorted(records, key=order):
        # Two checkpoints may have the same file name, but hardly the same accuracy.
        identity = json.dumps(record.recipe, sort_keys=True, default=str), record.value(record.dense)
        first = seen.setdefault(identity, record)
        if first is not record and first.source != record.source:
            left_out.append(f"{record.source}: the same recipe and seed as {first.source}, counted once")
    return Collected(tuple(seen.values()), tuple(sorted(set(left_out))))


def _shown(path: Path) -> str:
    """Returns a path as given if it does not reveal the machine, else its last part."""
    plain = not path.is_absolute() and ".." not in path.parts and path.parts and "~" not in path.parts[0]
    return path.as_posix() if plain else path.resolve().name


def _shown_below(shown: str, relative: PurePath) -> str:
    return f"{shown}/{relative.as_posix()}" if relative.parts else shown


def _why(error: Exception, file: Path) -> str:
    """Returns an error's text without the path of the file, which is named elsewhere and may reveal the machine."""
    return without_paths(str(error).replace(str(file), file.name).split("\n")[0])
