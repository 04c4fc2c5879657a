"""What the list of commands says of each, so that ``microglia --help`` imports none of them and waits for no torch."""

from __future__ import annotations

from typing import NamedTuple

from microglia.studies.listed import LISTED

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
        "demo", PRUNE, "Take all three roads on real 8x8 digits: masks, removed channels, accelerated blocks; one table."
    ),
    "eval": Listed("commands", LOOK, "Evaluate a run, a saved model or a checkpoint."),
    "measure": Listed("commands", LOOK, "Measure a run, a saved model or a network: parameters, MACs, latency, bytes."),
    "report": Listed("commands", LOOK, "Collect runs into Markdown tables, figures and one interactive HTML page."),
    "methods": Listed("commands", LOOK, "List the methods and scores there are, with their defaults."),
    "recipe": Listed("commands", LOOK, "Print a recipe with every default filled in, or the JSON schema of recipes."),
    "doctor": Listed(
        "doctor",
        LOOK,
        "Tell what is installed and what is missing: kernels, torch, devices, extras, each with the command that gets it.",
    ),
    "sensitivity": Listed(
        "sensitivity", STUDIES, "Show what each layer alone can lose: accuracy by layer and density, without retraining."
    ),
    **{name: Listed("studies", STUDIES, place.sentence) for name, place in LISTED.items()},
}
"""The commands of this package. Another package registers its own with `microglia.cli.app.command`."""
