"""A task: model, data, loss and metrics together, so that one loop serves every kind of network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.errors import MicrogliaError

Split = Literal["train", "validation", "test"]


class Batches(Protocol):
    """Batches of one split; an epoch is a pure function of its number."""

    def __len__(self) -> int:
        """Returns the number of batches in an epoch."""
        ...

    def epoch(self, number: int) -> Iterator[tuple[Any, Any]]:
        """Yields the (inputs, targets) of one epoch."""
        ...


class Data(Protocol):
    """Where a task's batches come from."""

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        augment: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> Batches:
        """Returns the batches of a split; ``batch_size`` counts examples over all ``world`` ranks, ``rank`` gets its share."""
        ...


SEEN = "A checkpoint may have been trained on these images."
"""What to say beside numbers of the training or the validation split where trained weights were loaded."""


@dataclass(frozen=True)
class Metric:
    """A number over a data set, made of statistics that add up over batches and ranks.

    Attributes:
        statistics: (outputs, targets) of a batch -> tensor to be summed.
        value: The sum -> the metric.
    """

    statistics: Callable[[Any, Any], Tensor]
    value: Callable[[Tensor], float]


@dataclass(frozen=True)
class Task:
    """What a network is for.

    Attributes:
        name: For people.
        build: Returns a new model: same architecture and initial weights at every call, checkpoint loaded if there is one.
        data: The batches.
        loss: Mean loss of (outputs, targets), used to evaluate and to score.
        metrics: By name; the first is the headline and higher is better.
        example: One input (batch of 1), for tracing and measuring.
        training_loss: The loss to train with, if another (label smoothing).
        pretrained: Whether `build` returns trained weights, so that dense training is skipped.
        fresh: Returns a new model with the initial weights of a seed, never a checkpoint's; None where there is no such way.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Data
    loss: Callable[[Any, Any], Tensor]
    metrics: Mapping[str, Metric]
    example: Tensor
    training_loss: Callable[[Any, Any], Tensor] | None = None
    pretrained: bool = False
    fresh: Callable[[int], nn.Module] | None = None

    @property
    def headline(self) -> str:
        """Name of the metric that counts."""
        return next(iter(self.metrics))


def mean_metric(values: Callable[[Any, Any], Tensor]) -> Metric:
    """Returns the metric that is the mean over examples of ``values(outputs, targets)``, shaped (batch,)."""

    def statistics(outputs: Any, targets: Any) -> Tensor:
        each = values(outputs, targets).double()
        return torch.stack([each.sum(), each.new_tensor(each.numel())])

    return Metric(statistics, lambda total: float(total[0] / total[1]))


def _hits(k: int) -> Callable[[Tensor, Tensor], Tensor]:
    def values(outputs: Tensor, targets: Tensor) -> Tensor:
        best = outputs.topk(min(k, outputs.shape[1]), dim=1).indices
        return (best == targets[:, None]).any(1)

    return values


CLASSIFICATION: Mapping[str, Metric] = {
    "accuracy": mean_metric(_hits(1)),
    "top5": mean_metric(_hits(5)),
    "loss": mean_metric(lambda outputs, targets: functional.cross_entropy(outputs, targets, reduction="none")),
}
"""Top-1 and top-5 accuracy in [0, 1], mean cross-entropy in nats."""


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy in nats, with label smoothing in [0, 1)."""

    label_smoothing: float = field(default=0.0)

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise MicrogliaError(f"label_smoothing is in [0, 1); got {self.label_smoothing}.")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of logits (batch, classes) and labels (batch,)."""
        return functional.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)
