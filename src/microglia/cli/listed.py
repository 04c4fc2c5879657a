"""What the list of commands says of each, so that ``microglia --help`` imports none of them and waits for no torch."""

from __future__ import annotations

from typing import NamedTuple

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
    "export": Listed(
        "export", PRUNE, "Write a run's model as a file of another engine, compared with the model before it counts as written."
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
