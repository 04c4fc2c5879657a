"""The list of commands with their help sentences, so that ``microglia --help`` imports neither them nor torch."""

from __future__ import annotations

from typing import NamedTuple

from microglia.studies.listed import LISTED

PRUNE, LOOK, STUDIES = "Prune", "Look and compare", "Studies"


class Listed(NamedTuple):
    """Entry of one command in the list.

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
    "accelerate": Listed(
        "accelerating",
        PRUNE,
        "Choose a model's fastest execution by timing, and save it with its kernels: it is loaded without timing.",
    ),
    "export": Listed(
        "export", PRUNE, "Write a run's model as a file of another engine, compared with the model before it counts as written."
    ),
    "pack": Listed(
        "packing",
        PRUNE,
        "Write a model as one small file: shared values and positions, coded; nothing is rounded without --bits or --bytes.",
    ),
    "unpack": Listed(
        "packing", PRUNE, "Read a packed file and save its model, bit for bit, as a directory that every command takes."
    ),
    "push": Listed("sharing", PRUNE, "Write a model with its card to a repository of the Hugging Face hub."),
    "sweep": Listed("sweeping", PRUNE, "Run a grid of recipes, each a durable run; finished ones are not run again."),
    "demo": Listed(
        "demo", PRUNE, "Take all three roads on real 8x8 digits: masks, removed channels, accelerated blocks; one table."
    ),
    "eval": Listed("commands", LOOK, "Evaluate a run, a saved model or a checkpoint."),
    "measure": Listed("commands", LOOK, "Measure a run, a saved model or a network: parameters, MACs, latency, bytes."),
    "inspect": Listed(
        "packing", LOOK, "Show what a packed file holds: layers, density, bits by part, codebook, share of the file."
    ),
    "eie": Listed(
        "packing", LOOK, "Show what a packed file costs on EIE: cycles, balance, frames/s and energy of its linear layers."
    ),
    "report": Listed("commands", LOOK, "Collect runs into Markdown tables, figures and one interactive HTML page."),
    "evidence": Listed(
        "evidence",
        LOOK,
        "Write the overview of a queue: each statement with what was run, its outcome and error; tables; what is left.",
    ),
    "methods": Listed("commands", LOOK, "List the methods and scores: what each is for, its paper, its defaults."),
    "recipe": Listed("commands", LOOK, "Print a recipe with every default filled in, or the JSON schema of recipes."),
    "doctor": Listed(
        "doctor",
        LOOK,
        "List what is installed and what is missing: kernels, torch, devices, extras, each with the command that installs it.",
    ),
    **{name: Listed("studies", STUDIES, place.sentence) for name, place in LISTED.items()},
}
"""The commands of this package. Another package registers its own with `microglia.cli.app.command`."""
