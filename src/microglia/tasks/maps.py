"""Losses, metrics and distances of maps of logits: online hard example mining, intersection over union."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from microglia.data.scenes import IGNORED
from microglia.tasks.metrics import AnyMetric, Better, Metric, Unit
from microglia.zoo.segmenters import logits_of

LossName = Literal["ohem", "cross-entropy"]
HARD = -math.log(0.7)
"""Cross-entropy, in nats, above which a pixel is hard: its class has a probability below 0.7."""
SHARE = 16
"""At least one in this many pixels counts in the loss of hard pixels."""


def main_map(outputs: Any, size: Sequence[int]) -> Tensor:
    """Returns the main map of logits, (batch, classes, *size)."""
    return _fitted(logits_of(outputs)[0], size)


def _fitted(logits: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return functional.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def pixel_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of every pixel with a class in nats, (pixels,), in float32.

    Args:
        logits: (batch, classes, height, width).
        targets: int64 (batch, height, width); `IGNORED` where a pixel has no class.
    """
    losses = functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
    return losses[targets != IGNORED]


def hard_pixels(losses: Tensor) -> Tensor:
    """Returns the losses of the hard pixels: those above `HARD`, or the largest 1 / `SHARE` if these are more.

    Source: Shrivastava et al. 2016, "Training Region-based Object Detectors with Online Hard Example Mining", in the form of
    the public BiSeNet-v2 code.

    Args:
        losses: (pixels,).
    """
    least = len(losses) // SHARE
    hard = losses[losses > HARD]
    return hard if len(hard) >= least else losses.topk(least).values


@dataclass(frozen=True)
class MapLoss:
    """Mean cross-entropy of pixels in nats, summed over the main and the auxiliary heads, each at the targets' size.

    Attributes:
        name: ``ohem`` for the mean over hard pixels (see `hard_pixels`), ``cross-entropy`` for all pixels with a class.
    """

    name: LossName = "ohem"

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        """Returns the loss; 0, with a gradient of 0, where no pixel counts."""
        total = torch.zeros((), device=targets.device)
        for logits in logits_of(outputs):
            losses = pixel_losses(_fitted(logits, targets.shape[1:]), targets)
            counted = hard_pixels(losses) if self.name == "ohem" else losses
            total = total + (counted.mean() if len(counted) else logits.sum() * 0.0)
        return total


@dataclass(frozen=True)
class Confusion:
    """Intersection over union: the mean over classes, that of each class, and the accuracy of pixels, over a data set.

    The state is the matrix of pixels by (class, prediction), which adds up over batches and ranks. IoU of a class is tp / (tp +
    fp + fn). A class that is neither in the labels nor in the predictions is left out of the mean and of the numbers.

    Attributes:
        classes: Class names.
        better: Direction.
        unit: Unit.
    """

    classes: tuple[str, ...]
    better: Better = "higher"
    unit: Unit = "%"

    def update(self, state: Tensor | None, outputs: Any, targets: Tensor) -> Tensor:
        """Returns the matrix after one more batch, int64 (classes, classes)."""
        count = len(self.classes)
        predicted = main_map(outputs, targets.shape[1:])[:, :count].argmax(1)
        counted = targets != IGNORED
        pairs = targets[counted] * count + predicted[counted]
        matrix = torch.bincount(pairs, minlength=count**2).view(count, count)
        return matrix if state is None else state + matrix

    def over_ranks(self, state: Tensor) -> Tensor:
        """Returns the matrix of all ranks."""
        torch.distributed.all_reduce(state)
        return state

    def values(self, name: str, state: Tensor) -> dict[str, float]:
        """Returns the mean IoU under the metric's name, ``pixel_accuracy``, and ``iou/CLASS`` of each class."""
        matrix = state.double().cpu()
        hits = matrix.diagonal()
        union = matrix.sum(0) + matrix.sum(1) - hits
        present = union > 0
        each = hits / union.clamp(min=1)
        mean = float(each[present].mean()) if bool(present.any()) else 0.0
        found = {name: mean, "pixel_accuracy": float(hits.sum() / matrix.sum().clamp(min=1))}
        return found | {f"iou/{c}": float(v) for c, v, p in zip(self.classes, each, present, strict=True) if p}


def map_metrics(classes: tuple[str, ...]) -> dict[str, AnyMetric]:
    """Returns ``miou`` with the numbers of `Confusion`, and ``loss``, the mean cross-entropy of pixels in nats."""

    def statistics(outputs: Any, targets: Tensor) -> Tensor:
        losses = pixel_losses(main_map(outputs, targets.shape[1:]), targets).double()
        return torch.stack([losses.sum(), losses.new_tensor(losses.numel())])

    mean: Callable[[Tensor], float] = lambda total: float(total[0] / total[1].clamp(min=1))  # noqa: E731
    return {"miou": Confusion(classes), "loss": Metric(statistics, mean, "lower", "")}


@dataclass(frozen=True)
class MapDistance:
    """KL(teacher / T || student / T) of the main maps over the classes, averaged over batch and pixels, in nats."""

    def __call__(self, outputs: Any, wanted: Any, temperature: float) -> Tensor:
        """Returns the mean over all pixels."""
        return self._each(outputs, wanted, temperature).mean()

    def on_targets(self, outputs: Any, wanted: Any, targets: Tensor, temperature: float) -> Tensor:
        """Returns the mean over the pixels with a class; 0 where there is none."""
        each, counted = self._each(outputs, wanted, temperature), targets != IGNORED
        fitting = each.shape == counted.shape
        return (each * counted).sum() / counted.sum().clamp(min=1) if fitting else each.mean()

    def _each(self, outputs: Any, wanted: Any, temperature: float) -> Tensor:
        student, teacher = logits_of(outputs)[0], logits_of(wanted)[0]
        with torch.no_grad():
            soft = functional.log_softmax(_fitted(teacher, student.shape[2:]) / temperature, dim=1)
        given = functional.log_softmax(student / temperature, dim=1)
        return functional.kl_div(given, soft, reduction="none", log_target=True).sum(1)


def same_pixels(first: Any, second: Any) -> tuple[int, int] | None:
    """Returns at how many pixels two models' main maps have the same class, and of how many."""
    one, other = logits_of(first)[0], logits_of(second)[0]
    if one.ndim != 4 or one.shape != other.shape:
        return None
    equal = one.argmax(1) == other.argmax(1)
    return int(equal.sum()), equal.numel()
