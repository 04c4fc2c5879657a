"""Claim: a ResNet-56 with half of its operations, recovered and in int8, keeps its accuracy through the exported file.

CIFAR-10 and a trained checkpoint. Each step (dense, half of the FLOPs, recovered for some hundred steps, int8) is written
as an OpenVINO file, and that file is evaluated on the whole test split by OpenVINO: accuracy, milliseconds of one image with
one thread (all files interleaved in one process, medians), bytes. Weights are chosen by magnitude, no choice looks at test
images, int8 is calibrated on training images and held to a limit on validation images. Last line: milliseconds of the dense
file / of the last one. Everything is kept in ``--out``: killed and started again, it continues with the same bits.
Run: ``MICROGLIA_DATA=... python benchmarks/export_accuracy.py --checkpoint resnet56.th``
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import microglia as mg
from microglia.cli.exporting import int8_of
from microglia.cli.exporting import recovered as recovered_int8
from microglia.core.restore import restore
from microglia.core.timing import processor_name, time_interleaved
from microglia.export import Int8, open_openvino
from microglia.storage.run import Progress, Run
from microglia.tasks import image_task
from microglia.train.recover import recalibrate_on

SHOWN = ("out", "threads", "rounds")
"""Arguments on which the accuracies do not depend."""


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs all steps, prints the table and the ratio, and returns the rows."""
    arguments = parsed(words)
    torch.set_num_threads(arguments.threads)
    recipe = {key: str(value) for key, value in vars(arguments).items() if key not in SHOWN}
    run = Run(arguments.out, {"benchmark": recipe})
    task = image_task(arguments.model, arguments.data, checkpoint=arguments.checkpoint, normalize=arguments.normalize)
    dense = task.build()
    small = mg.prune_channels(dense, task.example, mg.Budget(flops=arguments.flops), round_to=arguments.round_to)
    rows = {
        "dense": row(run, "dense", dense, task, arguments),
        f"{arguments.flops:g} of the FLOPs": row(run, "cut", small, task, arguments),
    }
    restore(small, recovered(run, small, dense, task, arguments))
    rows[f"recovered, {arguments.steps} steps"] = row(run, "recovered", small, task, arguments)
    rows["recovered, int8"] = row(run, "int8", small, task, arguments, int8=True)
    run.close()
    show(task, rows, arguments)
    return rows


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="trained weights of the model")
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--normalize", default="imagenet", help="statistics that the checkpoint was trained with")
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--round-to", type=int, default=4, help="channels are removed in multiples")
    parser.add_argument("--steps", type=int, default=400, help="of the recovery, batch 128")
    parser.add_argument("--epoch", type=int, default=50, help="steps between two states that a killed recovery continues from")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--limit", type=int, help="test batches of 256 to evaluate on; all by default")
    parser.add_argument("--max-drop", type=float, default=0.01, help="validation accuracy that int8 may cost")
    parser.add_argument("--recover", type=int, default=0, help="steps with rounded layers where int8 costs more")
    parser.add_argument("--threads", type=int, default=2, help="of the recovery; files are timed with one")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("runs/export_accuracy"))
    return parser.parse_args(words)


def recovered(run: Run, small: nn.Module, dense: nn.Module, task: mg.Task, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the state of the model after its statistics were estimated anew and it was trained; a finished one is read."""
    epochs = max(1, round(arguments.steps / arguments.epoch))
    each = -(-arguments.steps // epochs)
    config = mg.FitConfig(epochs=epochs, max_batches=each, lr=arguments.lr, distill=0.5, evaluate_every=epochs)

    def train(progress: Progress) -> dict[str, Any]:
        start = time.perf_counter()
        recalibrate_on(small, task, batch_size=128)
        mg.fit(small, task, config, teacher=dense, progress=progress)
        print(f"recovered in {time.perf_counter() - start:.0f} s", flush=True)
        return {"model": small.state_dict()}

    return run.stage("recovered", train)["model"]


def row(run: Run, name: str, model: nn.Module, task: mg.Task, arguments: argparse.Namespace, *, int8: bool = False) -> Any:
    """Returns what the file of one step came to, once it is written and evaluated; a finished one is read."""
    path = arguments.out / f"{name}.xml"

    def write(progress: Progress) -> dict[str, Any]:
        start = time.perf_counter()
        inputs = [inputs for inputs, _ in islice(task.data.batches("test", 16).epoch(0), 2)]
        file = mg.export(model, path, task.example, data=inputs, int8=rounding(task, arguments) if int8 else None)
        accuracy = mg.evaluate(file.open(), task, "test", limit=arguments.limit)[task.headline]
        print(f"{name}: {accuracy:.4f}, written and evaluated in {time.perf_counter() - start:.0f} s", flush=True)
        rounded = None if file.int8 is None else json.dumps(file.int8.to_dict())
        return {"accuracy": accuracy, "bytes": file.bytes, "difference": file.difference, "int8": rounded}

    return {**run.stage(f"file-{name}", write), "path": path}


def rounding(task: mg.Task, arguments: argparse.Namespace) -> Int8:
    """Returns the wish for int8, with a training on rounded layers where it is asked for and needed."""
    place = arguments.out / "int8-recovery"
    recover = partial(recovered_int8, task=task, steps=arguments.recover, place=place) if arguments.recover else None
    return replace(int8_of(task, max_drop=arguments.max_drop), recover=recover)


def show(task: mg.Task, rows: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Times every file, and prints the table and the ratio."""
    example = task.example
    opened = {step: open_openvino(own["path"], threads=1) for step, own in rows.items()}
    calls = {step: lambda engine=engine: engine(example) for step, engine in opened.items()}
    times = time_interleaved(calls, rounds=arguments.rounds)
    title = f"{task.name}, through {next(iter(opened.values())).engine}, batch 1, one thread, {processor_name()}"
    table = Table("step", "accuracy, %", "ms", "bytes", "difference to torch", title=title)
    for step, own in rows.items():
        cells = (f"{100 * own['accuracy']:.2f}", f"{times[step].median:.3f}", f"{own['bytes']:,}", f"{own['difference']:.1e}")
        table.add_row(step, *cells)
    Console(width=130).print(table)
    print(f"int8: {next(own['int8'] for own in rows.values() if own['int8'])}")
    first, *_, last = rows
    print(f"ratio: {times[first].median / times[last].median:.4f}")


if __name__ == "__main__":
    main()
