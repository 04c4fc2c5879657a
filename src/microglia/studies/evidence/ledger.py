"""The finished results of a queue: one JSON file a study, and one each for its pilots and for the dense starts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from microglia.core.errors import FileError, MicrogliaError
from microglia.lab.recipe import identity_of
from microglia.report.records import Record, parse
from microglia.storage.files import write_atomic
from microglia.studies.evidence.identity import recipe_of

STARTS, PILOTS, OWN = "starts", ".pilots", "evidence"
"""File of the starts, end of a file of pilots, and the key of our own entries in a cell's record."""


@dataclass(frozen=True)
class Entry:
    """The record of the queue about a finished run, beside its result.

    Attributes:
        identity: Identity of its recipe; for a start its name.
        study: Name of the study; empty for a start.
        row: Row of the table; for a start the model.
        values: Values of the grid, or those that a pilot tried.
        seed: Seed of the run.
        commit: Commit of the code that ran.
        seconds: Duration on one core without the dense start, over all attempts.
        epochs: Epochs of the run without its start.
        start: Digest of the dense network that it began from; for a start of its own.
        value: Headline metric: on validation images for a pilot, else on test images; None for a pilot that diverged.
        recipe: The recipe of a pilot or a start; a cell has it in its record.
    """

    __pydantic_config__ = ConfigDict(extra="ignore")

    identity: str
    study: str
    row: str
    values: dict[str, Any]
    seed: int
    commit: str
    seconds: float
    epochs: int
    start: str | None
    value: float | None
    recipe: dict[str, Any] = field(default_factory=dict)


_entry = TypeAdapter(Entry)


@dataclass
class Ledger:
    """The finished results in a directory, read once and appended to.

    Attributes:
        directory: The directory.
        starts: Starts by name.
        pilots: Pilots by identity.
        cells: Cells by identity.
        records: Records of the cells by identity.
    """

    directory: Path
    starts: dict[str, Entry] = field(default_factory=dict)
    pilots: dict[str, Entry] = field(default_factory=dict)
    cells: dict[str, Entry] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Ledger:
        """Returns the results of a directory; a missing one is empty.

        Raises:
            FileError: A file is damaged; the text names it.
        """
        ledger = cls(directory)
        for path in sorted(directory.glob("*.json")):
            for number, row in enumerate(_rows(path), 1):
                try:
                    ledger._take(path, row)
                except (ValueError, KeyError, TypeError) as error:
                    raise FileError(f"{path}, result {number}, is damaged ({str(error).splitlines()[0]}).") from None
        return ledger

    def _take(self, path: Path, row: Mapping[str, Any]) -> None:
        if path.stem == STARTS:
            entry = _checked(row)
            self.starts[entry.identity] = entry
        elif path.stem.endswith(PILOTS):
            entry = _checked(row)
            self.pilots |= dict.fromkeys((entry.identity, _now(entry.recipe) or entry.identity), entry)
        else:
            entry, record = _checked(row[OWN]), parse({**row, "source": path.name})
            for identity in (entry.identity, _now(record.recipe) or entry.identity):
                self.cells[identity], self.records[identity] = entry, record

    def holds(self, identity: str) -> bool:
        """Tells whether a cell is finished."""
        return identity in self.cells

    def pilot(self, identity: str) -> float | None:
        """Returns the headline metric of a pilot on validation images: NaN if it diverged, None if it is not finished."""
        entry = self.pilots.get(identity)
        return None if entry is None else math.nan if entry.value is None else entry.value

    def start(self, name: str) -> Entry | None:
        """Returns the entry of a start; None for one that was never trained."""
        return self.starts.get(name)

    def add_start(self, entry: Entry) -> None:
        """Appends a start; a start of the same name and other bits is kept beside the first one."""
        self.starts[entry.identity] = entry
        self._append(STARTS, asdict(entry))

    def add_pilot(self, entry: Entry) -> None:
        """Appends a pilot."""
        self.pilots[entry.identity] = entry
        self._append(f"{file_of(entry.study)}{PILOTS}", asdict(entry))

    def add_cell(self, entry: Entry, content: Mapping[str, Any]) -> None:
        """Appends a cell.

        Args:
            entry: Its entry.
            content: The JSON form of its record, as a report exports it.
        """
        self.cells[entry.identity], self.records[entry.identity] = entry, parse(content)
        self._append(file_of(entry.study), {OWN: {k: v for k, v in asdict(entry).items() if k != "recipe"}, **content})

    def _append(self, stem: str, row: Mapping[str, Any]) -> None:
        """Writes a file again with one row more, at once or not at all."""
        path = self.directory / f"{stem}.json"
        lines = [json.dumps(one, sort_keys=True) for one in [*_rows(path), row]]
        write_atomic(path, "[\n" + ",\n".join(lines) + "\n]\n")


def file_of(study: str) -> str:
    """Returns the name of a study's file without its suffix."""
    return study.replace("/", "_")


def _rows(path: Path) -> list[Any]:
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is damaged or no JSON file ({error}); take it back from its last commit.") from None
    if not isinstance(rows, list):
        raise FileError(f"{path} holds no list of results; take it back from its last commit.")
    return rows


def _checked(row: Any) -> Entry:
    try:
        entry: Entry = _entry.validate_python(row)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    return entry


def _now(recipe: Mapping[str, Any]) -> str | None:
    """Returns the identity that a stored recipe has in this version, which may know more fields; None if it is refused."""
    try:
        return identity_of(recipe_of(recipe))
    except MicrogliaError:
        return None
