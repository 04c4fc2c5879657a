"""Agreement: the number of test examples with the same prediction of two models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import take_examples, tensors_of
from microglia.core.modes import evaluating
from microglia.tasks.task import Task

Json = dict[str, Any]


def agreement(model: nn.Module, fast: nn.Module, task: Task, batch: int) -> Json | None:
    """Returns the number of test examples on which both models agree by `Task.agree`; None if this is undefined.

    The last examples are repeated to fill their batch, because a smaller batch would run in the dense model.

    Returns:
        ``images``, ``equal``, ``correct`` (right classes of the first and of the second model; None if targets are not classes)
        and the maximum ``difference`` of outputs.
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
    """Returns the number of logits (batch, classes) whose arg-max is the label (batch,); None for other shapes."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or outputs.ndim != 2 or targets.ndim != 1:
        return None
    return int((outputs.argmax(1) == targets).sum())
