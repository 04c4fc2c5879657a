"""The parts that all commands share: the application, its options, and how values and errors are printed."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import main as typer_main
from typer.core import TyperCommand, TyperGroup

import microglia
from microglia.cli.listed import COMMANDS, STUDIES
from microglia.core.errors import MicrogliaError
from microglia.studies.study import studies


class LazyGroup(TyperGroup):
    """The commands of `COMMANDS`, each imported when it is called, and whatever else was registered."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, study in studies.items():  # of another package, or of this one once it is imported
            if name not in COMMANDS and name not in self.commands:
                from microglia.cli.derive import derived  # imports torch, which `microglia --help` does without

                derived(study)
                self.commands[name] = _registered(name)
        known = dict(self.commands)
        listed = {
            name: known.pop(name) if name in known else TyperCommand(name, help=of.sentence, rich_help_panel=of.panel)
            for name, of in COMMANDS.items()
        }
        self.commands = {**listed, **known}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Imports the command that is called, then returns it as the base class does."""
        name = args[0]
        if name in COMMANDS and self.commands[name].callback is None:
            self.commands[name] = _imported(name)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=LazyGroup,
    help="Prune any PyTorch model, see it get measurably faster and smaller, and load the result anywhere.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Shown = tuple[Any, list[Any]]
"""The result of a command: a JSON-ready value, and the tables and sentences that a person sees instead."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")]
Trust = Annotated[bool, typer.Option("--trust", help="Build whatever model a file names, also by its own code.")]
Data = Annotated[str | None, typer.Option(help="digits, cifar10, mnist, hf:NAME or a folder.")]
Checkpoint = Annotated[str | None, typer.Option(help="File with trained weights.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")]
DeviceName = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, or auto: a GPU where there is one; default the recipe's.")
]
SplitName = Annotated[str, typer.Option("--split", help="train, validation or test.")]
Target = Annotated[str, typer.Argument(help="A run directory, a saved model's directory, or a model's name.")]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"microglia {microglia.__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Prune any PyTorch model, see it get measurably faster and smaller, and load the result anywhere."""


def command(function: Callable[..., Shown], *, example: str | None = None) -> Callable[..., Any]:
    """Registers a command that prints what it returns; errors of the user's making end in one sentence and status 1.

    Args:
        function: The command; its docstring is the help text and its arguments are the options.
        example: A command line that the help text ends with.
    """

    @wraps(function)
    def printed(*args: Any, **kwargs: Any) -> None:
        from microglia.train.engine import rank_and_world  # imports torch, which `microglia --help` does without
        from microglia.zoo.trust import trusting

        as_json = kwargs["json_"]
        try:
            with trusting(kwargs.pop("trust", False)):
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

    own = inspect.signature(function, eval_str=True)
    option = inspect.Parameter("trust", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Trust)
    printed.__signature__ = own.replace(parameters=[*own.parameters.values(), option])  # type: ignore[attr-defined]
    printed.__annotations__ = {**{name: p.annotation for name, p in own.parameters.items()}, "trust": Trust}
    panel = COMMANDS[function.__name__].panel if function.__name__ in COMMANDS else STUDIES
    return app.command(rich_help_panel=panel, epilog=example and f"Example: [bold]{example}[/bold]")(printed)


def given_recipe(
    source: Mapping[str, Any], words: Sequence[str], file: Path | None, *, typed: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a recipe with ``KEY=VALUE`` words put over it, once nothing in it that a file alone names may run code.

    Args:
        source: The recipe so far: the file, and the options over it.
        words: ``KEY=VALUE``, as typed.
        file: Where the recipe was read from, or None.
        typed: Options by key; what is None was not typed. Names that were typed are the user's own.

    Raises:
        FileError: The file names a model that it may not name without ``--trust``.
    """
    from microglia.lab.recipe import override
    from microglia.storage.code_folder import admit

    asked = override(source, words)
    if file is not None:
        own = {word.partition("=")[0] for word in words} | {key for key, value in typed.items() if value is not None}
        admit({key: value for key, value in asked.items() if key not in own}, file / "recipe.yaml" if file.is_dir() else file)
    return asked


def _imported(name: str) -> Any:
    """Imports the module of a command and returns the command that it registered."""
    import_module(f"microglia.cli.{COMMANDS[name].module}")
    return _registered(name)


def _registered(name: str) -> Any:
    """Returns the command of a name, once it is registered."""
    info = next(info for info in app.registered_commands if info.callback is not None and info.callback.__name__ == name)
    return typer_main.get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode="rich")


def main() -> None:
    """Runs the command line.

    The current folder comes last on the import path, so that ``mynet:MyNet`` is found there and hides no library.
    """
    sys.path.append(str(Path.cwd()))
    app(prog_name="microglia")
