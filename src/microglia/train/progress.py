"""The progress bar of a terminal or a notebook: with the remaining time, shown by the first rank."""

from __future__ import annotations

import html
import math
import sys
import time
from types import TracebackType
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from microglia.core.progress import Bar
from microglia.train.engine import rank_and_world


class Silent(Bar):
    """Shows nothing."""

    def at(self, done: int, total: int) -> None:
        """Sets the number of finished steps and of all steps."""
        self.done, self.total = done, total


class TerminalBar(Bar):
    """A bar of rich on standard error; while one is on the screen, those inside it are not shown.

    It is drawn by the calls alone, at most ten times in a second: a thread that draws would disturb what is being timed.
    """

    shown: ClassVar[int] = 0

    def __init__(self, title: str, total: int = 0, done: int = 0) -> None:
        super().__init__(title, total, done)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"),
            console=Console(stderr=True),
            disable=TerminalBar.shown > 0,
            transient=True,
            auto_refresh=False,
        )
        self._task, self._drawn = self._bar.add_task(title, total=total or None, completed=done, said=""), -math.inf

    def __enter__(self) -> TerminalBar:
        TerminalBar.shown += 1
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        TerminalBar.shown -= 1
        self._bar.stop()

    def at(self, done: int, total: int) -> None:
        """Sets the number of finished steps and of all steps."""
        self.done, self.total = done, total
        self._bar.update(self._task, completed=done, total=total or None)
        self._draw()

    def say(self, text: str) -> None:
        """Sets a word to show beside the bar."""
        self.said = text
        self._bar.update(self._task, said=text)
        self._draw()

    def _draw(self) -> None:
        if time.monotonic() - self._drawn >= 0.1:
            self._drawn = time.monotonic()
            self._bar.refresh()


class NotebookBar(Bar):
    """A bar of HTML below the cell of a notebook, drawn again at most five times in a second."""

    def __enter__(self) -> NotebookBar:
        self._handle, self._drawn = _display(self._html()), time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._draw()

    def at(self, done: int, total: int) -> None:
        """Sets the number of finished steps and of all steps."""
        self.done, self.total = done, total
        if time.monotonic() - self._drawn > 0.2:
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._handle.update({"text/html": self._html(), "text/plain": self._text()}, raw=True)

    def _text(self) -> str:
        return f"{self.title}: {self.done} of {self.total} {self.said}".rstrip()

    def _html(self) -> str:
        return f'<progress value="{self.done}" max="{max(1, self.total)}"></progress> {html.escape(self._text())}'


def _display(text: str) -> Any:
    from IPython.display import HTML, display  # it is there, for this is a notebook

    return display(HTML(text), display_id=True)


def _in_notebook() -> bool:
    """Tells whether a kernel of Jupyter runs this process; nothing is imported for the answer."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def fitting(title: str, total: int = 0, done: int = 0) -> Bar:
    """Returns the bar that fits: on the first rank that of a notebook or a terminal, else lines of the log."""
    if rank_and_world()[0] != 0:
        return Silent(title, total, done)
    if _in_notebook():
        return NotebookBar(title, total, done)
    return (TerminalBar if Console(stderr=True).is_terminal else Bar)(title, total, done)
