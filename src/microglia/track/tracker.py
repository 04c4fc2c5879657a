"""The base of the trackers, and their registry."""

from __future__ import annotations

import json
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from microglia.core.callbacks import Callback, numbers
from microglia.core.errors import MicrogliaError
from microglia.core.optional import needs
from microglia.core.registry import Registry
from microglia.storage.files import write_atomic
from microglia.storage.run import flatten, read_json

KNOWN = "tracking.json"
"""File of a run directory with the run's name in each store, so that a resumed run goes on there."""


class TrackingError(MicrogliaError):
    """A store of a tracker that cannot be opened; the text says which."""


@dataclass(frozen=True)
class Place:
    """The run, as a tracker sees it.

    Attributes:
        directory: The run directory.
        name: Name for readers.
        settings: The recipe, nested.
    """

    directory: Path
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def flat(self) -> dict[str, Any]:
        """The recipe with dotted keys, without what is not set."""
        return {key: value for key, value in flatten(self.settings).items() if value not in (None, (), [], {})}

    def known(self) -> dict[str, str]:
        """Returns the run's names in the stores that it was written to before, by tracker."""
        path = self.directory / KNOWN
        return {key: str(value) for key, value in read_json(path).items()} if path.exists() else {}

    def remember(self, tracker: str, name: str) -> None:
        """Keeps the run's name in a store."""
        write_atomic(self.directory / KNOWN, json.dumps({**self.known(), tracker: name}, indent=2) + "\n")


class Tracker(Callback):
    """A store that follows a run; a subclass says how it is opened, written and closed.

    An error of the store after its opening gives one warning. The tracker is then left out, and the run goes on.

    Attributes:
        name: Name in recipes.
        modules: Modules that it imports, of the extra ``track``.
        finished: Whether the run has its result; `end` of another run closes one that was stopped or failed.
    """

    name: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()

    def __init__(self, place: Place) -> None:
        self.place, self._lost, self.finished = place, False, False
        needs("track", *self.modules, what=f"The tracker {self.name}")
        try:
            self.open()
        except MicrogliaError:
            raise
        except Exception as error:
            raise TrackingError(f"The tracker {self.name} cannot be opened: {brief(error)}. {self.remedy()}") from error

    @abstractmethod
    def open(self) -> None:
        """Opens the store, for a new run or one that goes on."""

    @abstractmethod
    def write(self, values: Mapping[str, float], epoch: int | None) -> None:
        """Writes numbers, by name such as ``train/loss``.

        Args:
            values: The numbers.
            epoch: Epoch of the stage, from 1; None for numbers of the whole run.
        """

    def end(self) -> None:
        """Closes the store."""

    def remedy(self) -> str:
        """Returns what the user can do where the store cannot be opened."""
        return f"Leave {self.name} out of `track`, or make its store reachable; nothing was trained yet."

    def on_epoch(self, stage: str, row: Mapping[str, Any]) -> None:  # noqa: D102
        found = {f"{stage}/{name}": value for name, value in numbers(row).items() if name != "epoch"}
        self._safely(lambda: self.write(found, int(row.get("epoch", 0))))

    def on_result(self, result: Mapping[str, Any]) -> None:  # noqa: D102
        self.finished = True
        self._safely(lambda: self.write(summary(result), None))

    def close(self) -> None:  # noqa: D102
        self._safely(self.end)

    def _safely(self, work: Callable[[], None]) -> None:
        """Does some work of the store; the first error gives a warning, and nothing is done from then on."""
        if self._lost:
            return
        try:
            work()
        except Exception as error:
            self._lost = True
            text = f"The tracker {self.name} failed and is left out: {brief(error)}. The run goes on; its files are complete."
            warnings.warn(text, stacklevel=4)


trackers: Registry[Callable[[Place], Tracker]] = Registry("tracker")
"""Trackers by name; another package may add its own."""


def opened(names: Sequence[str], place: Place) -> list[Tracker]:
    """Returns the open trackers of a run.

    Raises:
        UnknownNameError: A name is not that of a tracker.
        MissingLibraryError: A library is not installed.
        TrackingError: A store cannot be opened.
    """
    made: list[Tracker] = []
    try:
        made.extend(trackers[name](place) for name in dict.fromkeys(names))
    except Exception:
        for tracker in made:
            tracker.close()
        raise
    return made


def summary(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a result by name, such as ``pruned/accuracy`` and ``pruned/bytes``."""
    found: dict[str, float] = {}
    for side in ("dense", "before", "pruned"):
        if isinstance(part := result.get(side), Mapping):
            flat = {**part, **part.get("metrics", {})}
            found |= {f"{side}/{name}": value for name, value in numbers(flat).items()}
    return found | {name: value for name, value in numbers(result).items() if name in ("seconds", "saved")}


def brief(error: BaseException) -> str:
    """Returns the first line of an error's text, at most 200 characters, without a full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(". ")
