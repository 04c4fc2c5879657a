"""Reports: run directories to Markdown tables, figures and one interactive page."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from microglia.core.errors import FileError
from microglia.core.optional import needs
from microglia.report.read import Collected, read_results
from microglia.report.records import Record, export
from microglia.report.rows import groups
from microglia.report.section import pictures_of
from microglia.report.table import markdown
from microglia.storage.files import write_atomic

__all__ = ["Record", "Report", "collect", "export", "read_results", "report"]


@dataclass(frozen=True)
class Report:
    """The written report.

    Attributes:
        directory: Directory of the report.
        tables: ``results.md``.
        page: ``report.html``, which needs no other file.
        figures: PNG and SVG files.
        records: Number of runs in it.
        left_out: Results that were found but left out, with the reasons.
    """

    directory: Path
    tables: Path
    page: Path
    figures: tuple[Path, ...]
    records: int
    left_out: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """Summary for a reader."""
        first = f"{self.records} runs in {self.tables}, {self.page} and {len(self.figures)} figures."
        return "\n".join([first, *(f"left out: {line}" for line in self.left_out)])

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, JSON-ready."""
        files = {"tables": str(self.tables), "page": str(self.page), "figures": [str(figure) for figure in self.figures]}
        return {"directory": str(self.directory), **files, "records": self.records, "left_out": list(self.left_out)}


def collect(paths: Sequence[str | Path]) -> list[Record]:
    """Returns the records of all finished runs below paths, sorted, with a warning for each omitted result.

    Args:
        paths: Run directories, directories of them at any depth, and files that `export` wrote or directories of these.

    Raises:
        FileError: There is nothing at a path.
    """
    found = read_results(paths)
    for line in found.left_out:
        warnings.warn(f"left out: {line}", stacklevel=2)
    return list(found.records)


def report(paths: Sequence[str | Path], out: str | Path) -> Report:
    """Writes ``results.md``, ``figures/`` and ``report.html`` about all finished runs below paths.

    The same results give the same bytes of ``results.md``. Damaged and unfinished runs are named there and left out.

    Args:
        paths: As for `collect`.
        out: Directory to write to; an earlier report there is replaced.

    Raises:
        FileError: A path has no results, no run is finished, or the report cannot be written.
    """
    needs("report", "jinja2", "matplotlib", "plotly", what="A report")
    # Slow to import, but the command line imports this file for every command.
    from microglia.report.page import page
    from microglia.report.printed import save

    found = read_results(paths)
    _refuse_nothing(found, paths)
    out, tasks = Path(out), groups(found.records)
    figures = tuple(
        path
        for group in tasks
        for picture in pictures_of(group)
        if picture.paper
        for path in save(picture.chart, out / "figures", group.slug, picture.name)
    )
    tables, html = out / "results.md", out / "report.html"
    write_atomic(tables, markdown(found, tasks, [PurePath("figures") / figure.name for figure in figures]))
    write_atomic(html, page(found, tasks))
    return Report(out, tables, html, figures, len(found.records), found.left_out)


def _refuse_nothing(found: Collected, paths: Sequence[str | Path]) -> None:
    if not found.records:
        places = ", ".join(str(path) for path in paths) or "no path at all"
        reasons = f" Left out: {'; '.join(found.left_out)}." if found.left_out else ""
        raise FileError(f"There is no finished run (result.json) in {places}, so there is nothing to report.{reasons}")
