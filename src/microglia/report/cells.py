"""Cells: numbers of a report as text, with what they are sorted by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from microglia.report.spread import Spread


@dataclass(frozen=True)
class Entry:
    """One cell of a table: the text, and the number or text that it is sorted by."""

    text: str
    order: float | str

    @property
    def number(self) -> bool:
        """Whether it is sorted by a number."""
        return isinstance(self.order, int | float)

    @property
    def key(self) -> str:
        """What it is sorted by, as JavaScript reads it."""
        return str(self.order).replace("inf", "Infinity") if self.number else str(self.order)


def of_words(text: str) -> Entry:
    """Returns a cell of words."""
    return Entry(text, text)


def of_spread(values: Spread | None, scale: float, signed: bool = False) -> Entry:
    """Returns a cell of mean and deviation, both times ``scale``; empty where there is none."""
    if values is None:
        return Entry("", float("-inf"))
    places = 2 if scale == 100 else 4
    sign = "+" if signed else ""
    deviation = "" if values.deviation is None else f" ± {values.deviation * scale:.{places}f}"
    return Entry(f"{values.mean * scale:{sign}.{places}f}{deviation}", values.mean)


def of_ratio(value: float | None) -> Entry:
    """Returns a cell of a ratio; None is infinite."""
    return Entry("infinite", float("inf")) if value is None else Entry(f"{value:.2f}x", value)


def of_count(value: float) -> Entry:
    """Returns a cell of a number of things."""
    return Entry(f"{value:,.0f}", value)


def escaped(text: str) -> str:
    """Returns a text that cannot break a Markdown table or page."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def count_runs(number: int) -> str:
    """Returns so many runs."""
    return f"{number} run" if number == 1 else f"{number} runs"


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[Entry]], words: Iterable[str]) -> list[str]:
    """Returns the lines of a Markdown table.

    Args:
        titles: Of the columns.
        rows: Their cells.
        words: Titles of the columns that hold no numbers, and stand to the left.
    """
    left = frozenset(words)
    sides = ["---" if title in left else "---:" for title in titles]
    body = [[escaped(entry.text) for entry in entries] for entries in rows]
    return [f"| {' | '.join(cells)} |" for cells in ([escaped(title) for title in titles], sides, *body)]
