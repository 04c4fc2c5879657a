"""Sections: a family's additions to a report, as one value. `results.md`, the page and the figures loop over them.

A new family writes one file that calls `register`, and no shared file changes:

    >>> from microglia.report.cells import of_words
    >>> def tables(group):
    ...     return [Table(("method",), tuple((row, [of_words(row.method)]) for row in group.rows), words=("method",))]
    >>> toy = Section("toy", tables=tables)
    >>> toy.name
    'toy'
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from microglia.core.registry import Registry
from microglia.report.cells import Entry, markdown_table
from microglia.report.chart import Chart
from microglia.report.families import Family, families
from microglia.report.rows import Group, Row


@dataclass(frozen=True)
class Table:
    """A table of a section; a table without rows is left out.

    Attributes:
        columns: Titles of the columns.
        rows: The runs of each row, and its cells.
        words: Titles of the text columns, which are aligned to the left.
        explained: Explanation above the table.
    """

    columns: Sequence[str]
    rows: Sequence[tuple[Row, Sequence[Entry]]]
    words: Sequence[str] = ()
    explained: str = ""

    def without_empty(self, title: str) -> Table:
        """Returns the table without a column whose cells are all empty."""
        place = list(self.columns).index(title)
        if any(entries[place].text for _, entries in self.rows):
            return self
        rows = [(row, [*entries[:place], *entries[place + 1 :]]) for row, entries in self.rows]
        return replace(self, columns=[*self.columns[:place], *self.columns[place + 1 :]], rows=rows)

    def markdown(self) -> list[str]:
        """Returns the lines of the table in Markdown, with an empty line at the end."""
        above = [self.explained, ""] if self.explained else []
        return [*above, *markdown_table(self.columns, [entries for _, entries in self.rows], self.words), ""]


@dataclass(frozen=True)
class Picture:
    """A figure of a section.

    Attributes:
        name: End of the file name, unique in the report; letters and digits.
        caption: Description for readers who do not see the figure.
        chart: The figure.
        paper: Whether it is also written as PNG and SVG; the page has every figure.
    """

    name: str
    caption: str
    chart: Chart
    paper: bool = True


def nothing(group: Group) -> tuple[()]:
    """Returns no table and no figure."""
    return ()


@dataclass(frozen=True)
class Section:
    """A family's additions to a report.

    Attributes:
        name: Unique name.
        applies: Tells whether the section has content for a task.
        tables: Returns the section's tables for a task.
        pictures: Returns the section's figures for a task.
        family: Labels and counts of the family's runs, if the usual ones do not describe them.
    """

    name: str
    applies: Callable[[Group], bool] = lambda group: True
    tables: Callable[[Group], Iterable[Table]] = nothing
    pictures: Callable[[Group], Iterable[Picture]] = nothing
    family: Family | None = None


sections: Registry[Section] = Registry("section")
"""Every section by name, in the order of the report."""


def register(section: Section) -> Section:
    """Adds a section to every report from here on, and returns it.

    Raises:
        ValueError: A section with this name exists.
    """
    sections.add(section.name)(section)
    if section.family is not None:
        families.append(section.family)
    return section


def tables_of(group: Group) -> Iterator[Table]:
    """Returns the tables with rows of every section that applies to a task, the overview first."""
    for section in _applying(group):
        yield from (table for table in section.tables(group) if table.rows)


def pictures_of(group: Group) -> Iterator[Picture]:
    """Returns the figures of every section that applies to a task."""
    for section in _applying(group):
        yield from section.pictures(group)


def _applying(group: Group) -> Iterator[Section]:
    return (section for _, section in sections.items() if section.applies(group))
