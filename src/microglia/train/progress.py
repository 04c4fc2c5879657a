"""The progress bar of long work: on standard error, with the remaining time, only on a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from microglia.train.engine import rank_and_world


class Bar:
    """A context manager around one rich progress bar; shown on an interactive terminal, by the first rank."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"),
            console=console,
            disable=not console.is_terminal or rank_and_world()[0] != 0,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, said="")

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """Counts one step."""
        self._bar.advance(self._task)

    def at(self, done: int, total: int) -> None:
        """Shows the number of finished steps and of all steps."""
        self._bar.update(self._task, completed=done, total=total)

    def say(self, text: str) -> None:
        """Shows a word beside the bar."""
        self._bar.update(self._task, said=text)
