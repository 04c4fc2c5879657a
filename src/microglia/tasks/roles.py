"""Tasks whose models know the roles of their layers, so that a recipe can exclude a classifier without its name."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from microglia.core.roles import mark_roles, put_roles
from microglia.tasks.task import Task


def with_roles(task: Task) -> Task:
    """Returns a task whose models are marked by `microglia.core.roles.mark_roles`; the first one runs on the task's example."""
    found: dict[str, tuple[str, ...]] = {}

    def marked(model: nn.Module) -> nn.Module:
        if found:
            put_roles(model, found)
        else:
            found.update(mark_roles(model, task.example))
        return model

    fresh = task.fresh
    return replace(
        task,
        build=lambda: marked(task.build()),
        fresh=None if fresh is None else lambda seed: marked(fresh(seed)),
    )
