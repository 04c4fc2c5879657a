"""The command `sweep`: a grid of recipes, or a queue of studies, on this machine or on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microglia.cli.app import command
from microglia.cli.options import Json, Shown
from microglia.cluster import launcher_of
from microglia.core.errors import MicrogliaError
from microglia.lab.sweep import run_sweep
from microglia.lab.sweep_grid import read_sweep
from microglia.report.known import known_identities, known_lines
from microglia.report.plan import plan_table
from microglia.studies.evidence.files import is_queue, read_queue
from microglia.studies.evidence.ledger import Ledger
from microglia.studies.evidence.plan import Planner
from microglia.studies.evidence.queue import STARTS, run_queue
from microglia.studies.evidence.status import status_of, status_table

RESULTS = Path("results")
"""Default folder of finished results that a project keeps, such as those of `microglia report --export`."""


@command
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML with base and grid, or a queue of studies with parts.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as base.seed=1.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the runs; default runs/NAME.")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time; default 1, all on a cluster, for a queue as it says.", min=1)
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="List the runs only.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List what is done and what is left; a queue with its hours.")] = False,
    launcher: Annotated[str | None, typer.Option(help="Where runs go: local (the default), ray, slurm.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--launcher-setting", metavar="KEY=VALUE", help="Such as address=10.0.0.1:6379.")
    ] = None,
    kept: Annotated[
        Path, typer.Option("--known", help="Folder or file of kept results: a cell with the same recipe does not run.")
    ] = RESULTS,
    again: Annotated[bool, typer.Option("--again", help="Run also the cells whose results are known.")] = False,
    json_: Json = False,
) -> Shown:
    """Run a grid of recipes, each a durable run; finished ones are not run again."""
    if is_queue(file):
        if launcher is not None or again:
            option = "--launcher" if launcher is not None else "--again"
            raise MicrogliaError(f"A queue runs on this machine, by what its ledger lacks: leave {option} out.")
        return _queue(file, overrides or [], out, jobs, only_list=list_ or dry_run)
    planned = read_sweep(file, overrides or [])
    directory = out if out is not None else Path("runs") / planned.name
    if dry_run and not list_:
        return [cell.name for cell in planned.cells], [plan_table(planned)]
    known = known_identities([] if again or (kept == RESULTS and not kept.is_dir()) else [kept])
    if list_:
        return [cell.name for cell in planned.cells], [plan_table(planned, directory, known)]
    place = launcher_of(launcher, settings or ())
    for line in known_lines(planned, directory, known):
        typer.echo(line, err=True)
    try:
        outcome = run_sweep(planned, directory, jobs=jobs, launcher=place, known=known)
    finally:
        if place is not None:
            place.close()
    if outcome.failed:
        typer.echo(outcome.sentence, err=True)
    return outcome.to_dict(), [outcome.sentence]


def _queue(file: Path, overrides: list[str], out: Path | None, jobs: int | None, *, only_list: bool) -> Shown:
    """Runs a queue of studies, or lists what it has done and left."""
    if overrides:
        raise MicrogliaError(f"A queue takes no KEY=VALUE; got {overrides[0]}. Change {file} or a study beside it.")
    queue = read_queue(file)
    directory = out if out is not None else Path("runs") / queue.name
    if only_list:
        ledger = Ledger.read(queue.ledger)
        status = status_of(queue, ledger, Planner(queue, ledger, directory / STARTS))
        return status.to_dict(), [status_table(status), status.sentence]
    outcome = run_queue(queue, directory, jobs)
    if outcome.failed:
        typer.echo(outcome.sentence, err=True)
    return outcome.to_dict(), [outcome.sentence]
