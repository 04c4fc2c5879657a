"""Cells: numbers of a report as text, with their sort keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from microglia.report.spread import Spread


@dataclass(frozen=True)
class Entry:
    """One cell of a table: its text, and its sort key, a number or a text."""

    text: str
    order: float | str

    @property
    def number(self) -> bool:
        """Whether the sort key is a number."""
        return isinstance(self.order, int | float)

    @property
    def key(self) -> str:
        """The sort key in JavaScript's form."""
        return str(self.order).replace("inf", "Infinity") if self.number else str(self.order)


def of_words(text: str) -> Entry:
    """Returns a cell of text."""
    return Entry(text, text)


def of_spread(values: Spread | None, scale: float, signed: bool = False) -> Entry:
    """Returns a cell of mean and deviation, both times ``scale``; empty without values."""
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
    """Returns a cell of a count."""
    return Entry(f"{value:,.0f}", value)


def escaped(text: str) -> str:
    """Returns a text escaped for Markdown tables and pages."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def count_runs(number: int) -> str:
    """Returns "1 run" or "n runs"."""
    return f"{number} run" if number == 1 else f"{number} runs"


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[Entry]], words: Iterable[str]) -> list[str]:
    """Returns the lines of a Markdown table.

    Args:
        titles: Titles of the columns.
        rows: Cells of each row.
        words: Titles of the text columns, which are aligned to the left.
    """
    left = frozenset(words)
    sides = ["---" if title in left else "---:" for title in titles]
    body = [[escaped(entry.text) for entry in entries] for entries in rows]
    return [f"| {' | '.join(cells)} |" for cells in ([escaped(title) for title in titles], sides, *body)]
