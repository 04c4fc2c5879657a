"""Evaluation: a task's metrics on one split."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from microglia.core.devices import device_of
from microglia.core.modes import evaluating
from microglia.tasks.task import Split, Task
from microglia.train.engine import rank_and_world


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    split: Split = "test",
    *,
    batch_size: int = 256,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Returns the task's metrics on a split, over all ranks; the modes of the model are left as they were.

    Args:
        model: Anything that maps the task's inputs to its outputs.
        task: Data and metrics.
        split: Which part of the data.
        batch_size: Examples in a forward pass of each rank.
        limit: Batches to look at, drawn from the split by ``seed``; None for all of it.
        seed: See ``limit``.
    """
    rank, world = rank_and_world()
    device = device_of(model)
    sums: dict[str, Tensor] = {}
    batches = task.data.batches(split, batch_size * world, seed=seed, shuffle=limit is not None, rank=rank, world=world)
    with evaluating(model):
        for inputs, targets in islice(batches.epoch(0), limit):
            if not len(targets):  # the last batch may leave nothing for this rank
                continue
            outputs, targets = model(inputs.to(device)), targets.to(device)  # noqa: PLW2901
            for name, metric in task.metrics.items():
                statistics = metric.statistics(outputs, targets)
                sums[name] = sums[name] + statistics if name in sums else statistics
    if world > 1:
        for total in sums.values():
            torch.distributed.all_reduce(total)
    return {name: task.metrics[name].value(total) for name, total in sums.items()}
