"""Masks: 1 = keep. Buffers in the model through ``torch.nn.utils.parametrize``, held by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from microglia.core.errors import MicrogliaError
from microglia.core.layers import Layer, prunable_layers
from microglia.core.parametrizations import attach_parametrization, baked, detach, parametrized_tensors, steps_of
from microglia.core.recurrent import read_anew
from microglia.core.sharded import shard_like, whole, zeros_whole
from microglia.core.shown import html_table


class Masked(nn.Module):
    """The parametrization: forward sees the weight where the mask is true and exactly 0 elsewhere.

    The gradient of a masked weight is exactly 0. The mask is a boolean buffer, so it moves with the device and is saved. It is
    whole on every rank, also where the weight is sharded.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the masked weight, of the same shape and dtype."""
        return torch.where(shard_like(self.mask, weight), weight, 0.0)


class Unfinished(nn.Module):
    """Base of parametrizations that a pruner attaches while it searches; no file can store them."""


SCORES = "microglia_scores"
"""Name of the scores in a model during a search, so that they are trained, moved and distributed with it."""


def unfinished(model: nn.Module) -> bool:
    """Tells whether a pruner still searches in a model, that is, before its ``finish()``."""
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

    def _repr_html_(self) -> str:
        rows = [(name, m.numel(), kept := int(m.count_nonzero()), kept / max(1, m.numel())) for name, m in self.items()]
        return html_table(repr(self), ("layer", "weights", "kept", "density"), rows)

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
        masks: Masks by parameter name as in `prunable_layers`, shaped like the weight, true or 1 = keep.

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
                f"The mask of {name!r} has shape {tuple(value.shape)}, its weight {tuple(layers[name].shape)}: both must agree."
            )
    for name, value in masks.items():
        attach_mask(layers[name], whole(value.detach()).bool())
    return masks_of(model)


def attach_mask(layer: Layer, value: Tensor, place: int | None = None) -> None:
    """Attaches or replaces a mask; ``place`` is its index among other parametrizations, None for the last."""
    present = mask_on(layer)
    if present is not None:
        present.mask.copy_(value)
        return
    # The mask has the weight's layout (such as channels-last); otherwise each convolution would convert the masked weight.
    shared = Masked(zeros_whole(layer.raw, torch.bool).copy_(value))
    for module, attribute in layer.holders:
        if parametrize.is_parametrized(module, attribute):
            # torch's function reads the weight to check shapes, and this changes a state such as spectral norm's.
            steps = steps_of(module, attribute)
            steps.insert(len(steps) if place is None else min(place, len(steps)), shared)
            read_anew(module)
        else:
            attach_parametrization(module, attribute, shared)


def mask_on(layer: Layer) -> Masked | None:
    """Returns the mask of a layer, or None."""
    module, attribute = layer.holders[0]
    if not parametrize.is_parametrized(module, attribute):
        return None
    return next((p for p in module.parametrizations[attribute] if isinstance(p, Masked)), None)  # type: ignore[index]


def masks_of(model: nn.Module) -> MaskSet:
    """Returns copies of the masks attached to a model; empty when there are none."""
    found = {name: mask_on(layer) for name, layer in prunable_layers(model).items()} if has_masks(model) else {}
    return MaskSet({name: masked.mask.clone() for name, masked in found.items() if masked is not None})


def has_masks(model: nn.Module) -> bool:
    """Tells whether any tensor of a model is masked."""
    return any(isinstance(m, Masked) for m in model.modules())


def fold(model: nn.Module) -> nn.Module:
    """Writes the masks into the weights as zeros and removes them, in place; returns the model.

    The outputs in evaluation mode stay bit for bit the same, and the state has the names from before the masks. If the mask
    comes after another parametrization (spectral norm, a low-rank adapter), zeros below that one do not give the masked weight.
    The weight itself then becomes a plain parameter, and the other parametrization is removed too. A parametrization after the
    mask stays.
    """
    if not has_masks(model):
        return model
    for layer in prunable_layers(model).values():
        if mask_on(layer) is not None:
            _fold(layer)
    return model


@torch.no_grad()
def _fold(layer: Layer) -> None:
    if not _mask_first(layer):
        written: list[nn.Parameter] = []
        values = [baked(*holder) for holder in layer.holders]  # read all before the first change: they share a tensor
        for (module, attribute), value in zip(layer.holders, values, strict=True):
            tied = next((p for p in written if torch.equal(p, value)), value)
            detach(module, attribute, tied)
            written.append(tied)  # type: ignore[arg-type] # a layer's weight is a parameter
        return
    masked = cast(Masked, mask_on(layer))
    _clear(layer.raw, masked.mask)
    for module, attribute in layer.holders:
        strip_mask(module, attribute)


def _mask_first(layer: Layer) -> bool:
    """Tells whether zeros in the trainable tensor have the effect of the mask: nothing stands between the two."""
    return all(parametrize.is_parametrized(*holder) and isinstance(steps_of(*holder)[0], Masked) for holder in layer.holders)


def strip_mask(module: nn.Module, attribute: str) -> None:
    """Removes the mask alone; other parametrizations and the tensor below stay."""
    steps = steps_of(module, attribute)
    place = next(i for i, step in enumerate(steps) if isinstance(step, Masked))
    if len(steps) == 1:
        detach(module, attribute)
    else:
        del steps[place]


def bake(model: nn.Module) -> list[str]:
    """Replaces every parametrized tensor of a model by its present value, a plain parameter, in place.

    The outputs in evaluation mode stay bit for bit the same. Use it where a weight has to be one tensor, for example to cut it.

    Returns:
        The names of the tensors that had another parametrization than a mask.
    """
    others = parametrized(model)
    fold(model)
    held = [(path, m, a) for path, m in model.named_modules() for a in parametrized_tensors(m)]
    values = [baked(module, attribute) for _, module, attribute in held]
    for (_, module, attribute), value in zip(held, values, strict=True):
        detach(module, attribute, value)
    return others


def parametrized(model: nn.Module) -> list[str]:
    """Returns the names of the tensors of a model that have another parametrization than a mask."""
    return [
        f"{path}.{attribute}".removeprefix(".")
        for path, module in model.named_modules()
        for attribute in parametrized_tensors(module)
        if not all(isinstance(step, Masked) for step in steps_of(module, attribute))
    ]


@torch.no_grad()
def enforce(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Sets masked weights to 0, and every entry of the optimizer's state for these weights.

    Weight decay and momentum move masked weights although their gradient is 0. The forward pass does not see it, but a
    weight that grows back would start from stale values (survey 0.3). State tensors of another shape stay unchanged. A layer
    whose mask comes after another parametrization also stays: zeros below that one would change kept weights.
    """
    if not has_masks(model):
        return
    for layer in prunable_layers(model).values():
        masked = mask_on(layer)
        if masked is None or not _mask_first(layer):
            continue
        _clear(layer.raw, masked.mask)
        state = optimizer.state.get(layer.raw, {}) if optimizer is not None else {}
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == masked.mask.shape:
                _clear(value, masked.mask)


def _clear(tensor: Tensor, kept: Tensor) -> None:
    """Sets a tensor, sharded or not, to 0 in place where a whole mask is false."""
    tensor.masked_fill_(shard_like(~kept, tensor), 0.0)
