"""Recurrent layers under parametrizations: torch also keeps their weights in a list that it passes to kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize


def read_anew(module: nn.Module) -> None:
    """Makes a parametrized recurrent layer compute its weights at each call; any other module is left alone.

    ``nn.RNNBase`` builds a list of its weights when one is assigned. A mask would not reach this list, or the list would hold
    tensors of an earlier call, which cannot be copied. torch gives a parametrized module a class of its own; there the list
    becomes a property. Flattening for cuDNN is a no-op there, because these weights are computed at each call.
    """
    if not isinstance(module, nn.RNNBase) or not parametrize.is_parametrized(module):
        return
    own: Any = type(module)
    own._flat_weights = property(_present, _ignore)
    own._weights_have_changed = _no
    own.flatten_parameters = _nothing


def settle(module: nn.Module) -> None:
    """Restores the list of plain weights of a recurrent layer once no parametrization remains."""
    if isinstance(module, nn.RNNBase) and not parametrize.is_parametrized(module):
        module._init_flat_weights()


def _present(module: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]


def _ignore(module: nn.RNNBase, value: object) -> None:
    """Lets torch's own code assign the list."""


def _no(module: nn.RNNBase) -> bool:
    return False


def _nothing(module: nn.RNNBase) -> None:
    return None
