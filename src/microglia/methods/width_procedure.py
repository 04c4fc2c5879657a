"""The procedure of searches over widths: dense model, the search, a cut to the widths that were found, recovery."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from microglia.core.batch import to_device
from microglia.core.errors import BudgetError
from microglia.methods.channel_procedure import cut_and_recovered
from microglia.methods.procedure import change, dense_model, evidence
from microglia.methods.what import SAMPLING
from microglia.methods.width_search import SearchedConfig, SearchedPruner
from microglia.storage.run import Progress, Run
from microglia.tasks.loaders import loaders
from microglia.tasks.task import Split, Task
from microglia.train.evaluate import evaluate
from microglia.train.recover import recalibrate

HELD = 128
"""Examples in a batch on which candidates are valued."""


def searched_widths(task: Task, run: Run, config: SearchedConfig, pruner: type[SearchedPruner]) -> nn.Module:
    """Returns the dense model cut to the widths that a search finds, and recovered."""
    model = dense_model(task, run, config.dense)
    teacher = deepcopy(model) if config.train.distill else None

    sampled = set(SAMPLING) <= set(config.takes.fields)

    def make() -> SearchedPruner:
        seen = evidence(task, run, config) if sampled else None
        return pruner(model, config, total_steps=1, example_inputs=to_device(task.example, run.device), evidence=seen)

    search_and_mask(task, run, config, model, make)
    return cut_and_recovered(task, run, config, model, teacher)


def search_and_mask(task: Task, run: Run, config: SearchedConfig, model: nn.Module, make: Callable[[], SearchedPruner]) -> None:
    """Masks the channels of a model that a search gives up, as a stage; every evaluated vector is kept in its file."""
    if config.processes > 1 and run.device.type != "cpu":
        raise BudgetError(f"processes is 1 on a {run.device.type}: several processes would be forked, which only a CPU allows.")

    def work(progress: Progress) -> dict[str, Any]:
        made = make()
        made.search(measuring(task, run, config), progress, begin=run.release, seed=run.seed)
        made.finish()
        return made.report()

    said = change(run, "search", model, work)
    run.observations["candidates"] = {key: said.pop(key) for key in ("candidates", "rounds", "rejected")}
    run.observations["widths"] = said


def measuring(task: Task, run: Run, config: SearchedConfig) -> Callable[[nn.Module], float]:
    """Returns what values a small model: batch-norm statistics estimated anew, then the headline metric on held-out examples.

    The examples are those of the validation split, which is a part of the training images; tasks without one use training
    examples. All batches are drawn once, so every candidate sees the same ones. Higher is better.
    """
    batches = task.data.batches("train", config.train.batch_size, seed=run.seed, shuffle=True, augment=True)
    seen = list(islice(batches.epoch(0), config.recalibrate))
    split: Split = "validation" if len(task.data.batches("validation", HELD)) else "train"
    size = min(HELD, config.images)
    held = list(islice(task.data.batches(split, size, seed=run.seed, shuffle=True).epoch(0), -(-config.images // size)))
    judged = replace(task, data=loaders(train=held, test=held))
    sign = 1.0 if task.is_better(1.0, 0.0) else -1.0

    def value(small: nn.Module) -> float:
        with torch.no_grad():
            if seen:
                recalibrate(small, seen, count=len(seen), forward=task.forward)
            return sign * evaluate(small, judged, "test")[task.headline]

    return value
