"""The procedure of methods that train channels away: dense model, their training, a cut to the budget, recovery."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

from torch import nn

from microglia.core.batch import to_device
from microglia.graph import plan_of, shrink
from microglia.graph.cutting.plan import attach
from microglia.methods.channel_pruner import ChannelConfig, ChannelPruner
from microglia.methods.procedure import change, cut, dense_model, evidence, observe, train
from microglia.methods.what import SAMPLING
from microglia.storage.run import Progress, Run
from microglia.tasks.task import Task
from microglia.train.optim import epoch_length
from microglia.train.recover import recalibrate_on


def fits(pruner: type[ChannelPruner]) -> Callable[[Task, ChannelConfig], None]:
    """Returns what raises unless a method and its budget fit the task's model."""

    def check(task: Task, config: ChannelConfig) -> None:
        pruner(task.build(), config, total_steps=1, example_inputs=task.example, start=False)

    return check


def thinned(task: Task, run: Run, config: ChannelConfig, pruner: type[ChannelPruner], **own: Any) -> nn.Module:
    """Returns the dense model trained with a pruner, without the channels that it gives up, and recovered.

    Args:
        task: Data and loss.
        run: Where the stages are kept.
        config: The method's settings.
        pruner: Its class.
        **own: Further arguments of the class.
    """
    model = dense_model(task, run, config.dense)
    teacher = deepcopy(model) if config.train.distill else None
    pruner.arrange(model, to_device(task.example, run.device), config)  # a stage read from its file has this form too
    steps = config.sparse.epochs * epoch_length(config.sparse, len(task.data.batches("train", config.sparse.batch_size)))
    sampled = set(SAMPLING) <= set(config.takes.fields)

    def make() -> ChannelPruner:
        return pruner(
            model,
            config,
            total_steps=max(1, steps),
            example_inputs=to_device(task.example, run.device),
            evidence=evidence(task, run, config) if sampled else None,
            **own,
        )

    run.observations["widths"] = train(task, run, "sparse", model, config.sparse, pruner=make, teacher=teacher)
    return cut_and_recovered(task, run, config, model, teacher)


def cut_and_recovered(task: Task, run: Run, config: ChannelConfig, model: nn.Module, teacher: nn.Module | None) -> nn.Module:
    """Returns a model without its masked channels, trained further."""
    model = cut(task, run, "prune", model, lambda masked: removed(masked, task, run, config))

    def anew(progress: Progress) -> None:
        recalibrate_on(model, task, batch_size=config.train.batch_size, count=config.recalibrate, seed=run.seed)

    if config.recalibrate:
        change(run, "recalibrate", model, anew)
    observe(task, run, "before", model)
    train(task, run, "train", model, config.train, teacher=teacher)
    return model


def removed(masked: nn.Module, task: Task, run: Run, config: ChannelConfig) -> nn.Module:
    """Returns a masked model without its masked channels; the plan says what was asked and what came out."""
    small = shrink(masked, to_device(task.example, run.device), clear=True)
    plan = plan_of(small)
    asked = {t: v for t in ("density", "params", "flops") if (v := getattr(config, t)) is not None}
    (params, fewer), (macs, less) = plan.parameters, plan.macs
    got = {"density": run.observations["widths"]["density"], "params": fewer / params, "flops": less / macs}
    return attach(small, replace(plan, asked=asked, got={term: got[term] for term in asked or got}))
