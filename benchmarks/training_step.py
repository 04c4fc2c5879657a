"""Claim: a training step on a CPU is faster with channels last, and much faster in bfloat16 where the processor computes in it.

Batch 128 of 32x32 images, one thread, the settings of `FitConfig` in turns in one process, medians of the steps. bfloat16 pays
on processors with AMX or AVX-512 BF16; on others it is several times slower, and the table shows it.

Last line: float32 with channels first / the fastest. Run: ``python benchmarks/training_step.py --model resnet20``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import product

import torch
from rich.console import Console
from rich.table import Table

import microglia as mg
from microglia.core.timing import processor_name
from microglia.train.step import Step, objective
from microglia.zoo.builder import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task, batch = mg.tasks.image_task("lenet-300-100", "digits"), (torch.randn(128, 3, 32, 32), torch.arange(128) % 10)
    steps = {}
    for precision, last in product(("float32", "bfloat16"), (False, True)):
        model = build(asked.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        words = f"{precision}, channels {'last' if last else 'first'}"
        steps[words] = Step(task, model, [optimizer], objective(task), torch.device("cpu"), precision, channels_last=last)
    times: dict[str, list[float]] = {words: [] for words in steps}
    for number in range(asked.rounds + 1):
        for words, step in steps.items():
            begun = time.perf_counter()
            step(batch, diverged="The loss became {loss}.")
            if number:  # the first round warms up
                times[words].append(1000 * (time.perf_counter() - begun))
    middle = {words: statistics.median(each) for words, each in times.items()}
    usual = next(iter(middle.values()))
    title = f"A training step of {asked.model}, batch 128, one thread, {processor_name()}"
    table = Table("setting", "ms", "speed-up", title=title, title_justify="left")
    for words, ms in middle.items():
        table.add_row(words, f"{ms:.0f}", f"{usual / ms:.2f}")
    Console().print(table)
    print(f"ratio: {usual / min(middle.values()):.2f}")


if __name__ == "__main__":
    main()
