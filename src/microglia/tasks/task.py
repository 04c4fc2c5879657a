"""A task: model, data, loss and metrics together, so that one loop serves every kind of network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.batch import call, count_examples, repeat_example
from microglia.core.errors import MicrogliaError
from microglia.tasks.metrics import AnyMetric, mean_metric

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
    """The source of a task's batches."""

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


@runtime_checkable
class Telling(Protocol):
    """Data that a run's result says more of, such as how images are normalized; others need not say anything."""

    def told(self) -> dict[str, Any]:
        """Returns fields of ``result.json``, as JSON values."""
        ...


@runtime_checkable
class DistanceOnTargets(Protocol):
    """A divergence for distillation that also reads the targets, such as to leave out pixels without a class."""

    def on_targets(self, outputs: Any, wanted: Any, targets: Any, temperature: float) -> Tensor:
        """Returns the mean divergence of the student's outputs from the teacher's."""
        ...


SEEN = "A checkpoint may have been trained on these images."
"""Note beside numbers of the training or validation split if trained weights were loaded."""


def _as_they_are(outputs: Any) -> Any:
    return outputs


def _nowhere(model: nn.Module, directory: Path) -> None:
    """Writes nothing: a run keeps its model in the house's own form."""


def softened_divergence(outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Returns KL(teacher / T || student / T) over dimension 1, averaged over all other dimensions, in nats.

    Args:
        outputs: Logits of the student, (batch, classes, ...).
        wanted: Logits of the teacher, of the same shape.
        temperature: T > 0.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        raise MicrogliaError(
            "Distillation compares logits of shape (batch, classes, ...); give the task its own distance=function of "
            "(student's outputs, teacher's outputs, temperature), or train with distill=0."
        )
    with torch.no_grad():
        wanted = functional.log_softmax(wanted / temperature, dim=1)
    given = functional.log_softmax(outputs / temperature, dim=1)
    total = functional.kl_div(given, wanted, reduction="sum", log_target=True)
    return total / (outputs.numel() // outputs.shape[1])


def same_class(first: Any, second: Any) -> tuple[int, int] | None:
    """Returns the number of examples on which two models' logits (batch, classes) agree in arg-max, and of all examples.

    It returns None for outputs of another form.
    """
    if not all(isinstance(one, Tensor) and one.ndim == 2 for one in (first, second)):
        return None
    return int((first.argmax(1) == second.argmax(1)).sum()), len(first)


@dataclass(frozen=True)
class Task:
    """The task of a network: model, data, loss and metrics.

    Inputs, outputs and targets are any trees of tensors; all code that depends on their form is in functions of the task.

    Attributes:
        name: Name for readers.
        build: Returns a new model with the same architecture and initial weights at every call; a checkpoint is loaded if
            given.
        data: The batches; `microglia.tasks.loaders` makes them from any iterable, such as a `torch.utils.data.DataLoader`.
        loss: Mean loss of (outputs, targets), used to evaluate and to score.
        metrics: Metrics by name, functions of (predictions, targets); the first is the headline. Each has a direction.
        example: Inputs of one example (batch of 1), for tracing and measuring.
        training_loss: The loss to train with, if it differs (label smoothing).
        pretrained: Whether `build` returns trained weights, so that dense training is skipped.
        fresh: Returns a new model with the initial weights of a seed, never a checkpoint's; None if this is impossible.
        forward: (model, inputs) -> outputs; a mapping of inputs is passed by keyword, a tuple by position. In training mode a
            model may return additional outputs, such as those of auxiliary heads.
        predict: Outputs -> predictions, only for metrics: arg-max, suppression of duplicate boxes, a shift of logits.
        count: Targets -> number of examples in the batch.
        distance: (student's outputs, teacher's outputs, temperature) -> mean divergence, for distillation. One that is also a
            `DistanceOnTargets` reads the targets too.
        groups: Model -> optimizer groups, each with ``params`` and perhaps ``lr_scale``, ``weight_decay`` and ``warmup_from``
            (learning rate at the start of the warm-up); None for one group of all parameters. The remaining parameters form one
            more group.
        agree: (outputs of one model, of another) -> (number of examples on which they agree, all examples), or None if
            agreement is undefined.
        kind: Name of the task in reports; nothing depends on it.
        deliver: (pruned model, run directory) -> None; writes the result there also in the form that other libraries read.
        show: Model -> its predictions on a few test examples as JSON, with the truth, for the pictures of reports; or None.

    Raises:
        MicrogliaError: ``data`` are batches themselves, not a source of batches.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Data
    loss: Callable[[Any, Any], Tensor]
    metrics: Mapping[str, AnyMetric]
    example: Any
    training_loss: Callable[[Any, Any], Tensor] | None = None
    pretrained: bool = False
    fresh: Callable[[int], nn.Module] | None = None
    forward: Callable[[nn.Module, Any], Any] = call
    predict: Callable[[Any], Any] = _as_they_are
    count: Callable[[Any], int] = count_examples
    distance: Callable[[Any, Any, float], Tensor] = softened_divergence
    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None
    agree: Callable[[Any, Any], tuple[int, int] | None] = same_class
    kind: str = "classification"
    deliver: Callable[[nn.Module, Path], None] = _nowhere
    show: Callable[[nn.Module], Any] | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.data, "batches") and (hasattr(self.data, "__iter__") or hasattr(self.data, "__getitem__")):
            raise MicrogliaError(
                f"The data of a task are the batches of every split, not one {type(self.data).__name__}; give "
                "data=mg.tasks.loaders(train=my_loader, test=my_test_loader)."
            )

    @property
    def headline(self) -> str:
        """Name of the main metric."""
        return next(iter(self.metrics))

    def is_better(self, value: float, other: float, metric: str | None = None) -> bool:
        """Tells whether one value of a metric, by default of the headline, is better than another."""
        better = self.metrics[metric or self.headline].better
        return value > other if better == "higher" else value < other

    def example_batch(self, n: int) -> Any:
        """Returns the example repeated ``n`` times as one batch of inputs."""
        return repeat_example(self.example, n)


def _hits(k: int) -> Callable[[Tensor, Tensor], Tensor]:
    def values(outputs: Tensor, targets: Tensor) -> Tensor:
        best = outputs.topk(min(k, outputs.shape[1]), dim=1).indices
        return (best == targets[:, None]).any(1)

    return values


CLASSIFICATION: Mapping[str, AnyMetric] = {
    "accuracy": mean_metric(_hits(1)),
    "top5": mean_metric(_hits(5)),
    "loss": mean_metric(
        lambda outputs, targets: functional.cross_entropy(outputs, targets, reduction="none"), better="lower", unit=""
    ),
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
