"""Optimizers and learning rates by name, for recipes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from microglia.core.registry import known_fields


@known_fields
@dataclass(frozen=True)
class FitConfig:
    """How to train.

    Attributes:
        epochs: Passes over the training split; 0 trains nothing.
        batch_size: Examples per step, over all ranks together.
        max_batches: Batches after which an epoch ends, each epoch with other images; None for all of them.
        optimizer: ``sgd`` (with momentum), ``adam`` or ``adamw``.
        lr: Peak learning rate.
        momentum: Of ``sgd``.
        nesterov: Whether ``sgd`` looks ahead.
        weight_decay: L2 coefficient (decoupled for ``adamw``).
        schedule: ``cosine`` to 0, ``step`` (times ``gamma`` at each milestone), or ``constant``.
        milestones: Fractions of the training at which ``step`` acts.
        gamma: Factor of ``step``.
        warmup_epochs: Linear warm-up from 0, may be fractional.
        clip: Largest gradient norm, or None.
        precision: ``float32``, or ``bfloat16`` autocast.
        distill: Weight in [0, 1) of distillation from the dense model; 0 for none.
        temperature: Of the distillation.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    epochs: int = 30
    batch_size: int = 128
    max_batches: int | None = None
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    clip: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    distill: float = 0.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        for name, low in (("epochs", 0), ("batch_size", 1), ("lr", 0), ("weight_decay", 0), ("warmup_epochs", 0)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}; got {getattr(self, name)}")
        if self.max_batches is not None and self.max_batches < 1:
            raise ValueError(f"max_batches is at least 1, or None for whole epochs; got {self.max_batches}")
        if not 0 <= self.distill < 1:
            raise ValueError(f"distill is a weight in [0, 1); got {self.distill}")
        if not 0 <= self.momentum < 1 or (self.nesterov and not self.momentum):
            raise ValueError(f"momentum is in [0, 1), and above 0 for nesterov; got {self.momentum}")
        if (self.clip is not None and not self.clip > 0) or not self.temperature > 0:
            raise ValueError(f"clip and temperature must be above 0; got {self.clip} and {self.temperature}")


RECOVERY = FitConfig(epochs=10, lr=0.05, distill=0.5)
"""The default training after pruning: shorter and gentler than from scratch, and with the dense model as teacher."""


def epoch_length(config: FitConfig, batches: int) -> int:
    """Returns the optimizer steps of an epoch over a split of so many batches."""
    return batches if config.max_batches is None else min(batches, config.max_batches)


def learning_rate(config: FitConfig, step: int, steps_per_epoch: int) -> float:
    """Returns the learning rate of a step, a pure function of its number (0-based)."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, total - warmup)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * progress)) / 2
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(step >= m * total for m in config.milestones)
    return config.lr


def make_optimizers(config: FitConfig, groups: Iterable[dict[str, Any]]) -> list[torch.optim.Optimizer]:
    """Returns the optimizer of a config over parameter groups, and further ones for groups that name their own."""
    by_name: dict[str, list[dict[str, Any]]] = {config.optimizer: []}
    for group in groups:
        by_name.setdefault(group.get("optimizer", config.optimizer), []).append(group)
    return [_make_optimizer(name, config, own) for name, own in by_name.items()]


def _make_optimizer(name: str, config: FitConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    # Fused: a fifth of the time on a CPU, where small networks spend half of a step in the optimizer.
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **common)
    if name == "adam":
        return torch.optim.Adam(groups, **common)
    return torch.optim.AdamW(groups, **common)


def lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Makes a loaded state the optimizer's own, laid out in memory like the weights.

    Loading shares the state's tensors, which steps then change in place; files hold them in another order than channels-last
    weights have, and fused steps go by place.
    """
    for p, held in optimizer.state.items():
        for key, value in held.items():
            if isinstance(value, Tensor):
                same = value.shape == p.shape
                held[key] = torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value) if same else value.clone()
