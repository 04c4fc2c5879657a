"""Masks: 1 = keep. Buffers in the model through ``torch.nn.utils.parametrize``, held by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from microglia.core.errors import MicrogliaError
from microglia.core.layers import GraphLayer, Layer, prunable_attributes, prunable_layers
from microglia.core.recurrent import read_anew, settle

COUNTER = "num_batches_tracked"


class Masked(nn.Module):
    """The parametrization: forward sees the weight where the mask is true and exactly 0 elsewhere.

    The gradient of a masked weight is exactly 0. The mask is a boolean buffer, so it moves with the device and is saved.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the masked weight, of the same shape and dtype."""
        return torch.where(self.mask, weight, 0.0)


class Unfinished(nn.Module):
    """Base of parametrizations that a pruner puts on a model for as long as it searches; no file can hold them."""


SCORES = "microglia_scores"
"""Name under which a searched model holds the scores, so that they are trained, moved and shared out with it."""


def unfinished(model: nn.Module) -> bool:
    """Tells whether a pruner still searches in a model: its ``finish()`` was not called."""
    return SCORES in model._parameters or any(isinstance(m, Unfinished) for m in model.modules())


class MaskSet(Mapping[str, Tensor]):
    """Boolean masks by parameter name, an immutable value.

    Example:
        >>> masks = MaskSet({"fc.weight": torch.tensor([[True, False]])})
        >>> masks.kept, masks.total, masks.density
        (1, 2, 0.5)
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = {name: mask.detach().bool() for name, mask in masks.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        if not self:
            return "MaskSet(no layers)"
        return f"MaskSet({len(self)} layers, {self.kept:,} of {self.total:,} kept, density {self.density:.4g})"

    @property
    def kept(self) -> int:
        """Weights kept."""
        return sum(int(m.count_nonzero()) for m in self.values())

    @property
    def total(self) -> int:
        """Weights under a mask."""
        return sum(m.numel() for m in self.values())

    @property
    def density(self) -> float:
        """Fraction kept, in [0, 1]; 1 where there is no mask."""
        return self.kept / self.total if self.total else 1.0

    def same(self, other: Mapping[str, Tensor]) -> bool:
        """Tells whether both hold the same masks."""
        return set(self) == set(other) and all(torch.equal(self[n], other[n].bool()) for n in self)

    def nested_in(self, other: Mapping[str, Tensor]) -> bool:
        """Tells whether everything kept here is kept in ``other``, on the layers of this set."""
        return all(bool((other[n].bool() | ~self[n]).all()) for n in self)


def mask(model: nn.Module, masks: Mapping[str, Tensor]) -> MaskSet:
    """Attaches masks to a model in place, or replaces those attached before.

    Args:
        model: Any module.
        masks: By parameter name as in `prunable_layers`, shaped like the weight, true or 1 = keep.

    Returns:
        The masks now attached.

    Raises:
        MicrogliaError: A name is not a prunable layer of this model, or a shape differs.
    """
    layers = prunable_layers(model)
    for name, value in masks.items():
        if name not in layers:
            raise MicrogliaError(f"There is no prunable layer {name!r} in {type(model).__name__}; see prunable_layers().")
        if value.shape != layers[name].shape:
            raise MicrogliaError(
                f"The mask of {name!r} has shape {tuple(value.shape)}, its weight {tuple(layers[name].shape)}."
            )
    for name, value in masks.items():
        _attach(layers[name], value.detach().bool())
    return masks_of(model)


def _attach(layer: Layer, value: Tensor, place: int | None = None) -> None:
    """Attaches a mask, or replaces the one there; ``place`` is where among other parametrizations, None for the last."""
    present = _find(layer)
    if present is not None:
        present.mask.copy_(value)
        return
    # Laid out like the weight (channels-last, say), or the masked weight would not be and each convolution would convert it.
    shared = Masked(torch.empty_like(layer.raw, dtype=torch.bool).copy_(value))
    for module, attribute in layer.holders:
        if parametrize.is_parametrized(module, attribute):
            # torch's function reads the weight to check shapes, and that moves on a state such as spectral norm's.
            steps = _steps(module, attribute)
            steps.insert(len(steps) if place is None else min(place, len(steps)), shared)
            read_anew(module)
        else:
            attach_parametrization(module, attribute, shared)


def attach_parametrization(module: nn.Module, attribute: str, parametrization: nn.Module) -> None:
    """Puts a parametrization over a tensor of a module, whose trainable parameter stays the object that it was.

    torch's own function resets the parameter's place in the graph, and with it the hooks by which DistributedDataParallel
    gathers its gradient. It is handed a copy here, and the parameter is put back.
    """
    raw = module._parameters.get(attribute)
    if raw is None:  # parametrized already: torch only appends
        parametrize.register_parametrization(module, attribute, parametrization)
        read_anew(module)
        return
    module._parameters[attribute] = nn.Parameter(raw.detach().clone(), requires_grad=raw.requires_grad)
    parametrize.register_parametrization(module, attribute, parametrization)
    module.parametrizations[attribute].original = raw  # type: ignore[union-attr,index,assignment]
    read_anew(module)


def _steps(module: nn.Module, attribute: str) -> parametrize.ParametrizationList:
    return module.parametrizations[attribute]  # type: ignore[union-attr,index,return-value]


def _find(layer: Layer) -> Masked | None:
    module, attribute = layer.holders[0]
    if not parametrize.is_parametrized(module, attribute):
        return None
    return next((p for p in module.parametrizations[attribute] if isinstance(p, Masked)), None)  # type: ignore[index]


def masks_of(model: nn.Module) -> MaskSet:
    """Returns copies of the masks attached to a model; empty when there are none."""
    found = {name: _find(layer) for name, layer in prunable_layers(model).items()} if _has_masks(model) else {}
    return MaskSet({name: masked.mask.clone() for name, masked in found.items() if masked is not None})


def _has_masks(model: nn.Module) -> bool:
    return any(isinstance(m, Masked) for m in model.modules())


def fold(model: nn.Module) -> nn.Module:
    """Writes the masks into the weights as zeros and removes them, in place; returns the model.

    The outputs in evaluation mode stay bit for bit the same, and the state is spelled as before the masks were attached.
    Where the mask comes after another parametrization (spectral norm, a low-rank adapter), no zeros below that one give the
    masked weight: the weight itself then becomes a plain parameter, and the other parametrization is gone as well. One that
    comes after the mask stays.
    """
    if not _has_masks(model):
        return model
    for layer in prunable_layers(model).values():
        if _find(layer) is not None:
            _fold(layer)
    return model


@torch.no_grad()
def _fold(layer: Layer) -> None:
    if not _mask_first(layer):
        baked: list[nn.Parameter] = []
        values = [_baked(*holder) for holder in layer.holders]  # all before the first changes: they share a tensor
        for (module, attribute), value in zip(layer.holders, values, strict=True):
            tied = next((p for p in baked if torch.equal(p, value)), value)
            detach(module, attribute, tied)
            baked.append(tied)  # type: ignore[arg-type] # a layer's weight is a parameter
        return
    masked = cast(Masked, _find(layer))
    layer.raw.masked_fill_(~masked.mask, 0.0)
    for module, attribute in layer.holders:
        _strip(module, attribute)


def _mask_first(layer: Layer) -> bool:
    """Tells whether zeros in the trainable tensor do what the mask does: nothing stands between the two."""
    return all(parametrize.is_parametrized(*holder) and isinstance(_steps(*holder)[0], Masked) for holder in layer.holders)


def _strip(module: nn.Module, attribute: str) -> None:
    """Removes the mask alone; other parametrizations and the tensor below stay."""
    steps = _steps(module, attribute)
    place = next(i for i, step in enumerate(steps) if isinstance(step, Masked))
    if len(steps) == 1:
        detach(module, attribute)
    else:
        del steps[place]


def bake(model: nn.Module) -> list[str]:
    """Replaces every parametrized tensor of a model by its present value, a plain parameter, in place.

    The outputs in evaluation mode stay bit for bit the same. Use it where a weight has to be one tensor, as to cut it.

    Returns:
        The names of the tensors that had another parametrization than a mask.
    """
    others = parametrized(model)
    fold(model)
    held = [(path, m, a) for path, m in model.named_modules() for a in _parametrized(m)]
    with torch.no_grad():
        values = [_baked(module, attribute) for _, module, attribute in held]
    for (_, module, attribute), value in zip(held, values, strict=True):
        detach(module, attribute, value)
    return others


def parametrized(model: nn.Module) -> list[str]:
    """Returns the names of the tensors of a model that have another parametrization than a mask."""
    return [
        f"{path}.{attribute}".removeprefix(".")
        for path, module in model.named_modules()
        for attribute in _parametrized(module)
        if not all(isinstance(step, Masked) for step in _steps(module, attribute))
    ]


def _parametrized(module: nn.Module) -> list[str]:
    return list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]


def _baked(module: nn.Module, attribute: str) -> Tensor:
    """Returns the value of a parametrized tensor in evaluation mode as a tensor of its own, trainable if anything below is."""
    steps = _steps(module, attribute)
    modes = {step: step.training for step in steps.modules()}
    try:
        for step in modes:  # not by eval(), which a parametrization may have rewritten
            step.training = False
        value: Tensor = steps().detach().clone()
    finally:
        for step, mode in modes.items():
            step.training = mode
    if not any(name.startswith("original") for name in steps._parameters):
        return value
    return nn.Parameter(value, any(p.requires_grad for p in steps.parameters()))


def detach(module: nn.Module, attribute: str, value: Tensor | None = None) -> None:
    """Removes the parametrizations of a tensor and leaves its original, or ``value``, as the module's own.

    torch's own function deletes the attribute from the module's class, which copies of the module share: they would break.
    """
    lists: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    original = lists[attribute].original if value is None else value
    if len(lists) > 1:
        del lists[attribute]
        module.__class__ = type(type(module).__name__, type(module).__bases__, _without(type(module), attribute))
    else:
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    if isinstance(original, nn.Parameter):
        module.register_parameter(attribute, original)
    else:
        module.register_buffer(attribute, original)  # type: ignore[arg-type]
    for name in _later(module):  # the order of a fresh module, by which optimizers count
        module._parameters[name] = module._parameters.pop(name)
    settle(module)


def _later(module: nn.Module) -> list[str]:
    """Returns the parameters of a module that come after those that masks were on, in the order of a fresh module."""
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name in module._parameters]
    first = prunable_attributes(module)
    return [name for name in module._parameters if name not in first]


def _without(cls: type, attribute: str) -> dict[str, object]:
    return {k: v for k, v in vars(cls).items() if k not in (attribute, "__dict__", "__weakref__")}


@torch.no_grad()
def enforce(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Sets masked weights to 0, and with them every entry of the optimizer's state for those weights.

    Weight decay and momentum move masked weights although their gradient is 0. The forward pass does not see it, but a
    weight that grows back would start from stale values (survey 0.3). State tensors of another shape are left alone.
    So is a layer whose mask comes after another parametrization: zeros below that one would change the weights that are kept.
    """
    if not _has_masks(model):
        return
    for layer in prunable_layers(model).values():
        masked = _find(layer)
        if masked is None or not _mask_first(layer):
            continue
        layer.raw.masked_fill_(~masked.mask, 0.0)
        state = optimizer.state.get(layer.raw, {}) if optimizer is not None else {}
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == masked.mask.shape:
                value.masked_fill_(~masked.mask, 0.0)


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Loads a ``state_dict`` of the same model, masked or not: attaches or removes masks first so that the names agree.

    Another parametrization that the state no longer has, for a mask after it was folded, becomes a plain weight again.

    Returns the model, changed in place.
    """
    _bake_absent(model, state)
    places: dict[str, int] = {}
    if _has_masks(model) or any(key.endswith(".mask") for key in state):
        layers = prunable_layers(model)
        places = {name: at for name, layer in layers.items() if (at := _mask_place(layer, state)) is not None}
        for name, layer in layers.items():
            if _find(layer) is not None and places.get(name) != _place(layer):
                for module, attribute in layer.holders:
                    _strip(module, attribute)
        for name, at in places.items():
            _attach(layers[name], state[f"{_prefix(name)}{at}.mask"].bool(), at)
    complete = OrderedDict(state)
    for path, module in model.named_modules():
        if isinstance(module, GraphLayer) and f"{path}.{COUNTER}" not in state and hasattr(module, COUNTER):
            complete[f"{path}.{COUNTER}"] = getattr(module, COUNTER)  # files of before graphs counted their batches
    complete._metadata = model.state_dict()._metadata  # type: ignore[attr-defined] # versions by which modules read old states
    model.load_state_dict(complete)
    return model


def _bake_absent(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Bakes the parametrized tensors that a state holds as plain ones, unless a mask is all they have."""
    for name in parametrized(model):
        if name in state and not any(key.startswith(_prefix(name)) for key in state):
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            with torch.no_grad():
                detach(module, attribute, _baked(module, attribute))


def _place(layer: Layer) -> int:
    return next(i for i, step in enumerate(_steps(*layer.holders[0])) if isinstance(step, Masked))


def _mask_place(layer: Layer, state: Mapping[str, Tensor]) -> int | None:
    """Returns the place of a layer's mask among its parametrizations in a state; None without one.

    Parametrizations of the user's own may hold a mask too: the model has them at the places where a state has the others.
    """
    prefix, own = _prefix(layer.name), dict[int, Tensor]()
    if parametrize.is_parametrized(*layer.holders[0]):
        others = [step.state_dict() for step in _steps(*layer.holders[0]) if not isinstance(step, Masked)]
        own = {i: step["mask"] for i, step in enumerate(others) if "mask" in step}
    keys = (key.removeprefix(prefix).removesuffix(".mask") for key in state if key.startswith(prefix) and key.endswith(".mask"))
    found = {int(key): state[f"{prefix}{key}.mask"] for key in keys if key.isdigit()}
    fitting = [
        k
        for k, value in found.items()
        if (value.dtype, value.shape) == (torch.bool, layer.shape) and {i - (i > k) for i in found if i != k} == own.keys()
    ]
    if len(fitting) > 1:  # then the model's own masks have to be there as they are
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
    """Returns how the keys of a parametrized tensor begin in a state."""
    path, _, attribute = name.rpartition(".")
    return f"{path}.parametrizations.{attribute}.".removeprefix(".")
