"""One training step, used by every loop of the house: move, forward, loss, backward, clip, optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import to_device
from microglia.core.errors import TrainingError
from microglia.tasks.task import Task
from microglia.train.recover import distillation

Penalty = Callable[[], Tensor | float]
Backward = Callable[[Tensor], object]


def objective(
    task: Task, *, training: bool = True, teacher: nn.Module | None = None, weight: float = 0.0, temperature: float = 1.0
) -> Callable[[Any, Any, Any], Tensor]:
    """Returns what a task minimizes, as a function (outputs, targets, inputs) -> mean loss of a batch.

    Args:
        task: Its ``training_loss``, else its ``loss``.
        training: False for ``loss`` in any case.
        teacher: Dense model to distil from where ``weight`` > 0.
        weight: Share of the distillation, in [0, 1).
        temperature: Temperature of the distillation.
    """
    plain = task.training_loss if training and task.training_loss is not None else task.loss
    if weight and teacher is not None:
        return distillation(
            plain, teacher, weight=weight, temperature=temperature, forward=task.forward, distance=task.distance
        )
    return lambda outputs, targets, inputs: plain(outputs, targets)


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Step:
    """A training step of a task; call it with one batch after the other.

    Attributes:
        task: Says how a model is called with inputs.
        model: Trained; on ``device`` already.
        optimizers: Stepped together.
        loss: (outputs, targets, inputs) -> mean loss of a batch; see `objective`.
        device: Where batches are moved.
        precision: ``float32``, or ``bfloat16`` autocast.
        backward: From the loss to the gradients, which it leaves in ``grad``.
        clip: From the gradients to gradients of bounded norm, or None.
    """

    task: Task
    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    loss: Callable[[Any, Any, Any], Tensor]
    device: torch.device
    precision: str = "float32"
    backward: Backward = _backward
    clip: Callable[[], object] | None = None

    def set_rate(self, rate: float) -> None:
        """Sets the learning rate of every parameter group."""
        for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
            group["lr"] = rate

    def loss_of(self, inputs: Any, targets: Any, penalty: Penalty | None = None) -> Tensor:
        """Returns the mean loss of a batch, with a penalty if there is one, with its graph."""
        inputs, targets = to_device(inputs, self.device), to_device(targets, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            value = self.loss(self.task.forward(self.model, inputs), targets, inputs)
        return value if penalty is None else value + penalty()

    def descend(self, value: Tensor, *, rest: Callable[[], bool] | None = None) -> None:
        """Steps along the gradient of one loss, without what gradients there were.

        Args:
            value: With its graph.
            rest: Asked once the gradients are there: whether the optimizers rest at this step.
        """
        self.clear()
        self.backward(value)
        self.act(rest=rest)

    def clear(self) -> None:
        """Removes the gradients there are."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def act(self, *, rest: Callable[[], bool] | None = None) -> None:
        """Steps along the gradients there are, clipped; ``rest`` as in `descend`."""
        if self.clip is not None:
            self.clip()
        if rest is None or not rest():
            for optimizer in self.optimizers:
                optimizer.step()

    def __call__(
        self, batch: tuple[Any, Any], *, rate: float | None = None, penalty: Penalty | None = None, diverged: str
    ) -> Tensor:
        """Trains on one batch and returns its loss, detached.

        Args:
            batch: (inputs, targets).
            rate: Learning rate of every group; None leaves them.
            penalty: Added to the loss after the forward pass.
            diverged: What to say where the loss is not finite; ``{loss}`` in it is the value.

        Raises:
            TrainingError: The loss is not finite; the model holds the weights before the step.
        """
        if rate is not None:
            self.set_rate(rate)
        value = require_finite(self.loss_of(*batch, penalty), diverged)
        self.descend(value)
        return value.detach()


def require_finite(value: Tensor, diverged: str) -> Tensor:
    """Returns the loss.

    Raises:
        TrainingError: It is not finite; says ``diverged``, with the value for ``{loss}`` in it.
    """
    if not torch.isfinite(value):
        raise TrainingError(diverged.format(loss=value.item()))
    return value


def clipped(
    parameters: Callable[[], Iterable[Tensor]],
    norm: float | None,
    *,
    by: Callable[[Any, float], object] = nn.utils.clip_grad_norm_,
) -> Callable[[], object] | None:
    """Returns what bounds the norm of the parameters' gradients; None without a bound.

    Args:
        parameters: Gives them.
        norm: The bound.
        by: Clips the gradients of parameters to a norm.
    """
    if norm is None:
        return None
    return lambda: by(list(parameters()), norm)
