"""Claim: a ResNet-56 with half of its operations, recovered and in int8, keeps its accuracy through the exported file.

CIFAR-10 and a trained checkpoint. Each step (dense, half of the FLOPs, recovered for some hundred steps, int8) is written
as an OpenVINO file, and that file is evaluated on the test split by OpenVINO: accuracy, milliseconds of one image with one
thread (all files interleaved in one process, medians), bytes. Last line: milliseconds of the dense file / of the last one.
Run: ``MICROGLIA_DATA=... python benchmarks/export_accuracy.py --checkpoint resnet56.th``
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import microglia as mg
from microglia.cli.exporting import int8_of
from microglia.core.timing import processor_name, time_interleaved
from microglia.export import Export
from microglia.tasks import image_task
from microglia.train.recover import recalibrate_on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="trained weights of the model")
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--normalize", default="imagenet", help="statistics that the checkpoint was trained with")
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--round-to", type=int, default=4, help="channels are removed in multiples")
    parser.add_argument("--steps", type=int, default=400, help="of the recovery, batch 128")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--limit", type=int, help="test batches of 256 to evaluate on; all by default")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = image_task(arguments.model, arguments.data, checkpoint=arguments.checkpoint, normalize=arguments.normalize)
    dense = task.build()
    inputs = [inputs for inputs, _ in islice(task.data.batches("test", 16).epoch(0), 2)]
    with tempfile.TemporaryDirectory() as name:
        folder, files = Path(name), {}

        def write(step: str, model: torch.nn.Module, **settings: object) -> None:
            file = folder / f"{len(files)}.xml"
            files[step] = mg.export(model, file, task.example, data=inputs, **settings)
            print(f"{step}: written", flush=True)

        write("dense", dense)
        small = mg.prune_channels(dense, task.example, mg.Budget(flops=arguments.flops), round_to=arguments.round_to)
        write(f"{arguments.flops:g} of the FLOPs", small)
        recalibrate_on(small, task, batch_size=128)
        config = mg.FitConfig(epochs=1, max_batches=arguments.steps, lr=arguments.lr, distill=0.5)
        mg.fit(small, task, config, teacher=dense)
        write(f"recovered, {arguments.steps} steps", small)
        write("recovered, int8", small, int8=int8_of(task))
        show(task, files, arguments)


def show(task: mg.Task, files: dict[str, Export], arguments: argparse.Namespace) -> None:
    """Evaluates and times every file, and prints the table and the ratio."""
    opened = {step: file.open() for step, file in files.items()}
    example = task.example
    times = time_interleaved({step: lambda engine=engine: engine(example) for step, engine in opened.items()},
                             rounds=arguments.rounds)  # fmt: skip
    title = f"{task.name}, through {next(iter(files.values())).engine}, batch 1, one thread, {processor_name()}"
    table = Table("step", "accuracy, %", "ms", "bytes", "difference to torch", title=title)
    for step, engine in opened.items():
        found = mg.evaluate(engine, task, "test", limit=arguments.limit)[task.headline]
        file = files[step]
        table.add_row(step, f"{100 * found:.2f}", f"{times[step].median:.3f}", f"{file.bytes:,}", f"{file.difference:.1e}")
    Console(width=130).print(table)
    print(next(file.int8 for file in files.values() if file.int8 is not None))
    names = list(files)
    print(f"ratio: {times[names[0]].median / times[names[-1]].median:.4f}")


if __name__ == "__main__":
    main()
