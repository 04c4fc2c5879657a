"""Claim: a training step in bfloat16 is much faster on a processor that computes in it, and much slower on others.

A batch of 128 images of 32x32, channels last as the library makes them, one thread, both values of ``train.precision`` in turns
in one process, medians of the steps. Native are AMX and AVX-512 BF16.

Last line: float32 / bfloat16. Run: ``python benchmarks/training_step.py --model resnet20``.
"""

from __future__ import annotations

import argparse
import statistics
import time

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
    task, images = mg.tasks.image_task("lenet-300-100", "digits"), torch.randn(128, 3, 32, 32)
    batch = images.contiguous(memory_format=torch.channels_last), torch.arange(128) % 10
    steps = {}
    for precision in ("float32", "bfloat16"):
        model = build(asked.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        steps[precision] = Step(task, model, [optimizer], objective(task), torch.device("cpu"), precision)
    times: dict[str, list[float]] = {precision: [] for precision in steps}
    for number in range(asked.rounds + 1):
        for precision, step in steps.items():
            begun = time.perf_counter()
            step(batch, diverged="The loss became {loss}.")
            if number:  # the first round warms up
                times[precision].append(1000 * (time.perf_counter() - begun))
    middle = {precision: statistics.median(each) for precision, each in times.items()}
    title = f"A training step of {asked.model}, batch 128, one thread, {processor_name()}"
    table = Table("precision", "ms", title=title, title_justify="left")
    for precision, ms in middle.items():
        table.add_row(precision, f"{ms:.0f}")
    Console().print(table)
    print(f"ratio: {middle['float32'] / middle['bfloat16']:.2f}")


if __name__ == "__main__":
    main()
