"""Which method for what: a goal, the method to take, what was measured, and the command that prints it again.

A figure without a command is not here, and neither is a goal for which nothing was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from microglia.core.registry import Registry


@dataclass(frozen=True)
class Advice:
    """The answer for one goal.

    Attributes:
        wanted: The goal in the user's words.
        take: Methods, the best of the evidence first.
        command: A command to begin with.
        measured: Evidence for the first method, with numbers.
        page: Page of the documents with the whole table.
        shown: Command that prints the evidence again.
    """

    wanted: str
    take: tuple[str, ...]
    command: str
    measured: str
    page: str
    shown: str


advice: Registry[Advice] = Registry("goal")
"""Answers by the name of the goal; another package may add its own."""

advice.add("baseline")(
    Advice(
        "a first result, or the bar that another method has to pass",
        ("magnitude", "oneshot"),
        "microglia prune resnet20 --data cifar10 --method magnitude --density 0.5",
        "ResNet-20, half of the parameters, short training, two seeds: magnitude -0.92 points, gradient -2.97, random -27.5",
        "results.md",
        "microglia sweep recipes/shrinkbench_resnet20.yaml",
    )
)
advice.add("speed")(
    Advice(
        "speed in every engine and on every machine",
        ("channels",),
        "microglia prune resnet56 --data cifar10 --method channels --flops 0.5",
        "VGG-16, half of the operations: 19.9 to 11.4 ms, 1.75x; ResNet-56: 2.68 to 2.16 ms, 1.24x, -1.76 points",
        "results.md",
        "microglia report results --out report",
    )
)
advice.add("kernels")(
    Advice(
        "speed on this CPU by kernels that skip blocks, with more accuracy kept",
        ("smart", "global-magnitude", "awg"),
        "microglia prune resnet20 --data cifar10 --method smart --pattern block:16x8 --density 0.3 --accelerate",
        "ResNet-50, batch 1, blocks of 16x1 at density 0.3: 77.0 to 35.3 ms, 2.18x the best dense execution",
        "speed.md",
        "python benchmarks/resnet50_end_to_end.py",
    )
)
advice.add("file")(
    Advice(
        "the smallest file",
        ("deep-compression",),
        "microglia prune lenet-300-100 --data mnist --method deep-compression --density 0.075",
        "LeNet-300-100 on MNIST, three seeds: 43.4 times smaller at -0.02 points, 51.3 times at -0.06",
        "compression.md",
        "microglia sweep recipes/deep_compression/mnist_lenet_300_100.yaml",
    )
)
advice.add("language")(
    Advice(
        "a language model without training",
        ("sparsegpt",),
        "microglia prune hf:FOLDER --task language --text texts --method sparsegpt --pattern nm:2:4",
        "tiny Llama, 2:4, perplexity (dense 4.03): sparsegpt 4.22, magnitude 5.29, wanda 5.34",
        "language.md",
        "python benchmarks/tiny_llama.py",
    )
)
advice.add("encoder")(
    Advice(
        "an encoder of sentences without training",
        ("sparsegpt", "wanda"),
        "microglia prune hf:FOLDER --task embedding --text texts --method sparsegpt --density 0.5",
        "MiniLM, half of the weights, cosine to the dense embeddings: sparsegpt 0.934, wanda 0.858, magnitude 0.707",
        "language.md",
        "python benchmarks/minilm.py",
    )
)
advice.add("before-training")(
    Advice(
        "a sparse training from the first step",
        ("synflow", "snip"),
        "microglia prune lenet-300-100 --data digits --method synflow --density 0.05 dense.epochs=0",
        "Conv-6, one seed, 1 % of the weights: synflow 21.1 %, snip 18.8 %, random and magnitude 10 % (chance)",
        "basins.md",
        "microglia report results/conv6_at_init.json --out report",
    )
)


def advice_table(goal: str | None = None) -> Table:
    """Returns the answers as a table for people; only that of a goal if it is named.

    Raises:
        UnknownNameError: There is no such goal.
    """
    chosen = {goal: advice[goal]} if goal is not None else dict(advice.items())
    table = Table(
        "goal", "you want", "take", "begin with", "measured", "whole table", caption="Shown again by the last command."
    )
    for name, one in chosen.items():
        table.add_row(name, one.wanted, ", ".join(one.take), one.command, one.measured, f"docs/{one.page}\n{one.shown}")
    return table


def advice_page() -> str:
    """Returns the answers as a table of Markdown, for docs/choose.md."""
    lines = ["| goal | you want | take | measured | printed by |", "| --- | --- | --- | --- | --- |"]
    for name, one in advice.items():
        take = ", ".join(f"`{method}`" for method in one.take)
        lines.append(f"| `{name}` | {one.wanted} | {take} | {one.measured} ([table]({one.page})) | `{one.shown}` |")
    return "\n".join([*lines, ""])
