"""Progress of long work: a bar where a person looks on, else a line now and then in the log.

The rooms say what they do with `progress_bar`; how it is shown is decided once, by `show_with`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType

EVERY = 30.0
"""Seconds between two lines of a log."""
log = logging.getLogger("microglia.progress")


class Bar:
    """Progress as lines of the logger ``microglia.progress``, one each `EVERY` seconds; a context manager.

    Args:
        title: Short name of the work.
        total: Number of steps; 0 if it is not known yet.
        done: Steps that were finished before.
    """

    def __init__(self, title: str, total: int = 0, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self.said, self._last = "", time.monotonic()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        return None

    def advance(self) -> None:
        """Counts one step."""
        self.at(self.done + 1, self.total)

    def at(self, done: int, total: int) -> None:
        """Sets the number of finished steps and of all steps."""
        self.done, self.total = done, total
        if time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            log.info("%s: %d of %d%s", self.title, done, total, f", {self.said}" if self.said else "")

    def say(self, text: str) -> None:
        """Sets a word to show beside the bar."""
        self.said = text


Display = Callable[[str, int, int], Bar]
_display: list[Display] = [Bar]


def progress_bar(title: str, total: int = 0, done: int = 0) -> Bar:
    """Shows the progress of some work.

    Example:
        >>> with progress_bar("search", 2) as bar:
        ...     bar.advance()
        >>> bar.done
        1
    """
    return _display[-1](title, total, done)


def show_with(display: Display) -> None:
    """Shows all progress from here on with another kind of bar."""
    _display[:] = [display]
