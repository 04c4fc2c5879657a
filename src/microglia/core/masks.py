"""Masks: 1 = keep. Buffers in the model through ``torch.nn.utils.parametrize``, held by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from microglia.core.errors import MicrogliaError
from microglia.core.layers import Layer, prunable_attributes, prunable_layers


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


def _attach(layer: Layer, value: Tensor) -> None:
    present = _find(layer)
    if present is not None:
        present.mask.copy_(value)
        return
    # Laid out like the weight (channels-last, say), or the masked weight would not be and each convolution would convert it.
    shared = Masked(torch.empty_like(layer.raw, dtype=torch.bool).copy_(value))
    for module, attribute in layer.holders:
        attach_parametrization(module, attribute, shared)


def attach_parametrization(module: nn.Module, attribute: str, parametrization: nn.Module) -> None:
    """Puts a parametrization over a tensor of a module, whose trainable parameter stays the object that it was.

    torch's own function resets the parameter's place in the graph, and with it the hooks by which DistributedDataParallel
    gathers its gradient. It is handed a copy here, and the parameter is put back.
    """
    raw = module._parameters.get(attribute)
    if raw is None:  # parametrized already: torch only appends
        parametrize.register_parametrization(module, attribute, parametrization)
        return
    module._parameters[attribute] = nn.Parameter(raw.detach().clone(), requires_grad=raw.requires_grad)
    parametrize.register_parametrization(module, attribute, parametrization)
    module.parametrizations[attribute].original = raw  # type: ignore[union-attr,index,assignment]


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

    The outputs stay bit for bit the same, and the state is spelled as before the masks were attached.
    """
    if not _has_masks(model):
        return model
    for layer in prunable_layers(model).values():
        if (masked := _find(layer)) is not None:
            with torch.no_grad():
                layer.raw.masked_fill_(~masked.mask, 0.0)
            for module, attribute in layer.holders:
                detach(module, attribute)
    return model


def detach(module: nn.Module, attribute: str) -> None:
    """Removes a parametrization and leaves its tensor as the module's own.

    torch's own function deletes the attribute from the module's class, which copies of the module share: they would break.
    """
    lists: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    original = lists[attribute].original
    if len(lists) > 1:
        del lists[attribute]
        module.__class__ = type(type(module).__name__, type(module).__bases__, _without(type(module), attribute))
    else:
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    module.register_parameter(attribute, original)  # type: ignore[arg-type]
    first = prunable_attributes(module)
    for name in [n for n in module._parameters if n not in first]:  # the order of a fresh module, by which optimizers count
        module._parameters[name] = module._parameters.pop(name)


def _without(cls: type, attribute: str) -> dict[str, object]:
    return {k: v for k, v in vars(cls).items() if k not in (attribute, "__dict__", "__weakref__")}


@torch.no_grad()
def enforce(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Sets masked weights to 0, and with them every entry of the optimizer's state for those weights.

    Weight decay and momentum move masked weights although their gradient is 0. The forward pass does not see it, but a
    weight that grows back would start from stale values (survey 0.3). State tensors of another shape are left alone.
    """
    if not _has_masks(model):
        return
    for layer in prunable_layers(model).values():
        masked = _find(layer)
        if masked is None:
            continue
        layer.raw.masked_fill_(~masked.mask, 0.0)
        state = optimizer.state.get(layer.raw, {}) if optimizer is not None else {}
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == masked.mask.shape:
                value.masked_fill_(~masked.mask, 0.0)


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Loads a ``state_dict`` of the same model, masked or not: attaches or folds masks first so that the names agree.

    Returns the model, changed in place.
    """
    suffix = ".parametrizations.{}.0.mask"
    masked = {
        name: state[key]
        for name in (prunable_layers(model) if _has_masks(model) or any(k.endswith(".0.mask") for k in state) else {})
        if (key := _mask_key(name, suffix)) in state
    }
    if set(masked) != set(masks_of(model)):
        fold(model)
    if masked:
        mask(model, masked)
    complete = OrderedDict(state)
    complete._metadata = model.state_dict()._metadata  # type: ignore[attr-defined] # versions by which modules read old states
    model.load_state_dict(complete)
    return model


def _mask_key(name: str, suffix: str) -> str:
    path, _, attribute = name.rpartition(".")
    return f"{path}{suffix.format(attribute)}".removeprefix(".")
