"""A group of commands that lists all of them without importing any: ``microglia --help`` waits for no torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from typer import main as typer_main
from typer.core import TyperCommand, TyperGroup

PRUNE, LOOK, STUDIES = "Prune", "Look and compare", "Studies"


class Listed(NamedTuple):
    """What the list of commands says of one.

    Attributes:
        module: Module of this package that registers the command.
        panel: Heading under which ``microglia --help`` lists it.
        sentence: First line of its docstring.
    """

    module: str
    panel: str
    sentence: str


COMMANDS = {
    "prune": Listed("commands", PRUNE, "Prune a model on data: load or train it, prune, recover, measure, save."),
    "shrink": Listed(
        "commands", PRUNE, "Remove masked channels physically: a smaller model, proved equal, saved beside the masked one."
    ),
    "sweep": Listed("commands", PRUNE, "Run a grid of recipes, each a durable run; what is finished is not run again."),
    "demo": Listed(
        "commands", PRUNE, "Take all three roads on real 8x8 digits: masks, removed channels, accelerated blocks; one table."
    ),
    "eval": Listed("commands", LOOK, "Evaluate a run, a saved model or a checkpoint."),
    "measure": Listed("commands", LOOK, "Measure a run, a saved model or a network: parameters, MACs, latency, bytes."),
    "report": Listed("commands", LOOK, "Collect runs into Markdown tables, figures and one interactive HTML page."),
    "methods": Listed("commands", LOOK, "List the methods and scores there are, with their defaults."),
    "recipe": Listed("commands", LOOK, "Print a recipe with every default filled in, or the JSON schema of recipes."),
    "routes": Listed(
        "commands", STUDIES, "Show which filters each input uses in a dynamically pruned network: tables and pictures."
    ),
    "shifts": Listed(
        "commands",
        STUDIES,
        "Compare accuracy and operations on clean and on noisy, blurred, compressed and pale test images.",
    ),
    "connect": Listed(
        "connect",
        STUDIES,
        "Connect two trained networks: how high is the loss on the straight line, and on a curve trained between them?",
    ),
    "surface": Listed(
        "surface", STUDIES, "Picture the loss around a network: a plane of contours and a line, filter-normalized."
    ),
    "descent": Listed(
        "surface",
        STUDIES,
        "Train networks of growing width, or on growing data, with noisy labels: does the test error rise and fall again?",
    ),
    "instability": Listed(
        "instability",
        STUDIES,
        "Train two copies from each of some epochs on with other noise, and walk the straight line between them.",
    ),
    "tickets": Listed(
        "tickets",
        STUDIES,
        "Find lottery tickets and train their controls: iterative, one-shot, other initial weights, random masks.",
    ),
}
"""The commands of this package. Another package registers its own with `microglia.cli.app.command`."""


class LazyGroup(TyperGroup):
    """The commands of `COMMANDS`, each imported when it is called, and whatever else was registered."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
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


def _imported(name: str) -> Any:
    """Imports the module of a command and returns the command that it registered."""
    from microglia.cli.app import app

    import_module(f"microglia.cli.{COMMANDS[name].module}")
    info = next(info for info in app.registered_commands if info.callback is not None and info.callback.__name__ == name)
    return typer_main.get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode="rich")
