"""Units: all that a method keeps or removes, numbered over all layers, so that one vector holds a mask.

`LayerUnits` are the units of a pattern in each layer; `microglia.graph.channels.coupled.CoupledChannels` are the coupled
channels of the whole model. A vector of factors, soft or 0 and 1, is applied at the weights, or where a channel is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from microglia.core.errors import PatternError, SelectorError
from microglia.core.layers import Layer, oriented, prunable_layers
from microglia.core.left_out import tied_layers
from microglia.core.patterns import Block, Channel, Pattern, Reduction
from microglia.core.selection import keep_units
from microglia.graph.channels.coupled import CoupledChannels
from microglia.measure.macs import Macs, count_macs
from microglia.methods.block_scale import scale_blocks

Cost = Literal["auto", "units", "weights", "macs"]
"""Costs that a budget counts: units, their weights, or their multiply-accumulates."""


class Units(Protocol):
    """The common interface of both kinds. Vectors are (count,), in one fixed order.

    Attributes:
        names: Layers, or groups of coupled channels.
        lengths: Units in each.
        count: Units in all, padding included.
        costs: Cost of each unit in the budget, int64 (count,); 0 marks padding.
        scaled_names: Parameters that factors or masks act on.
        companions: Further parameters that must be zero for a removed unit to be zero.
    """

    names: Sequence[str]
    lengths: Sequence[int]
    count: int
    costs: Tensor
    scaled_names: Sequence[str]
    companions: Sequence[str]

    def reduce(self, values: Mapping[str, Tensor], how: Reduction) -> Tensor:
        """Returns one value per unit from one value per weight, by name of the weight; differentiable."""
        ...

    def members(self) -> Tensor:
        """Returns how many members the magnitude of a unit averages, int64 (count,): weights of a block, filters of a channel.

        Blocks at an edge, and channels that several layers write, are then not ranked by their number of members.
        """
        ...

    def scale(self, name: str, parameter: Tensor, factors: Tensor) -> Tensor:
        """Returns a parameter of ``scaled_names`` times the factors of its units; differentiable in both."""
        ...

    def companion(self, name: str, parameter: Tensor, kept: Tensor) -> Tensor:
        """Returns a companion with the entries of removed units set to zero."""
        ...

    def masks(self, kept: Tensor) -> dict[str, Tensor]:
        """Returns the masks of the prunable weights from one boolean per unit."""
        ...


def split(units: Units, vector: Tensor) -> dict[str, Tensor]:
    """Returns a vector's part of each layer or group."""
    return dict(zip(units.names, torch.split(vector, list(units.lengths)), strict=True))


def keep_count(units: Units, density: float) -> int:
    """Returns the cost to keep for a fraction of the whole cost, halves rounded up."""
    return math.floor(density * int(units.costs.sum()) + 0.5)


def choose(
    units: Units, scores: Tensor, keep: int, *, allow_empty: bool = False, least: float = 0.0, pattern: Pattern | None = None
) -> Tensor:
    """Returns the units that stay, boolean (count,): the exact top of one order over all layers.

    Args:
        units: All units.
        scores: Scores, higher = keep; -inf cannot stay, +inf must stay.
        keep: Cost to keep.
        allow_empty: Whether a layer or group may lose everything.
        least: Minimum kept fraction of each layer's units (1 - the maximum sparsity per layer).
        pattern: A pattern that chooses within its own rows (N:M) ignores ``keep``.
    """
    by_layer, costs = split(units, scores.detach()), split(units, units.costs)
    if pattern is not None and pattern.fixed_density is not None:
        by_layer, costs = _rows(by_layer, pattern), _rows(costs, pattern)
    elif least > 0:
        by_layer = {name: raised(values, math.ceil(least * len(values) - 1e-9)) for name, values in by_layer.items()}
    density = pattern.fixed_density if pattern is not None else None
    kept = keep_units(by_layer, costs, keep, density=density, allow_empty=allow_empty)
    return torch.cat([kept[name].flatten() for name in units.names])


def _rows(vectors: Mapping[str, Tensor], pattern: Pattern) -> dict[str, Tensor]:
    return {name: vector.view(-1, pattern.footprint[1]) for name, vector in vectors.items()}


def raised(values: Tensor, count: int) -> Tensor:
    """Returns scores with the best ``count`` above all others."""
    raised = values.clone()
    best = values.argsort(descending=True, stable=True)[:count]
    raised[best[values[best] > -torch.inf]] = torch.inf
    return raised


class LayerUnits:
    """The units of a pattern in each prunable layer.

    Args:
        model: The model.
        layers: The model's layers by name.
        pattern: The unit.
        cost: Cost that the budget counts; ``auto`` is the weights, so that density is the kept fraction of the prunable
            weights.
        example_inputs: One batch of inputs, needed for the cost ``macs``.

    Attributes:
        outside: Multiply-accumulates that belong to no unit, of one sample; 0 for other costs.
    """

    names: Sequence[str]
    lengths: Sequence[int]
    scaled_names: Sequence[str]
    companions: Sequence[str] = ()

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Layer], pattern: Pattern, cost: Cost = "auto", example_inputs: Any = None
    ) -> None:
        self.pattern = pattern
        self.names = self.scaled_names = tuple(layers)
        self._layers = dict(layers)
        self.shapes = {name: layer.sides for name, layer in layers.items()}
        sizes = {name: pattern.sizes(shape).flatten() for name, shape in self.shapes.items()}
        self.lengths = [len(s) for s in sizes.values()]
        self.count = sum(self.lengths)
        self._starts = dict(zip(self.names, [sum(self.lengths[:i]) for i in range(len(self.lengths))], strict=True))
        positions = dict.fromkeys(self.names, 1)
        self.outside = 0
        if cost == "macs":
            counted = _counted(model, example_inputs)
            positions = {n: max(1, counted.layers.get(n, 0) // math.prod(layer.shape)) for n, layer in layers.items()}
            self.outside = max(0, counted.total - sum(int(sizes[name].sum()) * positions[name] for name in self.names))
        self.costs = torch.cat([sizes[name] * positions[name] for name in self.names])
        if cost == "units":
            self.costs = self.costs.clamp(max=1)

    def of(self, name: str, vector: Tensor) -> Tensor:
        """Returns a layer's part of a vector."""
        length = self.lengths[self.names.index(name)]
        return vector[self._starts[name] : self._starts[name] + length]

    def reduce(self, values: Mapping[str, Tensor], how: Reduction) -> Tensor:
        """See `Units`."""
        values = oriented(self._layers, values)
        return torch.cat([self.pattern.reduce(values[name], how).flatten() for name in self.names])

    def members(self) -> Tensor:
        """Returns the number of weights of each unit; see `Units`."""
        return torch.cat([self.pattern.sizes(self.shapes[name]).flatten() for name in self.names]).clamp(min=1)

    def scale(self, name: str, parameter: Tensor, factors: Tensor) -> Tensor:
        """See `Units`."""
        own, swapped = self.of(name, factors), self._layers[name].swapped
        if isinstance(self.pattern, Block) and not swapped:
            return scale_blocks(parameter, own, self.pattern)
        wide = self.pattern.expand(own, self.shapes[name]).to(parameter.dtype)
        return parameter * (wide.transpose(0, 1) if swapped else wide)

    def companion(self, name: str, parameter: Tensor, kept: Tensor) -> Tensor:
        """Returns nothing: a masked weight is already zero."""
        raise AssertionError(name)

    def masks(self, kept: Tensor) -> dict[str, Tensor]:
        """See `Units`."""
        return oriented(self._layers, {n: self.pattern.expand(self.of(n, kept), self.shapes[n]) for n in self.names})


def make_units(
    model: nn.Module,
    pattern: Pattern,
    layers: Mapping[str, Layer],
    *,
    cost: Cost = "auto",
    example_inputs: Any = None,
    exclude: Sequence[str] = (),
) -> Units:
    """Returns the units of a pattern in a model; channels are the coupled channels of the whole model.

    Raises:
        PatternError: Channels are requested without example inputs for the trace.
        SelectorError: Layers are selected for channels, which are coupled across layers.
    """
    if not isinstance(pattern, Channel):
        return LayerUnits(model, layers, pattern, cost, example_inputs)
    if example_inputs is None:
        raise PatternError(
            "Channels are coupled across layers, which a trace finds: give example_inputs, such as one batch of inputs."
        )
    everything = prunable_layers(model)
    missing = [name for name in everything if name not in layers and name not in tied_layers(everything)]
    left = missing if exclude else []
    if len(left) < len(missing):
        raise SelectorError("Channels are coupled across layers: choose them with exclude, not with layers.")
    return CoupledChannels(model, example_inputs, left, layers=everything, cost=cost)


def _counted(model: nn.Module, example_inputs: Any) -> Macs:
    """Returns the multiply-accumulates of a model for one sample of the example inputs."""
    if example_inputs is None:
        raise PatternError("A cost in multiply-accumulates is counted on example_inputs, such as one batch; give them.")
    return count_macs(model, example_inputs)
