"""What every command of the command line shares: the application, its options, and how values and errors are printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer
from rich.console import Console

from microglia.core.errors import MicrogliaError
from microglia.train.engine import rank_and_world

app = typer.Typer(
    help="Prune any PyTorch model, see it get measurably faster and smaller, and load the result anywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Shown = tuple[Any, list[Any]]
"""What a command returns: a JSON-ready value, and what a person sees instead."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")]
Data = Annotated[str | None, typer.Option(help="digits, cifar10, mnist, hf:NAME or a folder.")]
Checkpoint = Annotated[str | None, typer.Option(help="File with trained weights.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
DeviceName = Annotated[str | None, typer.Option("--device", help="cpu, cuda or auto; default the recipe's.")]
SplitName = Annotated[str, typer.Option("--split", help="train, validation or test.")]
Target = Annotated[str, typer.Argument(help="A run directory, a saved model's directory, or a model's name.")]


def command(function: Callable[..., Shown]) -> Callable[..., Any]:
    """Registers a command that prints what it returns; errors of the user's making end in one sentence and status 1."""

    @wraps(function)
    def printed(*args: Any, **kwargs: Any) -> None:
        as_json = kwargs["json_"]
        try:
            value, shown = function(*args, **kwargs)
        except MicrogliaError as error:
            if as_json:
                typer.echo(json.dumps({"error": str(error)}))
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted; start the same command again to go on.", err=True)
            raise typer.Exit(130) from None
        if rank_and_world()[0] != 0:
            return
        if as_json:
            typer.echo(json.dumps(value))
            return
        console = Console()
        for thing in shown:
            console.print(thing, highlight=False, soft_wrap=isinstance(thing, str))

    return app.command()(printed)
