"""The table of a sweep's cells, before or while they run."""

from __future__ import annotations

from pathlib import Path

from rich.table import Column, Table

from microglia.lab.sweep_grid import Sweep


def plan_table(sweep: Sweep, out: str | Path | None = None) -> Table:
    """Returns the cells as a table for people; with the sweep's directory also which of them are finished."""
    table = Table(
        Column("cell", overflow="fold"),
        *sweep.grid,
        *(["state"] if out is not None else []),
        title=f"{sweep.name}: {len(sweep.cells)} runs",
    )
    for cell in sweep.cells:
        state = [] if out is None else ["finished" if (Path(out) / cell.name / "result.json").is_file() else "to run"]
        table.add_row(cell.name, *(str(value) for value in cell.values.values()), *state)
    return table
