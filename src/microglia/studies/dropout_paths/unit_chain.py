"""A network as a chain of layers of units: what comes into a neuron or channel, and what leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microglia.studies.space.points import check_alike

Network = Mapping[str, Tensor]
"""Every tensor of a chain by name: parameters, and the running statistics of batch norms, which move with their units."""

EMPTY = {"running_var": 1.0}
"""Values in the tensors of an empty unit, by the end of their names; everything else holds 0."""


@dataclass(frozen=True)
class UnitLayer:
    """One weight layer of a chain.

    Attributes:
        weight: Name of its weight, (units, inputs, ...): a row is what comes into a unit.
        others: Names of the further tensors with an entry for each unit: bias, batch norm's affine and running statistics.
        units: How many neurons or output channels it has.
    """

    weight: str
    others: tuple[str, ...]
    units: int

    @property
    def tensors(self) -> tuple[str, ...]:
        """All that comes into the units."""
        return (self.weight, *self.others)


@dataclass(frozen=True)
class UnitChain:
    """The weight layers of a network in the order of its forward pass; each feeds the next one alone.

    Units of a hidden layer leave through the columns of the next weight: one column, or after flattening a block of them.

    Attributes:
        layers: Two or more; the last one makes the logits.
    """

    layers: tuple[UnitLayer, ...]

    @property
    def hidden(self) -> tuple[int, ...]:
        """Units of each hidden layer."""
        return tuple(layer.units for layer in self.layers[:-1])

    @property
    def top(self) -> UnitLayer:
        """The last layer: the network is linear in it, and a convex loss convex."""
        return self.layers[-1]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all tensors of a `Network`."""
        return tuple(name for layer in self.layers for name in layer.tensors)


# ----------------------------------------------------------------------------------------------------------------- places
def network_of(model: nn.Module, chain: UnitChain) -> dict[str, Tensor]:
    """Returns copies of the tensors of a model."""
    own = _tensors(model)
    return {name: own[name].detach().clone() for name in chain.tensors}


@torch.no_grad()
def enter(model: nn.Module, network: Network) -> None:
    """Writes a network into a model, in place: parameters and running statistics.

    Raises:
        MicrogliaError: The model has no such tensors, or others of their shape.
    """
    own = _tensors(model)
    check_alike({name: own[name] for name in network if name in own}, network)
    for name, value in network.items():
        own[name].copy_(value)


def between(one: Network, other: Network, share: float) -> dict[str, Tensor]:
    """Returns the network at a share in [0, 1] of the straight way; what is equal at both ends stays so, bit for bit."""
    return {name: value if value is other[name] else torch.lerp(value, other[name], share) for name, value in one.items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# ------------------------------------------------------------------------------------------------------------------ units
@dataclass(frozen=True)
class Copied:
    """Units of a network, to be copied.

    Attributes:
        network: Where they are.
        units: Which of a layer, int64.
        inputs: (places in the copy, places in ``network``) of the units of the layer before that the copies listen to, the
            others being unheard; None for all of them, each at its own place.
    """

    network: Network
    units: Tensor
    inputs: tuple[Tensor, Tensor] | None = None


def columns_of(weight: Tensor, units: int) -> Tensor:
    """Returns a weight as (outputs, units of the layer before, entries for each), a view where it can be."""
    return weight.reshape(len(weight), units, -1)


def put_units(network: Network, chain: UnitChain, layer: int, units: Tensor, copied: Copied) -> dict[str, Tensor]:
    """Returns a network in which some units of a layer receive what others receive.

    Args:
        network: Where to put them; it stays as it is, and the result shares all other tensors with it.
        chain: Layers of all networks here.
        layer: Index of the layer.
        units: Places, int64.
        copied: As many units of the same layer.
    """
    own, source = chain.layers[layer], copied.network
    rows = source[own.weight][copied.units]
    if copied.inputs is not None:
        heard = columns_of(rows, chain.layers[layer - 1].units)
        placed = torch.zeros_like(heard)
        placed[:, copied.inputs[0]] = heard[:, copied.inputs[1]]
        rows = placed.reshape(rows.shape)
    changed = {own.weight: _with_rows(network[own.weight], units, rows)}
    changed |= {name: _with_rows(network[name], units, source[name][copied.units]) for name in own.others}
    return {**network, **changed}


def empty_units(network: Network, chain: UnitChain, layer: int, units: Tensor) -> dict[str, Tensor]:
    """Returns a network in which nothing comes into some units of a layer: rows, biases, batch norm's affine are zero."""
    changed = {}
    for name in chain.layers[layer].tensors:
        value = network[name].clone()
        value[units] = EMPTY.get(name.rpartition(".")[2], 0.0)
        changed[name] = value
    return {**network, **changed}


def put_outlets(network: Network, chain: UnitChain, layer: int, units: Tensor, copied: Copied) -> dict[str, Tensor]:
    """Returns a network in which units of a hidden layer leave as others do, and the rest of the layer not at all.

    Args:
        network: Where to put them; the result shares all other tensors with it.
        chain: Layers of all networks here.
        layer: Index of the hidden layer; what changes is the next one's weight.
        units: Places, int64.
        copied: As many units of the same layer.
    """
    name, count = chain.layers[layer + 1].weight, chain.layers[layer].units
    source = columns_of(copied.network[name], count)
    placed = torch.zeros_like(source)
    placed[:, units] = source[:, copied.units]
    return {**network, name: placed.reshape(network[name].shape)}


def move_outlets(network: Network, chain: UnitChain, layer: int, units: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Returns a network in which ``units`` of a hidden layer leave as ``others`` did, and those no more."""
    name, count = chain.layers[layer + 1].weight, chain.layers[layer].units
    placed = columns_of(network[name], count).clone()
    placed[:, units] = placed[:, others]
    placed[:, others] = 0
    return {**network, name: placed.reshape(network[name].shape)}


def _with_rows(value: Tensor, units: Tensor, rows: Tensor) -> Tensor:
    changed = value.clone()
    changed[units] = rows
    return changed
