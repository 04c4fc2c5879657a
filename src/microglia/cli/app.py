"""The common parts of the command line: the application, its options, and the output of values and errors."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
from collections.abc import Callable
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
from microglia.cli.options import Json, Shown
from microglia.core.errors import MicrogliaError


class LazyGroup(TyperGroup):
    """The commands of `COMMANDS`, each imported when it is called, and other registered commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._add_studies()
        known = dict(self.commands)
        listed = {
            name: known.pop(name) if name in known else TyperCommand(name, help=of.sentence, rich_help_panel=of.panel)
            for name, of in COMMANDS.items()
        }
        self.commands = {**listed, **known}

    def _add_studies(self) -> None:
        """Adds the commands of studies that another package registered, also after this group was built (``--import``)."""
        base = sys.modules.get("microglia.studies.study")  # imported by now if a study was registered
        for name, study in base.studies.items() if base is not None else ():
            if name not in COMMANDS and name not in self.commands:
                from microglia.cli.derive import derived  # imports torch, which `microglia --help` does not need

                command(derived(study), example=study.example or None)
                self.commands[name] = _registered(name)

    def list_commands(self, ctx: Any) -> list[str]:
        """Returns the names of all commands, with those of studies from outside."""
        self._add_studies()
        return super().list_commands(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Imports the called command, then returns it as the base class does."""
        self._add_studies()
        name = args[0]
        if name in COMMANDS and self.commands[name].callback is None:
            self.commands[name] = _imported(name)
        return super().resolve_command(ctx, args)


__all__ = ["Json", "LazyGroup", "Shown", "app", "command", "main"]

app = typer.Typer(
    cls=LazyGroup,
    help="Prune any PyTorch model, see it get measurably faster and smaller, and load the result anywhere.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

BARS = ("microglia.epochs", "microglia.progress")
"""Loggers whose lines a terminal does not need, because it shows bars."""
IMPORTS = "MICROGLIA_IMPORT"
IMPORT = "Import a module of your own that registers scores, methods, changes, sections or studies. No file can name one here."
Trust = Annotated[bool, typer.Option("--trust", help="Build whatever model a file names, also by its own code.")]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"microglia {microglia.__version__}")
        raise typer.Exit


def _import_modules(names: list[str] | None) -> list[str] | None:
    for name in names or []:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module was found; an import inside it failed
            typer.echo(f"error: There is no module {name!r} to import: is its folder on PYTHONPATH?", err=True)
            raise typer.Exit(1) from None
    if names:  # the runs of a sweep are processes of their own
        os.environ[IMPORTS] = " ".join(names)
    return names


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE", envvar=IMPORTS, callback=_import_modules, is_eager=True, help=IMPORT),
    ] = None,
) -> None:
    """Prune any PyTorch model, see it get measurably faster and smaller, and load the result anywhere."""


def command(
    function: Callable[..., Shown], *, example: str | None = None, kind: type[TyperCommand] | None = None
) -> Callable[..., Any]:
    """Registers a command that prints its result; a user's error ends in one sentence and status 1.

    Args:
        function: The command; its docstring is the help text and its arguments are the options.
        example: A command line for the end of the help text.
        kind: Class of the command; None for the usual one.
    """

    @wraps(function)
    def printed(*args: Any, **kwargs: Any) -> None:
        from microglia.train.engine import rank_and_world  # imports torch, which `microglia --help` does not need
        from microglia.zoo.trust import trusting

        show_log()
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
    return app.command(cls=kind, rich_help_panel=panel, epilog=example and f"Example: [bold]{example}[/bold]")(printed)


def show_log() -> None:
    """Shows what is logged on standard error: on a terminal, which has bars, resumed and finished stages; else epochs too."""
    logger = logging.getLogger("microglia")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Shown) for handler in logger.handlers):
        logger.addHandler(_Shown())


class _Shown(logging.Handler):
    """Writes each record as one plain line; the stream is looked up each time, because tests and notebooks replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name in BARS and sys.stderr.isatty():
            return
        sys.stderr.write(f"{record.getMessage()}\n")
        sys.stderr.flush()


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

    The current folder is last on the import path, so that ``mynet:MyNet`` is found there but hides no library.
    """
    sys.path.append(str(Path.cwd()))
    app(prog_name="microglia")
