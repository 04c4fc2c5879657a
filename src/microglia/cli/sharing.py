"""The command `push`: a model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microglia.cli.app import Json, Shown, command
from microglia.report import hub


@command
def push(
    target: Annotated[Path, typer.Argument(help="A run directory or a saved model's.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Model of Microglia",
    json_: Json = False,
) -> Shown:
    """Write a model with its card to a repository of the Hugging Face hub."""
    address = hub.push(target, repository, private=private, message=message)
    return {"commit": address}, [f"Commit: {address}", f'Load it: mg.load("hub:{repository.removeprefix("hub:")}")']
