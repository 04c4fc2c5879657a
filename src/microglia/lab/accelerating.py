"""Acceleration of a task's model, with a check on its data that no prediction changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from microglia.runtime import Accelerated, accelerate
from microglia.runtime.accelerate import DENSE
from microglia.runtime.precisions import EXAMPLES, precision_of
from microglia.tasks.task import Task
from microglia.train.agreement import agreement


def accelerated(
    model: nn.Module,
    task: Task,
    batch: int,
    *,
    against: str | Sequence[str] = DENSE,
    precision: str = "float32",
    rounds: int = 9,
) -> tuple[Accelerated, dict[str, Any]]:
    """Returns a model in its fastest execution for batches of a size, and the record of it.

    Args:
        model: A masked or shrunk model on the CPU.
        task: The task with its data.
        batch: Examples per call.
        against: The dense executions of the comparison.
        precision: ``float32``; or ``bf16`` or ``int8`` to time that too. Int8 is calibrated on training examples.
        rounds: Rounds of every timing.

    Returns:
        The accelerated model; and what `AccelerationReport.to_dict` says, with how many predictions on the test split
        agree (``agreement``), for classification.
    """
    example = task.example_batch(batch)
    calibrated = precision_of(precision).calibrated
    seen = (inputs for inputs, _ in task.data.batches("train", EXAMPLES, shuffle=True).epoch(0)) if calibrated else None
    fast = accelerate(model, example, against=against, precision=precision, calibration=seen, rounds=rounds)
    return fast, {**fast.report().to_dict(), "batch": batch, "agreement": agreement(model, fast, task, batch)}
