"""Loading of states into models: masks are attached or removed first, so that both have the same names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from microglia.core.errors import MicrogliaError
from microglia.core.layers import GraphLayer, Layer, prunable_layers
from microglia.core.masks import Masked, attach_mask, has_masks, mask_on, parametrized, strip_mask
from microglia.core.parametrizations import baked, detach, steps_of
from microglia.core.sharded import shard_like

COUNTER = "num_batches_tracked"


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Loads a ``state_dict`` of the same model, masked or not: attaches or removes masks first so that the names agree.

    A parametrization that the state lacks, because a mask after it was folded, becomes a plain weight again.

    Returns the model, changed in place.
    """
    match_masks(model, state)
    own = model.state_dict()
    complete = OrderedDict((key, shard_like(v, own[key]) if key in own else v) for key, v in state.items())
    for path, module in model.named_modules():
        if isinstance(module, GraphLayer) and f"{path}.{COUNTER}" not in state and hasattr(module, COUNTER):
            complete[f"{path}.{COUNTER}"] = getattr(module, COUNTER)  # files written before graphs counted their batches
    complete._metadata = own._metadata  # type: ignore[attr-defined] # versions by which modules read old states
    model.load_state_dict(complete)
    return model


def match_masks(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Attaches or removes masks, so that a model's state has the names of ``state``; the other tensors stay as they are."""
    _bake_absent(model, state)
    places: dict[str, int] = {}
    if has_masks(model) or any(key.endswith(".mask") for key in state):
        layers = prunable_layers(model)
        places = {name: at for name, layer in layers.items() if (at := _mask_place(layer, state)) is not None}
        for name, layer in layers.items():
            if mask_on(layer) is not None and places.get(name) != _place(layer):
                for module, attribute in layer.holders:
                    strip_mask(module, attribute)
        for name, at in places.items():
            attach_mask(layers[name], state[f"{_prefix(name)}{at}.mask"].bool(), at)


def without_masks(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Writes the masks of a state into its weights, so that it fits the same model without masks.

    A weight with another parametrization beside its mask keeps its names. A parametrization without tensors leaves no trace in
    a state, so that it is not noticed.

    Args:
        state: A ``state_dict`` of a masked model, or of any other.

    Returns:
        (state, removed): the names of plain weights, and the number of weights that masks set to zero.
    """
    plain, removed = dict(state), 0
    for original in (name for name in state if name.endswith(".original")):
        under = original.removesuffix("original")
        path, found, attribute = under.removesuffix(".").rpartition("parametrizations.")
        mask = f"{under}0.mask"
        if not found or {name for name in state if name.startswith(under)} != {original, mask}:
            continue
        weight, kept = plain.pop(original), plain.pop(mask).bool()
        plain[path + attribute] = torch.where(kept, weight, 0)
        removed += int((~kept).sum())
    return plain, removed


def _bake_absent(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Bakes parametrized tensors that a state holds as plain ones, unless their only parametrization is a mask."""
    for name in parametrized(model):
        if name in state and not any(key.startswith(_prefix(name)) for key in state):
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            detach(module, attribute, baked(module, attribute))


def _place(layer: Layer) -> int:
    return next(i for i, step in enumerate(steps_of(*layer.holders[0])) if isinstance(step, Masked))


def _mask_place(layer: Layer, state: Mapping[str, Tensor]) -> int | None:
    """Returns the place of a layer's mask among its parametrizations in a state; None without one.

    A user's own parametrization may also hold a mask; the model then has it at the same place as the state.
    """
    prefix, own = _prefix(layer.name), dict[int, Tensor]()
    if parametrize.is_parametrized(*layer.holders[0]):
        others = [step.state_dict() for step in steps_of(*layer.holders[0]) if not isinstance(step, Masked)]
        own = {i: step["mask"] for i, step in enumerate(others) if "mask" in step}
    keys = (key.removeprefix(prefix).removesuffix(".mask") for key in state if key.startswith(prefix) and key.endswith(".mask"))
    found = {int(key): state[f"{prefix}{key}.mask"] for key in keys if key.isdigit()}
    fitting = [
        k
        for k, value in found.items()
        if (value.dtype, value.shape) == (torch.bool, layer.shape) and {i - (i > k) for i in found if i != k} == own.keys()
    ]
    if len(fitting) > 1:  # then the state must hold the model's own masks
        fitting = [k for k in fitting if all(_equal(own[i - (i > k)], v) for i, v in found.items() if i != k)]
        if len(fitting) != 1:
            raise MicrogliaError(
                f"The state holds {len(found)} masks of {layer.name!r}, of which a parametrization of your own has another: "
                "rename the tensor `mask` of that one."
            )
    return fitting[0] if fitting else None


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other), other)


def _prefix(name: str) -> str:
    """Returns the prefix of a parametrized tensor's keys in a state."""
    path, _, attribute = name.rpartition(".")
    return f"{path}.parametrizations.{attribute}.".removeprefix(".")
