"""Baking: a copy whose weights are plain tensors that can be cut, compared with the given model."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from microglia.core.masks import bake
from microglia.graph.cutting.verify import ShrinkError, difference
from microglia.graph.dims.trace import arguments, copied

SAME = 1e-6
"""Maximum relative difference of the baked copy to the model, both in the model's own precision: their weights are equal."""

HOOKS = ("WeightNorm", "SpectralNorm")
"""Classes of old hooks of torch.nn.utils, which compute a weight before each forward pass."""


def baked_copy(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """Returns a copy with masks and other parametrizations written into the weights, and notes about these.

    The reference is the given model, never the changed copy.

    Raises:
        ShrinkError: An old hook computes a weight, or the copy's outputs differ from the model's.
    """
    _refuse_hooks(model)
    own = deepcopy(model)
    names = bake(own)
    if any(is_parametrized(module) for module in model.modules()):
        _check(deepcopy(model), deepcopy(own), example_inputs)
    if not names:
        return own, ()
    return own, (f"Other parametrizations than masks were written into the weights, and are gone: {', '.join(names)}.",)


def _refuse_hooks(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            kind = type(hook)
            if kind.__module__.startswith("torch.nn.utils.") and (kind.__name__ in HOOKS or hasattr(hook, "PRUNING_TYPE")):
                raise ShrinkError(
                    f"The {getattr(hook, 'name', None) or hook._tensor_name} of {path or type(module).__name__} is computed by "
                    f"an old hook of torch.nn.utils ({kind.__name__}): write it into the weight first with "
                    "torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove."
                )


def _check(model: nn.Module, own: nn.Module, example_inputs: Any) -> None:
    """Raises unless both have equal outputs in evaluation mode; both copies may be changed."""
    try:
        wanted = _run(model, example_inputs)
    except Exception:  # the trace reports inputs that do not fit
        return
    got = _run(own, example_inputs)
    pairs = [(w, g) for w, g in zip(wanted, got, strict=True) if isinstance(w, Tensor)]
    if not all(w.shape == g.shape and difference(g, w) <= SAME for w, g in pairs):
        raise ShrinkError(
            f"{type(model).__name__} computes something else once its parametrizations are written into its weights; "
            "nothing was returned. Remove the parametrizations first, with torch.nn.utils.parametrize.remove_parametrizations."
        )


def _run(model: nn.Module, example_inputs: Any) -> list[Any]:
    args, kwargs = pytree.tree_map(copied, arguments(example_inputs))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return pytree.tree_leaves(model.eval()(*args, **kwargs))
