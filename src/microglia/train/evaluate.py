"""Evaluation: a task's metrics on one split."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import to_device
from microglia.core.devices import device_of
from microglia.core.modes import evaluating
from microglia.core.progress import progress_bar
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
    """Returns the task's metrics on a split, over all ranks; the model's modes stay unchanged.

    For a split without batches it returns an empty dictionary.

    Args:
        model: Anything that maps the task's inputs to its outputs.
        task: Data and metrics.
        split: Name of the split.
        batch_size: Examples in a forward pass of each rank.
        limit: Number of batches, drawn from the split by ``seed``; None for all.
        seed: See ``limit``.
    """
    rank, world = rank_and_world()
    device = device_of(model)
    states: dict[str, Any] = {}
    batches = task.data.batches(split, batch_size * world, seed=seed, shuffle=limit is not None, rank=rank, world=world)
    total = len(batches)
    total = total if limit is None else min(limit, total)
    with evaluating(model), progress_bar(f"evaluate: {split}", total) as bar:
        for inputs, targets in islice(batches.epoch(0), limit):
            bar.advance()
            if not task.count(targets):  # this rank's part of the last batch may be empty
                continue
            predictions = task.predict(task.forward(model, to_device(inputs, device)))
            wanted = to_device(targets, device)
            for name, metric in task.metrics.items():
                states[name] = metric.update(states.get(name), predictions, wanted)
    if world > 1:
        states = _with_empty(states, device)
        states = {name: task.metrics[name].over_ranks(state) for name, state in states.items()}
    found: dict[str, float] = {}
    for name, state in states.items():
        found |= task.metrics[name].values(name, state)
    return found


def _with_empty(states: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Returns the states of this rank; empty ones if only other ranks had a batch, so that all ranks gather the same metrics.

    An empty state is zeros like another rank's tensor, else None, which every other kind of state began as.
    """
    having: list[bool] = [False] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(having, bool(states))
    if all(having) or not any(having):
        return states
    lent = [{name: state.cpu() if isinstance(state, Tensor) else None for name, state in states.items()}]
    torch.distributed.broadcast_object_list(lent, src=having.index(True))
    zeros = {name: None if like is None else torch.zeros_like(like, device=device) for name, like in lent[0].items()}
    return states or zeros
