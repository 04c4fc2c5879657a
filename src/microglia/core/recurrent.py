"""Recurrent layers under parametrizations: torch keeps their weights in a second place, a list that it hands to kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize


def read_anew(module: nn.Module) -> None:
    """Makes a parametrized recurrent layer compute its weights at each call; any other module is left alone.

    ``nn.RNNBase`` holds a list of its weights, made when one is assigned: a mask would not reach it, or it would hold what an
    earlier call computed, which cannot be copied. torch gave the module a class of its own when it was parametrized, and there
    the list becomes a property. What flattens weights for cuDNN does nothing there, for these weights are made anew.
    """
    if not isinstance(module, nn.RNNBase) or not parametrize.is_parametrized(module):
        return
    own: Any = type(module)
    own._flat_weights = property(_present, _ignore)
    own._weights_have_changed = _no
    own.flatten_parameters = _nothing


def settle(module: nn.Module) -> None:
    """Makes the list of a recurrent layer that of its plain weights again, once no parametrization is left."""
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
