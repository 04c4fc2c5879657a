"""A user's own task by the name of its function, ``package.module:function``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from microglia.tasks.start import load_start
from microglia.tasks.task import Task
from microglia.zoo.own_code import called, function_of, takes
from microglia.zoo.registry import ModelError


def own_task(name: str, model: str | None, options: Mapping[str, Any], *, checkpoint: str | None, seed: int) -> Task:
    """Returns the task that a user's own function makes from ``options``; this imports its module.

    Args:
        name: ``package.module:function``.
        model: Name of a model, for a function that takes ``model``; None if the task brings its own.
        options: Keywords of the function.
        checkpoint: File with trained weights.
        seed: Given to a function that takes ``seed``.

    Raises:
        ModelError: The function takes other keywords, does not take the model, or returns no Task.
    """
    function = function_of(name, "task")
    offered: dict[str, Any] = {"seed": seed}
    if model is not None:
        if not takes(function, "model"):
            raise ModelError(f"The task {name} brings its model; leave out the model {model!r}, or let it take model=.")
        offered["model"] = model
    task = called(name, function, offered, options)
    if not isinstance(task, Task):
        raise ModelError(f"{name} returned {type(task).__name__}; a function named as task returns a microglia.Task.")
    if checkpoint is None:
        return task

    def loaded() -> nn.Module:
        network = task.build()
        load_start(network, checkpoint)
        return network

    return replace(task, build=loaded, pretrained=True)
