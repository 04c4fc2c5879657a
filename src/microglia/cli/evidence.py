"""The command `evidence`: the overview of a queue's results, statement by statement."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from microglia.cli.app import Json, Shown, command
from microglia.storage.files import write_atomic
from microglia.studies.evidence.files import read_queue
from microglia.studies.evidence.ledger import Ledger
from microglia.studies.evidence.overview import overview
from microglia.studies.evidence.statements import read_statements
from microglia.studies.evidence.status import status_of

STATEMENTS = "statements.yaml"
"""File of the statements, beside the queue."""


@command
def evidence(
    queue: Annotated[Path, typer.Argument(help="YAML of the queue; the statements are beside it.")],
    out: Annotated[Path, typer.Option(help="Markdown file to write.")] = Path("docs/evidence.md"),
    json_: Json = False,
) -> Shown:
    """Write the overview of a queue: each statement with what was run, its outcome and error; tables; what is left."""
    planned = read_queue(queue)
    ledger, statements = Ledger.read(planned.ledger), read_statements(queue.parent / STATEMENTS, planned)
    shown = Path(os.path.relpath(planned.ledger)).as_posix(), queue.as_posix()
    write_atomic(out, overview(planned, ledger, statements, shown))
    status = status_of(planned, ledger)
    return {"page": str(out), **status.to_dict()}, [f"{out}: {len(statements)} statements. {status.sentence}"]
