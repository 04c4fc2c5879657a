"""Accelerating what a task serves, and proving on its data that no prediction changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from microglia.core.modes import evaluating
from microglia.runtime import Accelerated, accelerate
from microglia.runtime.accelerate import DENSE
from microglia.runtime.report import is_dense
from microglia.tasks.task import Task
from microglia.train.progress import Bar

Json = dict[str, Any]


def accelerated(
    model: nn.Module, task: Task, batch: int, *, against: Sequence[str] = DENSE, precision: str = "float32", rounds: int = 9
) -> tuple[Accelerated, Json]:
    """Returns a model in its fastest execution for batches of a size, and the record of it.

    Args:
        model: A masked or shrunk model on the CPU.
        task: Its data.
        batch: Examples of a call.
        against: The dense executions that it must not be slower than.
        precision: ``float32``, or ``bf16`` to try that too.
        rounds: Of every timing.

    Returns:
        The accelerated model; and what `AccelerationReport.to_dict` says, with how many predictions on the test split
        agree (``agreement``), for classification.
    """
    example = task.example.repeat(batch, *[1] * (task.example.ndim - 1))
    with Bar("accelerate: layers", 0) as bar:
        fast = accelerate(model, example, against=against, precision=precision, rounds=rounds, progress=bar.at)
    return fast, {**fast.report().to_dict(), "batch": batch, "agreement": agreement(model, fast, task, batch)}


def agreement(model: nn.Module, fast: nn.Module, task: Task, batch: int) -> Json | None:
    """Returns how many images of the test split both models put in the same class; None where they do not classify.

    The last images are repeated to fill their batch, for a smaller one would run in the dense model.

    Returns:
        ``images``, ``equal``, ``correct`` (of the first and of the second model) and the largest ``difference`` of outputs.
    """
    images = equal = 0
    correct, difference = [0, 0], 0.0
    with torch.no_grad(), evaluating(model):
        for inputs, targets in task.data.batches("test", batch).epoch(0):
            count = len(inputs)
            filled = inputs[torch.arange(batch) % count]
            outputs = [one(filled) for one in (model, fast)]
            if not all(isinstance(out, Tensor) and out.ndim == 2 for out in outputs) or targets.ndim != 1:
                return None
            classes = [out[:count].argmax(1) for out in outputs]
            images += count
            equal += int((classes[0] == classes[1]).sum())
            correct = [right + int((own == targets).sum()) for right, own in zip(correct, classes, strict=True)]
            difference = max(difference, float((outputs[0] - outputs[1]).abs().max()))
    return {"images": images, "equal": equal, "correct": correct, "difference": difference}


def acceleration_tables(record: Json) -> list[Any]:
    """Returns what a person reads: how many layers run which way, the times of the whole, and the agreement."""
    ways: dict[str, list[Json]] = {}
    for layer in record["layers"]:
        ways.setdefault(layer["chosen"], []).append(layer)
    layers = Table("layers run as", "how many", "ms", "dense, ms", title="Accelerated")
    for way, own in sorted(ways.items()):
        dense = sum(min(time for name, time in layer["times"].items() if is_dense(name)) for layer in own)
        layers.add_row(way, str(len(own)), f"{sum(layer['times'][way] for layer in own):.3f}", f"{dense:.3f}")
    how = f"{record.get('precision', 'float32')}, batch {record['batch']}, {record['threads']} thread(s)"
    title = f"The whole model, {how}, kernels: {record['level']}"
    whole = Table("execution", "ms", "", title=title)
    for name, time in sorted(record["times"].items(), key=lambda item: item[1]):
        mark = f"chosen: {record['speedup']:.2f}x the best dense ({record['best_dense']})" if name == record["chosen"] else ""
        whole.add_row(name, f"{time:.3f}", mark)
    return [layers, whole, *record["notes"], *_agreed(record["agreement"])]


def _agreed(found: Json | None) -> list[str]:
    if found is None:
        return []
    accuracy = [f"{100 * count / found['images']:.2f} %" for count in found["correct"]]
    return [
        f"The same class on {found['equal']:,} of {found['images']:,} test images; accuracy {accuracy[0]} before and "
        f"{accuracy[1]} accelerated; outputs differ by {found['difference']:.1e} at most."
    ]
