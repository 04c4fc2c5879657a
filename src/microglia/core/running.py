"""Runs a user's model on example inputs without side effects."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError


def run(model: nn.Module, example: Example) -> Any:
    """Returns the model's output.

    Raises:
        MicrogliaError: The model does not run on these inputs; the text describes the inputs.
    """
    try:
        return model(*example.args, **example.kwargs)
    except MicrogliaError:
        raise
    except Exception as error:
        given = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in example.tensors) or "no tensors"
        raise MicrogliaError(
            f"{type(model).__name__} does not run on the example inputs ({given}): {first_line(error).rstrip('.')}. Give "
            "inputs of the shape, dtype and device that the model is called with."
        ) from error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, at most 200 characters, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def cuda_in_use() -> bool:
    """Tells whether anything in this process has used CUDA."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Disables gradients, and restores torch's random generators at the end."""
    devices = range(torch.cuda.device_count()) if cuda_in_use() else ()
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        yield


def twin(model: nn.Module) -> nn.Module:
    """Returns a deep copy in evaluation mode, masks still attached.

    Raises:
        MicrogliaError: The model cannot be copied.
    """
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise MicrogliaError(
            f"{type(model).__name__} cannot be copied for measuring: {first_line(error)} Models are measured on a "
            "deep copy; keep in the model nothing that copy.deepcopy refuses."
        ) from error


def parametrizations(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Returns the parametrized attributes of a module and the steps of each; empty where there are none."""
    if not parametrize.is_parametrized(module):
        return {}
    return dict(module.parametrizations.items())  # type: ignore[operator,union-attr]


def folded_twin(model: nn.Module) -> nn.Module:
    """Returns a deep copy in evaluation mode, without gradients, its parametrizations (masks) written into the weights.

    ``remove_parametrizations`` is not used: it deletes the property of the class, which a deep copy shares with the model, and
    writes into a tensor that an unmasked module (a tied embedding) may share.
    """
    copied = twin(model)
    with torch.no_grad():
        for module in list(copied.modules()):
            values = {attribute: getattr(module, attribute).detach().clone() for attribute in parametrizations(module)}
            if values:
                del module.parametrizations
                module.__class__ = type(module).__bases__[0]  # the class it had before its first parametrization
            for attribute, value in values.items():
                module.register_parameter(attribute, nn.Parameter(value, requires_grad=False))
    return copied.requires_grad_(False)
