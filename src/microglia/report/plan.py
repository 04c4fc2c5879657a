"""The table of a sweep's cells, before or while they run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.table import Column, Table

from microglia.lab.sweep_grid import Cell, Sweep
from microglia.report.known import known_at


def plan_table(sweep: Sweep, out: str | Path | None = None, known: Mapping[str, str] | None = None) -> Table:
    """Returns the cells as a table for people; with the sweep's directory also which of them are finished.

    Args:
        sweep: The sweep.
        out: Its directory.
        known: See `microglia.report.known.known_identities`.
    """
    table = Table(
        Column("cell", overflow="fold"),
        *sweep.grid,
        *(["state"] if out is not None else []),
        title=f"{sweep.name}: {len(sweep.cells)} runs",
    )
    for cell in sweep.cells:
        state = [] if out is None else [_state(cell, Path(out), known or {})]
        table.add_row(cell.name, *(str(value) for value in cell.values.values()), *state)
    return table


def _state(cell: Cell, out: Path, known: Mapping[str, str]) -> str:
    if (out / cell.name / "result.json").is_file():
        return "finished"
    place = known_at(cell, known)
    return "to run" if place is None else f"known: {place}"
