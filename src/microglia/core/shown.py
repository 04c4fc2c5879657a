"""How values show themselves in a notebook: a small table of HTML, in the colors of the page around it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

LIMIT = 60
"""Rows that a table shows; a line says how many more there are."""


def html_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[object]], notes: Iterable[str] = ()) -> str:
    """Returns a table as HTML without scripts; every text is escaped.

    Args:
        title: Text above the table.
        heads: Titles of the columns.
        rows: Cells of each row; a float is shown with four digits, an integer with separators.
        notes: Lines below.

    Example:
        >>> html_table("Masks", ["layer", "kept"], [["a<b", 1000]]).count("a&lt;b")
        1
    """
    every = [list(row) for row in rows]
    cells = ["".join(_cell(value) for value in row) for row in every[:LIMIT]]
    below = [*notes, *([f"and {len(every) - LIMIT} more"] if len(every) > LIMIT else [])]
    head = "".join(f'<th style="text-align:left">{escape(name)}</th>' for name in heads)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    after = "".join(f"<div><small>{escape(line)}</small></div>" for line in below)
    caption = f'<caption style="text-align:left"><b>{escape(title)}</b></caption>'
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{after}"


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f'<td style="text-align:left">{escape("" if value is None else str(value))}</td>'
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f'<td style="text-align:right">{text}</td>'
