"""Reading evidence: runs inputs through the model, outputs and targets through the loss; a misfit raises one clear sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import call
from microglia.core.errors import ScoreError

MISFITS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)
"""Errors that torch and models raise for inputs of a wrong shape or kind."""


@contextmanager
def fitting(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Context in which a model's error about its inputs becomes a `ScoreError` that describes the inputs."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except MISFITS as error:
        raise ScoreError(
            f"The {type(model).__name__} does not take the inputs of evidence, {kind_of(inputs)}: {_reason(error)}. Give "
            "batches of (inputs, targets) as in training, on the model's device."
        ) from error


def outputs_of(model: nn.Module, inputs: Any, forward: Callable[[nn.Module, Any], Any] = call) -> Any:
    """Returns the model's outputs for a batch.

    Args:
        model: Any module.
        inputs: A tree of tensors.
        forward: (model, inputs) -> outputs.

    Raises:
        ScoreError: The model does not take inputs of this shape or kind.
    """
    with fitting(model, inputs):
        return forward(model, inputs)


def loss_of(loss: Any, outputs: Any, targets: Any) -> Tensor:
    """Returns the mean loss of a batch, one finite number.

    Raises:
        ScoreError: The loss does not take these outputs and targets, or does not return one finite number.
    """
    try:
        value = loss(outputs, targets)
    except torch.cuda.OutOfMemoryError:
        raise
    except MISFITS as error:
        raise ScoreError(
            f"The loss of evidence does not take the model's outputs, {kind_of(outputs)}, with the targets, "
            f"{kind_of(targets)}: {_reason(error)}."
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ScoreError(f"The loss of evidence gives the mean over a batch, a tensor of one number; got {kind_of(value)}.")
    if not torch.isfinite(value):
        raise ScoreError(f"The loss is {value.item()} while scoring: the gradient would be meaningless.")
    return value.reshape(())


def kind_of(value: Any) -> str:
    """Returns a description of a value in words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return "None" if value is None else f"a {type(value).__name__}"


def _reason(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return text[:200] or type(error).__name__
