"""Counts parameters, and those that pruning keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from microglia.core.auxiliary import auxiliary_paths, counted_parameters, is_auxiliary
from microglia.core.errors import SelectorError
from microglia.core.layers import prunable_layers
from microglia.core.modes import reading
from microglia.core.running import parametrizations


@dataclass(frozen=True)
class Parameters:
    """The number of parameters of a model; tensors shared by several modules count once, masks and auxiliary parts never.

    Attributes:
        all: Every parameter, biases and normalization included.
        prunable: Entries of the weights of the chosen prunable layers.
        kept: The prunable entries under a true mask, or the nonzero ones of a layer without a mask.
        nonzero_all: Nonzero entries of every parameter as the forward pass sees it; None if it was not stored.
        layers: Name of each chosen weight -> (its entries, kept entries); empty if only sums were stored.
    """

    all: int
    prunable: int
    kept: int
    nonzero_all: int | None = None
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Fraction of the prunable weights that is kept, in [0, 1]."""
        return self.kept / self.prunable

    @property
    def compression(self) -> float:
        """Number of all parameters divided by the number after pruning, at least 1 (survey, section 0.5)."""
        left = self.all - self.prunable + self.kept
        return self.all / left if left else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Returns every number, JSON-ready; an infinite compression is None."""
        return {
            "all": self.all,
            "prunable": self.prunable,
            "kept": self.kept,
            "nonzero_all": self.nonzero_all,
            "density": self.density,
            "compression": self.compression if math.isfinite(self.compression) else None,
            "layers": {name: list(counts) for name, counts in self.layers.items()},
        }


@dataclass(frozen=True)
class Weight:
    """One parameter of a model; a shared parameter occurs once.

    Attributes:
        name: Its name in a freshly built model, without the additions of a mask.
        module: The module that holds it; the masked module if it is tied to an unmasked one.
        attribute: Its name in that module.
    """

    name: str
    module: nn.Module
    attribute: str

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The trainable tensors behind it: the parameter itself, or the originals of a parametrization."""
        steps = parametrizations(self.module).get(self.attribute)
        return (getattr(self.module, self.attribute),) if steps is None else tuple(steps.parameters(recurse=False))

    @property
    def value(self) -> Tensor:
        """The tensor as the forward pass sees it."""
        return getattr(self.module, self.attribute)  # type: ignore[no-any-return]

    def nonzero(self) -> int:
        """Returns the number of nonzero entries; all entries on the ``meta`` device, which has no values."""
        value = self.value
        return value.numel() if value.is_meta else int(value.count_nonzero())

    def entries(self) -> tuple[int, int]:
        """Returns (all entries, kept entries): kept are those under a true mask, or the nonzero ones without a mask."""
        masks = _masks(self.module, self.attribute)
        shape = self.value.shape
        if not masks or masks[0].is_meta:
            return shape.numel(), self.nonzero()
        kept = masks[0].expand(shape)
        for mask in masks[1:]:
            kept = kept & mask
        return shape.numel(), int(kept.count_nonzero())


def weights(model: nn.Module) -> Iterator[Weight]:
    """Yields every parameter once: prunable weights first, under the names of `prunable_layers`, then the others.

    Parameters of auxiliary parts are left out.
    """
    seen: set[int] = set()
    auxiliary = auxiliary_paths(model)
    try:
        prunable = prunable_layers(model)
    except SelectorError:  # a model without linear and convolution layers
        prunable = {}
    for layer in prunable.values():
        seen.add(id(layer.raw))
        yield _weight(layer.name, layer.holders)
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList) or is_auxiliary(path, auxiliary):
            continue
        own = [name for name, value in module._parameters.items() if value is not None]
        for attribute in [*own, *parametrizations(module)]:
            weight = Weight(f"{path}.{attribute}" if path else attribute, module, attribute)
            if not seen.intersection(map(id, weight.stored)):
                seen.update(map(id, weight.stored))
                yield weight


def _weight(name: str, holders: Sequence[tuple[nn.Module, str]]) -> Weight:
    module, attribute = next((holder for holder in holders if _masks(*holder)), holders[0])
    return Weight(name, module, attribute)


def _masks(module: nn.Module, attribute: str) -> list[Tensor]:
    attached = (getattr(step, "mask", None) for step in parametrizations(module).get(attribute, ()))
    return [mask for mask in attached if isinstance(mask, Tensor) and mask.dtype == torch.bool]


def _chosen(model: nn.Module, layers: Sequence[str], exclude: Sequence[str]) -> list[Weight]:
    """Returns the prunable weights; for a model without layers, such as a graph, every matrix."""
    try:
        return [_weight(name, layer.holders) for name, layer in prunable_layers(model, layers, exclude).items()]
    except SelectorError:
        matrices = [weight for weight in weights(model) if weight.value.ndim > 1]
        if tuple(layers) != ("*",) or exclude or not matrices:
            raise
        return matrices


def count_parameters(model: nn.Module, layers: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Parameters:
    """Counts the parameters of a model, masked or folded, and leaves the model unchanged.

    Example:
        >>> import torch
        >>> counts = count_parameters(torch.nn.Linear(4, 3))
        >>> counts.all, counts.prunable
        (15, 12)

    Args:
        model: Any module with at least one linear or convolution layer.
        layers: Selectors of the layers that count as prunable (see `microglia.core.layers.matches`).
        exclude: Selectors of the layers that do not count as prunable.

    Raises:
        SelectorError: A selector matches no layer, or no layer remains.
    """
    with reading(model):
        table = {weight.name: weight.entries() for weight in _chosen(model, layers, exclude)}
        nonzero = sum(weight.nonzero() for weight in weights(model))
    return Parameters(
        all=counted_parameters(model),
        prunable=sum(total for total, _ in table.values()),
        kept=sum(kept for _, kept in table.values()),
        nonzero_all=nonzero,
        layers=table,
    )
