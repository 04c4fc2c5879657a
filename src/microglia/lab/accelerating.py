"""Accelerating what a task serves, and proving on its data that no prediction changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from microglia.core.batch import take_examples, tensors_of
from microglia.core.modes import evaluating
from microglia.runtime import Accelerated, accelerate
from microglia.runtime.accelerate import DENSE
from microglia.runtime.report import is_dense
from microglia.tasks.task import Task
from microglia.train.progress import Bar

Json = dict[str, Any]


def accelerated(
    model: nn.Module,
    task: Task,
    batch: int,
    *,
    against: str | Sequence[str] = DENSE,
    precision: str = "float32",
    rounds: int = 9,
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
    example = task.example_batch(batch)
    with Bar("accelerate: layers", 0) as bar:
        fast = accelerate(model, example, against=against, precision=precision, rounds=rounds, progress=bar.at)
    return fast, {**fast.report().to_dict(), "batch": batch, "agreement": agreement(model, fast, task, batch)}


def agreement(model: nn.Module, fast: nn.Module, task: Task, batch: int) -> Json | None:
    """Returns on how many examples of the test split both models say the same by `Task.agree`; None where that is unknown.

    The last examples are repeated to fill their batch, for a smaller one would run in the dense model.

    Returns:
        ``images``, ``equal``, ``correct`` (right classes of the first and of the second model; None where targets are no
        classes) and the largest ``difference`` of outputs.
    """
    images = equal = 0
    correct: list[int] | None = [0, 0]
    difference = 0.0
    with torch.no_grad(), evaluating(model):
        for inputs, targets in task.data.batches("test", batch).epoch(0):
            count = task.count(targets)
            filled = take_examples(inputs, torch.arange(batch) % count)
            outputs = [task.forward(one, filled) for one in (model, fast)]
            first, second = (take_examples(out, torch.arange(count)) for out in outputs)
            if (agreed := task.agree(first, second)) is None:
                return None
            equal, images = equal + agreed[0], images + agreed[1]
            hits = [_right(own, targets) for own in (first, second)]
            correct = None if correct is None or None in hits else [old + new for old, new in zip(correct, hits, strict=True)]  # type: ignore[operator]
            pairs = zip(tensors_of(first), tensors_of(second), strict=True)
            difference = max([difference, *(float((one - other).abs().max()) for one, other in pairs)])
    return {"images": images, "equal": equal, "correct": correct, "difference": difference}


def _right(outputs: Any, targets: Any) -> int | None:
    """Returns how many logits (batch, classes) have their label (batch,) largest; None where these are no such ones."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or outputs.ndim != 2 or targets.ndim != 1:
        return None
    return int((outputs.argmax(1) == targets).sum())


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
    if found["correct"] is None:
        return [
            f"The same prediction on {found['equal']:,} of {found['images']:,} in the test split; outputs differ by "
            f"{found['difference']:.1e} at most."
        ]
    accuracy = [f"{100 * count / found['images']:.2f} %" for count in found["correct"]]
    return [
        f"The same class on {found['equal']:,} of {found['images']:,} test images; accuracy {accuracy[0]} before and "
        f"{accuracy[1]} accelerated; outputs differ by {found['difference']:.1e} at most."
    ]
