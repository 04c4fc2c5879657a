"""Removing channels: dense model, one score per coupled group of channels, widths to a budget, a cut, recovery."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from microglia.core.budget import Budget
from microglia.core.errors import BudgetError, PatternError, SelectorError
from microglia.core.layers import prunable_layers
from microglia.core.registry import unknown_name
from microglia.graph import prune_channels
from microglia.methods.base import MethodConfig, method, preset
from microglia.methods.procedure import change, cut, dense_model, evidence, observe, train
from microglia.train.recover import recalibrate
from microglia.train.run import Run
from microglia.train.task import Task


@dataclass(frozen=True)
class ChannelsConfig(MethodConfig):
    """Physical removal of channels; ``density`` is the kept fraction of the channels that can go.

    Attributes:
        pattern: Always ``channel``.
        scope: ``uniform``: the same fraction of every group of coupled channels; ``global``: by normalized score across them.
        reduction: How the scores of all weights of a channel, in every layer of its group, become one.
        exclude: Selectors of layers that keep their shape; what is coupled to their inputs and outputs stays too.
        round_to: Widths are kept at multiples of this where wide enough and the budget allows; 1 for none.
        keep_class: Only what the model's own classes can follow, never a traced graph.
        batch: Examples in the batch that ``ms`` is the time of.
        recalibrate: Training batches over which batch-norm statistics are estimated anew after the cut; 0 for none.
    """

    pattern: str = "channel"
    scope: Literal["uniform", "global"] = "uniform"  # type: ignore[assignment]  # masks compete elsewhere
    reduction: Literal["mean", "sum", "max", "l2"] = "l2"
    round_to: int = 16
    keep_class: bool = False
    batch: int = 1
    recalibrate: int = 0

    def __post_init__(self) -> None:  # here, so that it shows before the dense model is trained
        if self.pattern != "channel":
            raise PatternError(f"The method 'channels' removes whole channels: its pattern is channel, not {self.pattern}.")
        if self.scope not in ("uniform", "global"):
            raise unknown_name("scope of removed channels", self.scope, ("uniform", "global"))
        if self.layers != ("*",) or self.protect or self.allow_empty:
            raise SelectorError(
                "The method 'channels' takes exclude, which keeps layers whole, and not layers, protect or allow_empty: "
                "channels are coupled across layers, and none is ever emptied."
            )
        if self.round_to < 1 or self.batch < 1:
            raise BudgetError(f"round_to and batch are at least 1; got {self.round_to} and {self.batch}.")

    @property
    def budget(self) -> Budget:
        """What is kept."""
        return Budget(density=self.density, params=self.params, flops=self.flops, ms=self.ms)


def fits(task: Task, config: ChannelsConfig) -> None:
    """Raises unless the channels of the task's model can be removed down to the budget."""
    model = task.build()
    prune_channels(model, _batch(task, config), config.budget, verified=False, **_settings(model, config))


@method("channels", ChannelsConfig, check=fits)
def channels(task: Task, run: Run, config: ChannelsConfig) -> nn.Module:
    """Score coupled channels by group, remove the least to the budget, recover by training."""
    model = dense_model(task, run, config.dense)
    teacher = deepcopy(model) if config.train.distill else None

    def prune(dense: nn.Module) -> nn.Module:
        seen = evidence(task, run, config)
        example = _batch(task, config).to(run.device)
        settings = _settings(dense, config)
        return prune_channels(dense, example, config.budget, score=config.score, evidence=seen, **settings)

    model = cut(run, "prune", model, prune)
    if config.recalibrate:
        batches = task.data.batches("train", config.score_batch_size, seed=run.seed, shuffle=True)
        change(run, "recalibrate", model, lambda _: recalibrate(model, batches.epoch(0), count=config.recalibrate))
    observe(task, run, "before", model)
    train(task, run, "train", model, config.train, teacher=teacher)
    return model


def _batch(task: Task, config: ChannelsConfig) -> Tensor:
    return task.example.repeat(config.batch, *[1] * (task.example.ndim - 1))


def _settings(model: nn.Module, config: ChannelsConfig) -> dict[str, Any]:
    """Returns the arguments that the cut and its trial have in common; selectors of layers as names."""
    return {
        "reduction": config.reduction,
        "scope": config.scope,
        "round_to": config.round_to,
        "exclude": list(prunable_layers(model, config.exclude)) if config.exclude else [],
        "keep_class": config.keep_class,
    }


preset("channels-global", "channels", "Channels compete across groups by normalized score.", scope="global")
