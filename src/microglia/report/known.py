"""Results that are known already, by the identity of their recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from microglia.core.errors import MicrogliaError
from microglia.lab.recipe import as_dict, identity_of, resolve
from microglia.lab.sweep_grid import Cell, Sweep
from microglia.report.read import read_results
from microglia.zoo.trust import needs_trust


def known_identities(paths: Sequence[Path]) -> dict[str, str]:
    """Returns the identities of the recipes of results, each with its place, so that a sweep does not run them again.

    Args:
        paths: Run directories, or files and folders of results; see `microglia.report.read.read_results`.

    Raises:
        FileError: A path has no results.
    """
    found: dict[str, str] = {}
    for record in read_results(paths).records if paths else ():
        try:
            found.setdefault(identity_of(resolve(record.recipe)), record.source)
        except MicrogliaError:  # of a method or a field that this version does not have
            continue
    return found


def known_at(cell: Cell, known: Mapping[str, str]) -> str | None:
    """Returns the place of a cell's result that is kept elsewhere; None if the cell has to run."""
    return None if not known or needs_trust(as_dict(cell.recipe)) else known.get(identity_of(cell.recipe))


def known_lines(sweep: Sweep, out: Path, known: Mapping[str, str]) -> list[str]:
    """Returns a line for each unfinished cell of a sweep that is known: its place, and whether a name stands for a file."""
    lines = []
    for cell in sweep.cells:
        place = None if (out / cell.name / "result.json").is_file() else known_at(cell, known)
        if place is not None:
            by_name = "; its checkpoint is compared by name" if cell.recipe.checkpoint is not None else ""
            lines.append(f"known {cell.name}: {place}{by_name}")
    return lines
