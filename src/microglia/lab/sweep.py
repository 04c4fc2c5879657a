"""Sweeps: a grid of recipes; each cell is a separate durable run that is never done twice."""

from __future__ import annotations

import fcntl
import math
import os
import shlex
import sys
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from microglia.core.errors import MicrogliaError, RunError
from microglia.core.processes import Children, cores, signals_raise
from microglia.lab.recipe import as_dict, begun, identity_of, read_yaml, resolve
from microglia.lab.sweep_grid import Cell, Sweep, cells, read_sweep
from microglia.storage.files import write_atomic
from microglia.storage.run import flatten
from microglia.zoo.trust import needs_trust

__all__ = ["Cell", "CellOutcome", "Children", "Sweep", "SweepOutcome", "cells", "read_sweep", "run_cell", "run_sweep"]

STARTS = ".starts"
"""Directory, in that of a sweep, of the dense networks that cells share."""
CELL = "cell.yaml"
"""The recipe at the start of a cell; ``recipe.yaml`` appears beside it once the recipe fits model and data."""


@dataclass(frozen=True)
class CellOutcome:
    """The outcome of a cell.

    Attributes:
        name: Name of the cell.
        status: ``skipped`` if it was finished before, ``known`` if its result is kept elsewhere.
        seconds: Time spent on it now.
        problem: The last lines of the log of a failed cell.
    """

    name: str
    status: Literal["done", "skipped", "known", "failed"]
    seconds: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class SweepOutcome:
    """The outcome of a sweep, in the order of its cells.

    Attributes:
        directory: Directory of the runs, each under its cell's name.
        cells: Every cell.
    """

    directory: Path
    cells: tuple[CellOutcome, ...]

    @property
    def done(self) -> list[str]:
        """Names of the cells that ran now."""
        return [cell.name for cell in self.cells if cell.status == "done"]

    @property
    def skipped(self) -> list[str]:
        """Names of the cells that were finished before, or whose results are known."""
        return [cell.name for cell in self.cells if cell.status in ("skipped", "known")]

    @property
    def failed(self) -> list[str]:
        """Names of the cells that failed."""
        return [cell.name for cell in self.cells if cell.status == "failed"]

    @property
    def sentence(self) -> str:
        """Summary for a reader: the counts, and each failed cell with the end of its log."""
        known = f" ({kept} known from elsewhere)" if (kept := sum(c.status == "known" for c in self.cells)) else ""
        lines = [f"{self.directory}: {len(self.done)} done, {len(self.skipped)} skipped{known}, {len(self.failed)} failed."]
        for cell in self.cells:
            if cell.status == "failed":
                lines += [f"{cell.name} failed ({self.directory / cell.name / 'log.txt'} ends with):"]
                lines += [f"    {line}" for line in cell.problem.splitlines()]
        return "\n".join([*lines, "Start the same command again to try these once more."] if self.failed else lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, JSON-ready."""
        return {"directory": str(self.directory), "cells": [asdict(cell) for cell in self.cells]}


class Launcher(Protocol):
    """Where cells run; see `microglia.cluster`. Several threads call it, ``jobs`` where the user names no number."""

    jobs: int

    def run(self, cell: Cell, directory: Path, *, starts: Path | None = None) -> CellOutcome:
        """Runs a cell to its end in a directory; see `run_cell`."""
        ...

    def stop(self) -> None:
        """Ends every cell immediately."""
        ...

    def close(self) -> None:
        """Leaves the place."""
        ...


def run_cell(
    cell: Cell,
    directory: Path,
    *,
    threads: int | None = None,
    children: Children | None = None,
    starts: Path | None = None,
) -> CellOutcome:
    """Runs one cell to its end as ``microglia prune`` in its own process.

    If a process of an earlier sweep still works on the cell, this waits for it.

    Args:
        cell: The cell to run.
        directory: Directory of the run; its output is in ``log.txt`` there.
        threads: CPU threads of the process, or None for torch's choice.
        children: Registry of the process while it runs.
        starts: Directory in which cells share the dense networks they start from.
    """
    children, began = children or Children(), time.monotonic()
    own = {"PYTHONUNBUFFERED": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads is not None else {})
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / ".cell.lock").open("w") as lock, (directory / "log.txt").open("a") as log:
            _wait_for(lock, children)
            if (directory / "result.json").is_file():
                return CellOutcome(cell.name, "skipped", round(time.monotonic() - began, 2))
            recipe = directory / CELL
            write_atomic(recipe, yaml.safe_dump(as_dict(cell.recipe), sort_keys=False))
            command = [sys.executable, "-m", "microglia", "prune", "--recipe", str(recipe), "--out", str(directory)]
            command += ["--trust"] if needs_trust(as_dict(cell.recipe)) else []  # `read_sweep` checked trust
            command += [*(["--starts", str(starts)] if starts is not None else []), "--json"]
            start = log.seek(0, os.SEEK_END)
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            status = children.run(command, log, lock, {**os.environ, **own})
    except (OSError, MicrogliaError) as error:
        return CellOutcome(cell.name, "failed", round(time.monotonic() - began, 2), str(error))
    seconds = round(time.monotonic() - began, 2)
    if status == 0 and (directory / "result.json").is_file():
        return CellOutcome(cell.name, "done", seconds)
    ended = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return CellOutcome(cell.name, "failed", seconds, f"{_tail(directory / 'log.txt', start)}\n({ended})".strip())


def _wait_for(lock: TextIO, children: Children) -> None:
    """Takes the lock of a cell once no process works on it, or returns when the sweep stops."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if children.stopped.wait(0.2):
                return


def _tail(log: Path, start: int, lines: int = 8, width: int = 400) -> str:
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    return "\n".join(line[:width] for line in text.splitlines()[1:][-lines:])


def run_sweep(
    sweep: Sweep, out: str | Path, jobs: int | None = None, launcher: Launcher | None = None, known: Collection[str] = ()
) -> SweepOutcome:
    """Runs every unfinished cell, ``jobs`` at a time; a failed cell does not stop the others.

    Cells with the same model, data, dense training and seed share one dense network, which the first of them trains.
    A sweep can be killed at any moment and started again: finished cells are skipped and interrupted ones resume.

    Args:
        sweep: The sweep to run.
        out: Directory of the runs, each under its cell's name.
        jobs: Runs at a time; each gets its share of the cores of this machine. None for one, or as many as the launcher takes.
        launcher: Runs the cells elsewhere; None for processes of this machine.
        known: Identities (`microglia.lab.recipe.identity_of`) of recipes that do not run, unless they name code of one's own.

    Raises:
        RunError: The directory holds runs of other recipes under the same names.
        KeyboardInterrupt: Ctrl-C; as after SIGTERM (``SystemExit``), every child was ended first.
    """
    if (jobs := jobs if jobs is not None else 1 if launcher is None else launcher.jobs) < 1:
        raise RunError(f"jobs is the number of runs at a time, 1 or more; got {jobs}.")
    out, chosen, children = Path(out), sweep.cells, Children()
    _refuse_other_recipes(chosen, out)
    write_atomic(out / "sweep.yaml", yaml.safe_dump(asdict(sweep), sort_keys=False))
    threads = max(1, cores() // jobs)
    outcomes = {c.name: CellOutcome(c.name, "skipped") for c in chosen if (out / c.name / "result.json").is_file()}
    ours = (c for c in chosen if known and c.name not in outcomes and not needs_trust(as_dict(c.recipe)))
    outcomes |= {c.name: CellOutcome(c.name, "known") for c in ours if identity_of(c.recipe) in known}
    left = [cell for cell in chosen if cell.name not in outcomes]
    with signals_raise(), _progress() as progress, ThreadPoolExecutor(jobs) as pool:
        try:
            bar = progress.add_task(sweep.name, total=len(chosen), completed=len(outcomes))
            progress.advance(bar, 0)  # the time starts here
            run = partial(run_cell, threads=threads, children=children) if launcher is None else launcher.run
            futures = [pool.submit(run, cell, out / cell.name, starts=out / STARTS) for cell in left]
            for future in as_completed(futures):
                outcome = outcomes[future.result().name] = future.result()
                progress.advance(bar)
                progress.console.print(
                    f"{outcome.status} {outcome.name} ({outcome.seconds:.0f} s)", markup=False, highlight=False
                )
        except BaseException:
            (launcher or children).stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return SweepOutcome(out, tuple(outcomes[cell.name] for cell in chosen))


def _refuse_other_recipes(chosen: Sequence[Cell], out: Path) -> None:
    for cell in chosen:
        path = out / cell.name / "recipe.yaml"
        if not path.is_file():
            continue
        before, now = flatten(as_dict(resolve(read_yaml(path)))), flatten(as_dict(begun(cell.recipe, path.parent)))
        changed = [f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
        if changed:
            raise RunError(
                f"{path.parent} holds a run of another recipe ({'; '.join(changed[:5])}). Give --out another directory, or "
                "remove this one."
            )


def _progress() -> Progress:
    """Returns a bar on standard error; the remaining time is estimated over the whole sweep, because a cell may take hours."""
    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True, speed_estimate_period=math.inf)
