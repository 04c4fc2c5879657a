"""Methods by name: a method is a function (task, run, config) -> model with a frozen config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from microglia.core.patterns import parse_pattern
from microglia.core.registry import Registry
from microglia.graph.order.permute import check_permutable
from microglia.methods.pruner import PruneConfig, Pruner
from microglia.storage.run import Run
from microglia.tasks.task import Task
from microglia.train.optim import RECOVERY, FitConfig


@dataclass(frozen=True)
class MethodConfig(PruneConfig):
    """What to keep and how to train, common to all whole procedures.

    Attributes:
        dense: Training of the dense model, where the task brings no trained weights.
        train: Training after (or while) pruning.
        score_batches: Training batches a score looks at.
        score_batch_size: Examples in each.
    """

    dense: FitConfig = field(default_factory=FitConfig)
    train: FitConfig = RECOVERY
    score_batches: int = 1
    score_batch_size: int = 128


@dataclass(frozen=True)
class MaskConfig(MethodConfig):
    """Methods that mask a trained network.

    Attributes:
        permute: Whether to put the channels of the dense network, whose function stays, in an order in which blocks of
            several outputs (or inputs) keep more of its magnitude; see `microglia.permute_channels`.
    """

    permute: bool = False


Procedure = Callable[[Task, Run, Any], nn.Module]
Check = Callable[[Task, Any], object]
"""(task, config): raises what is wrong with them, before anything is trained."""


def fits(task: Task, config: PruneConfig) -> None:
    """Raises unless layers, pattern and budget of masks fit the task's model."""
    model = task.build()
    Pruner(model, config)
    if isinstance(config, MaskConfig) and config.permute:
        check_permutable(parse_pattern(config.pattern), model, task.example)


@dataclass(frozen=True)
class Method:
    """A named procedure.

    Attributes:
        name: As in recipes and on the command line.
        procedure: Trains, prunes and recovers; returns the masked or the shrunk model.
        config: Its frozen config dataclass.
        description: One line.
        defaults: Config fields this name sets, which a recipe may override.
        check: Raises, before anything is trained, what is wrong with a config for a task.
        training: The training after (or while) pruning where a recipe says nothing of it.
    """

    name: str
    procedure: Procedure
    config: type[MethodConfig]
    description: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    check: Check = fits
    training: FitConfig = RECOVERY


methods: Registry[Method] = Registry("method")


def method(
    name: str, config: type[MethodConfig], check: Check = fits, training: FitConfig = RECOVERY
) -> Callable[[Procedure], Procedure]:
    """Returns a decorator that registers a procedure; its docstring's first line describes it."""

    def register(procedure: Procedure) -> Procedure:
        description = (procedure.__doc__ or "").strip().split("\n")[0]
        methods.add(name)(Method(name, procedure, config, description, check=check, training=training))
        return procedure

    return register


def preset(name: str, of: str, description: str, **defaults: Any) -> None:
    """Registers a name for a method with other defaults."""
    original = methods[of]
    methods.add(name)(replace(original, name=name, description=description, defaults={**original.defaults, **defaults}))
