"""Optimizers and learning rates by name, for recipes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, Literal, get_args

import torch
from pydantic import ConfigDict
from torch import Tensor

from microglia.core.errors import TrainingError
from microglia.core.registry import known_fields, unknown_name

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["cosine", "step", "constant", "poly", "linear"]
Precision = Literal["float32", "bfloat16"]
Warmup = Literal["linear", "exponential"]
CHOICES: dict[str, Any] = {"optimizer": Optimizer, "schedule": Schedule, "precision": Precision, "warmup": Warmup}
"""Allowed words of fields. Recipes are checked against the types earlier; configs from Python against this table."""
LOWEST = {"epochs": 0, "batch_size": 1, "lr": 0, "weight_decay": 0, "warmup_epochs": 0, "accumulate": 1, "evaluate_every": 1}
"""The smallest value of fields."""
FALLING = ("cosine", "linear", "poly")
"""Schedules that fall from ``lr`` to ``final_lr`` * ``lr``."""
ADDED = (
    *("final_lr", "power", "warmup", "warmup_start", "accumulate", "ema", "ema_ramp", "no_decay", "evaluate_every"),
    "nominal_batch",
)
"""Fields that recipes of version 0.1.0 lack: at their defaults they are not part of a run's identity."""


@known_fields
@dataclass(frozen=True)
class FitConfig:
    """How to train.

    Attributes:
        epochs: Passes over the training split; 0 trains nothing.
        batch_size: Examples per step, over all ranks together.
        max_batches: Maximum number of batches of an epoch, other images in each epoch; None for all.
        optimizer: ``sgd`` (with momentum), ``adam`` or ``adamw``.
        lr: Peak learning rate.
        momentum: Momentum of ``sgd``.
        nesterov: Whether ``sgd`` uses Nesterov momentum.
        weight_decay: L2 coefficient (decoupled for ``adamw``).
        schedule: ``cosine``, ``linear`` or ``poly`` ((1 - t)^``power``) down to ``final_lr``, ``step`` (times ``gamma`` at each
            milestone), or ``constant``.
        milestones: Fractions of the training at which ``step`` acts.
        gamma: Factor of ``step``.
        warmup_epochs: Length of the warm-up; it may be fractional.
        clip: Maximum gradient norm, or None.
        precision: ``float32``, or ``bfloat16`` autocast.
        distill: Weight in [0, 1) of distillation from the dense model; 0 for none.
        temperature: Temperature of the distillation.
        final_lr: Fraction of ``lr`` at the end of ``cosine``, ``linear`` and ``poly``, in [0, 1].
        power: Exponent of ``poly``.
        warmup: ``linear`` from 0, or ``exponential``: ``lr`` times ``warmup_start``^(1 - t) at the fraction t of the warm-up.
        warmup_start: Fraction of ``lr`` where an exponential warm-up starts, in (0, 1].
        accumulate: Batches per optimizer step, which uses their mean gradient. The last step of an epoch may have fewer.
        nominal_batch: Number of examples for which ``weight_decay`` is meant, or None. Batches are accumulated up to about as
            many, and the decay is scaled by the examples of a step over ``nominal_batch`` (YOLOv5).
        ema: Final decay in (0, 1) of an exponential moving average of the weights, which is evaluated and becomes the final
            model; None for no average. At update u the decay is ``ema`` (1 - exp(-u / ``ema_ramp``)).
        ema_ramp: Number of updates in which the decay approaches ``ema``.
        no_decay: Parameters without weight decay: ``norm`` (all of normalization layers), ``bias``, or globs of
            parameter names.
        evaluate_every: Epochs between two evaluations of the validation split; the last epoch is always evaluated.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    epochs: int = 30
    batch_size: int = 128
    max_batches: int | None = None
    optimizer: Optimizer = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: Schedule = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    clip: float | None = None
    precision: Precision = "float32"
    distill: float = 0.0
    temperature: float = 4.0
    final_lr: float = 0.0
    power: float = 0.9
    warmup: Warmup = "linear"
    warmup_start: float = 0.1
    accumulate: int = 1
    nominal_batch: int | None = None
    ema: float | None = None
    ema_ramp: float = 2000.0
    no_decay: tuple[str, ...] = ()
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        for name, words in CHOICES.items():
            if getattr(self, name) not in get_args(words):
                raise unknown_name(name, getattr(self, name), get_args(words))
        for name, low in LOWEST.items():
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
        self._check_additions()

    def _check_additions(self) -> None:
        if not 0 <= self.final_lr <= 1 or (self.final_lr and self.schedule not in FALLING):
            raise ValueError(
                f"final_lr is a fraction of lr in [0, 1], for the schedules {', '.join(FALLING)}; got {self.final_lr} with "
                f"{self.schedule!r}"
            )
        if not 0 < self.warmup_start <= 1 or not self.power > 0 or not self.ema_ramp > 0:
            raise ValueError(
                "warmup_start is in (0, 1], power and ema_ramp are above 0; got "
                f"{self.warmup_start}, {self.power} and {self.ema_ramp}"
            )
        if self.nominal_batch is not None and (self.nominal_batch < 1 or self.accumulate > 1):
            raise ValueError(
                "nominal_batch is at least 1 and chooses the batches of a step itself, so leave accumulate at 1; got "
                f"{self.nominal_batch} and accumulate={self.accumulate}"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is a decay in (0, 1), such as 0.9999, or None; got {self.ema}")

    @property
    def batches_per_step(self) -> int:
        """Batches whose mean gradient an optimizer step uses."""
        return self.accumulate if self.nominal_batch is None else max(1, round(self.nominal_batch / self.batch_size))

    @property
    def step_decay(self) -> float:
        """Weight decay of an optimizer step, scaled to its number of examples where ``nominal_batch`` is given."""
        scale = 1.0 if self.nominal_batch is None else self.batch_size * self.batches_per_step / self.nominal_batch
        return self.weight_decay * scale


RECOVERY = FitConfig(epochs=10, lr=0.05, distill=0.5)
"""The default training after pruning: shorter and with a lower rate than from scratch; the dense model is the teacher."""


def refuse_additions(config: FitConfig, what: str) -> None:
    """Raises if a config sets an option that a loop with its own steps lacks: accumulation, averages, no-decay selectors.

    Args:
        config: Config of that loop.
        what: Name of the trained object, for the message.

    Raises:
        TrainingError: One of these fields is set.
    """
    usual = FitConfig()
    for name in ("accumulate", "nominal_batch", "ema", "no_decay"):
        if getattr(config, name) != getattr(usual, name):
            raise TrainingError(f"{what} is trained without {name}; leave it at {getattr(usual, name)!r}.")


def identity(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config without those of `ADDED` at their defaults, so that old runs keep their identity."""
    usual = {f.name: f.default for f in dataclass_fields(FitConfig) if f.name in ADDED}
    return {key: value for key, value in fields.items() if key not in usual or _plain(value) != _plain(usual[key])}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def epoch_batches(config: FitConfig, batches: int) -> int:
    """Returns the number of batches of an epoch, from the number of batches of the split."""
    return batches if config.max_batches is None else min(batches, config.max_batches)


def epoch_length(config: FitConfig, batches: int) -> int:
    """Returns the number of optimizer steps of an epoch, from the number of batches of the split."""
    return -(-epoch_batches(config, batches) // config.batches_per_step)


def learning_rate(config: FitConfig, step: int, steps_per_epoch: int) -> float:
    """Returns the learning rate of a step, a pure function of its number (0-based)."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return warm_rate(config, config.lr, step, warmup)
    progress = (step - warmup) / max(1.0, total - warmup)
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(step >= m * total for m in config.milestones)
    if config.schedule == "constant":
        return config.lr
    left = 1 - progress
    if config.schedule == "cosine":
        left = (1 + math.cos(math.pi * progress)) / 2
    elif config.schedule == "poly":
        left = math.pow(left, config.power)
    return config.lr * (left * (1 - config.final_lr) + config.final_lr)


def warm_rate(config: FitConfig, peak: float, step: int, warmup: float, start: float | None = None) -> float:
    """Returns the learning rate of a step of the warm-up.

    Args:
        config: Config with the kind of the warm-up.
        peak: Learning rate at its end.
        step: Number of the step (0-based), below ``warmup``.
        warmup: Steps of the warm-up.
        start: Initial learning rate of a linear warm-up of one group, above or below the peak; None for the config's warm-up.
    """
    if start is not None:
        return start + (peak - start) * (step + 1) / (warmup + 1)
    if config.warmup == "exponential":
        return peak * math.pow(config.warmup_start, 1 - step / warmup)
    return peak * (step + 1) / (warmup + 1)


def set_rates(optimizers: Iterable[torch.optim.Optimizer], config: FitConfig, step: int, steps_per_epoch: int) -> float:
    """Sets the learning rate of every parameter group for a step; returns the rate of groups without own settings.

    A group may have its own rate (``constant_lr``), a factor (``lr_scale``), and its own start of the warm-up
    (``warmup_from``).
    """
    rate, warmup = learning_rate(config, step, steps_per_epoch), config.warmup_epochs * steps_per_epoch
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        own = rate * group["lr_scale"] if "lr_scale" in group else rate
        if "warmup_from" in group and step < warmup:
            own = warm_rate(config, config.lr * group.get("lr_scale", 1.0), step, warmup, group["warmup_from"])
        group["lr"] = group.get("constant_lr", own)
    return rate


def make_optimizers(
    config: FitConfig, groups: Iterable[dict[str, Any]], further: Iterable[torch.optim.Optimizer] = ()
) -> list[torch.optim.Optimizer]:
    """Returns the optimizer of a config over parameter groups, and further optimizers.

    Args:
        config: Config with the kind of the first optimizer.
        groups: Parameter groups. A group with its own rate (``lr`` or ``constant_lr``) keeps it; a group may name another
            ``optimizer``.
        further: Optimizers of parameters outside the groups, at constant rates. An optimizer of the first's kind joins it,
            group by group, as in files of interrupted trainings.
    """
    by_name: dict[str, list[dict[str, Any]]] = {config.optimizer: []}
    for group in groups:
        by_name.setdefault(group.get("optimizer", config.optimizer), []).append(_constant(group))
    made = [_make_optimizer(name, config, own) for name, own in by_name.items()]
    for optimizer in further:
        own = [_constant(group) for group in optimizer.param_groups]
        if type(optimizer) is type(made[0]):
            for group in own:
                made[0].add_param_group(group)
        else:
            optimizer.param_groups[:] = own
            made.append(optimizer)
    return made


def _constant(group: dict[str, Any]) -> dict[str, Any]:
    """Returns a parameter group whose own rate, if any, is kept at every step."""
    return {"constant_lr": group["lr"], **group} if "lr" in group else group


def _make_optimizer(name: str, config: FitConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    # Fused takes a fifth of the time on a CPU, where small networks spend half of a step in the optimizer.
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.step_decay, "fused": True}
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **common)
    if name == "adam":
        return torch.optim.Adam(groups, **common)
    return torch.optim.AdamW(groups, **common)


def lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Copies a loaded state into the optimizer's own memory, laid out like the weights.

    Loading shares the state's tensors, and steps then change them in place. Files store them in another order than
    channels-last weights, and fused steps use the memory order.
    """
    for p, held in optimizer.state.items():
        for key, value in held.items():
            if isinstance(value, Tensor):
                same = value.shape == p.shape
                held[key] = torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value) if same else value.clone()
