"""One training step, used by every loop of the library: move, forward, loss, backward, clip, optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from microglia.core.batch import map_tensors, to_device
from microglia.core.errors import TrainingError
from microglia.tasks.task import Task
from microglia.train.recover import distillation

Penalty = Callable[[], Tensor | float]
Backward = Callable[[Tensor], object]


def objective(
    task: Task, *, training: bool = True, teacher: nn.Module | None = None, weight: float = 0.0, temperature: float = 1.0
) -> Callable[[Any, Any, Any], Tensor]:
    """Returns the objective of a task: a function (outputs, targets, inputs) -> mean loss of a batch.

    Args:
        task: A task; its ``training_loss`` is used, else its ``loss``.
        training: False always uses ``loss``.
        teacher: Dense model to distil from if ``weight`` > 0.
        weight: Share of the distillation, in [0, 1).
        temperature: Temperature of the distillation.
    """
    plain = task.training_loss if training and task.training_loss is not None else task.loss
    if weight and teacher is not None:
        return distillation(
            plain, teacher, weight=weight, temperature=temperature, forward=task.forward, distance=task.distance
        )
    return lambda outputs, targets, inputs: plain(outputs, targets)


@contextmanager
def _in_precision(precision: str, device: str) -> Iterator[None]:
    """Computes losses in float32, or with autocast to bfloat16.

    The backward pass of torch's fused attention on a CPU is in bfloat16 several times slower than that of the plain formula.
    """
    if precision == "float32":
        yield
        return
    with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext():
        yield


def _widened(output: Tensor) -> Tensor:
    """Returns an output of a model as a loss needs it: a box of 300 pixels in bfloat16 has steps of two."""
    return output.float() if output.dtype == torch.bfloat16 else output


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Step:
    """A training step of a task; call it with each batch.

    Attributes:
        task: Defines how a model is called with inputs.
        model: The model to train, already on ``device``.
        optimizers: Optimizers that step together.
        loss: (outputs, targets, inputs) -> mean loss of a batch; see `objective`.
        device: Device to which batches are moved.
        precision: ``float32``, or ``bfloat16`` autocast; losses see outputs in float32.
        backward: Computes gradients from the loss and stores them in ``grad``.
        clip: Bounds the norm of the gradients, or None.
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
        """Returns the mean loss of a batch, plus a penalty if there is one, with its autograd graph."""
        inputs, targets = to_device(inputs, self.device), to_device(targets, self.device)
        with _in_precision(self.precision, self.device.type):
            outputs = map_tensors(_widened, self.task.forward(self.model, inputs))
            value = self.loss(outputs, targets, inputs)
        return value if penalty is None else value + penalty()

    def descend(self, value: Tensor, *, rest: Callable[[], bool] | None = None) -> None:
        """Steps along the gradient of one loss; earlier gradients are cleared.

        Args:
            value: The loss, with its autograd graph.
            rest: Called after the backward pass: whether the optimizers skip this step.
        """
        self.clear()
        self.backward(value)
        self.act(rest=rest)

    def clear(self) -> None:
        """Clears the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def act(self, *, rest: Callable[[], bool] | None = None) -> None:
        """Steps along the clipped current gradients; ``rest`` as in `descend`."""
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
            rate: Learning rate of every group; None keeps the current ones.
            penalty: Term added to the loss after the forward pass.
            diverged: Error message if the loss is not finite; ``{loss}`` in it is the value.

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
        TrainingError: The loss is not finite; the text is ``diverged``, with the value for ``{loss}``.
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
    """Returns a function that bounds the norm of the parameters' gradients; None without a bound.

    Args:
        parameters: Returns the parameters.
        norm: The bound.
        by: Function that clips the gradients of parameters to a norm.
    """
    if norm is None:
        return None
    return lambda: by(list(parameters()), norm)
