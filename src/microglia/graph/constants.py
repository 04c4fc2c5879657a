"""Constants that masked channels still add, folded into the biases of the layers that read them.

A weight mask zeroes a channel's filter, but its bias and its norm's shift survive: the channel is a constant, not zero. A
constant can be folded exactly if the layers that read it do not pad with zeros (survey 0.7).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from microglia.graph.channels.widths import highest
from microglia.graph.cutting.cut import Cut
from microglia.graph.cutting.parts import Part
from microglia.graph.cutting.plan import give_biases
from microglia.graph.cutting.reference import Reference
from microglia.graph.cutting.remove import noise
from microglia.graph.dims.analysis import Analysis, Consumer
from microglia.graph.dims.nodes import named_arguments, operator_name


def evened(alive: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Returns the units that stay if rows keep equal numbers of their own units: as many as the row with most."""
    return {a: highest(units.byte(), int(units.sum(-1).max())) if units.ndim > 1 else units for a, units in alive.items()}


@torch.no_grad()
def fold_constants(part: Part, kept: dict[int, Tensor], stay: Counter[str]) -> dict[str, Tensor]:
    """Returns the constants for the biases of layers that read removed channels; channels that cannot be folded stay.

    ``kept`` is changed: units whose value is not constant, or is read through zero padding, become kept again. ``stay`` counts
    them by reason.
    """
    while True:
        found = list(_constants(part.analysis, Cut(part.analysis, evened(kept))))
        stubborn = [(consumer, values, why) for consumer, values in found if (why := _obstacle(part, consumer, values))]
        if not stubborn:
            break
        for consumer, values, why in stubborn:
            stay[why] += _give_back(part.analysis, consumer, values, kept)
    biases: dict[str, Tensor] = {}
    for consumer, values in found:
        if bool(values.any()):
            name = consumer.weight.rpartition(".")[0]
            delta = _contribution(part.analysis, consumer, values)
            biases[name] = biases[name] + delta if name in biases else delta
    return biases


def _constants(analysis: Analysis, cut: Cut) -> Iterator[tuple[Consumer, Tensor]]:
    """Yields the channels' values for each weight that reads removed ones: 0 for kept channels, NaN for varying ones.

    Infinity marks channels that are infinite or NaN in the masked model itself.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = analysis.trace.example
    other = tuple(noise(v, generator) for v in inputs)
    consumers = [c for c in analysis.consumers if cut.changes(analysis.dims[c.source][c.dim])]
    first, second = (_values(analysis, consumers, given) for given in (inputs, other))
    for consumer in consumers:
        removed = ~cut.mask(analysis.dims[consumer.source][consumer.dim])
        rows = torch.cat([v[consumer].movedim(consumer.dim, 0).flatten(1) for v in (first, second)], 1)
        low, high = rows.aminmax(dim=1)
        constant = (high - low) <= 1e-12 * (1 + high.abs())
        values = torch.where(constant, rows[:, 0], torch.nan).masked_fill(~rows.isfinite().all(1), torch.inf)
        yield consumer, torch.where(removed.to(values.device), values, 0.0)


def _values(analysis: Analysis, consumers: Sequence[Consumer], inputs: tuple[Any, ...]) -> dict[Consumer, Tensor]:
    """Runs the graph and returns the value that each consumer reads; in-place operators may change it before that."""
    held: dict[fx.Node, Tensor | None] = {consumer.source: None for consumer in consumers}
    found: dict[Consumer, Tensor] = {}
    for node, value in Reference(Cut(analysis, {})).walk(inputs):
        if node in held:
            held[node] = value
        for consumer in consumers:
            if consumer.node is node:
                found[consumer] = cast(Tensor, held[consumer.source]).clone()
    return found


def _obstacle(part: Part, consumer: Consumer, values: Tensor) -> str:
    """Returns the reason why removed channels' constants cannot be folded into a reader's bias; empty if they can."""
    if bool(values.isinf().any()):
        return "the masked model itself makes them infinite or NaN, as a division by a zero does"
    if bool(values.isnan().any()):
        return f"they are not constant where {consumer.weight} reads them"
    if not bool(values.any()):
        return ""
    layer = part.module.get_submodule(consumer.weight.rpartition(".")[0])
    name = operator_name(consumer.node)
    if name not in ("linear", "conv1d", "conv2d", "conv3d") or not isinstance(layer, _WITH_BIAS):
        return f"{consumer.weight} is not the weight of a linear layer or convolution, which could take a bias"
    if name != "linear" and any(_numbers(named_arguments(consumer.node).get("padding"))):
        return f"they are constants that {consumer.weight} reads behind zero padding, where no bias equals them"
    return ""


_WITH_BIAS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def _numbers(padding: Any) -> list[Any]:
    return list(padding) if isinstance(padding, list | tuple) else [padding != "valid"]


def _give_back(analysis: Analysis, consumer: Consumer, values: Tensor, kept: dict[int, Tensor]) -> int:
    """Keeps units that are not zero where a weight reads them; returns the number of units that were to be removed."""
    before = sum(int(units.sum()) for units in kept.values())
    dim = analysis.dims[consumer.source][consumer.dim]
    entries = values.isnan() | (values != 0)
    for atom in set(analysis.algebra.leaves(dim)) & set(kept):
        rows = len(kept[atom]) if kept[atom].ndim > 1 else 1
        place = analysis.algebra.coordinate(dim, atom, rows)
        kept[atom].view(-1)[place[entries.cpu() & (place >= 0)]] = True
    return sum(int(units.sum()) for units in kept.values()) - before


def _contribution(analysis: Analysis, consumer: Consumer, values: Tensor) -> Tensor:
    """Returns the term that constant channels add to each output of a layer without padding: the layer applied to them."""
    weight = analysis.trace.tensors[consumer.weight].detach()
    if weight.ndim == 2:
        return nn.functional.linear(values, weight)
    rank = weight.ndim - 2
    image = values.view(1, -1, *[1] * rank).expand(1, -1, *weight.shape[2:])
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[rank - 1]
    return convolve(image, weight, groups=named_arguments(consumer.node)["groups"]).flatten()


@torch.no_grad()
def with_biases(model: nn.Module, biases: Mapping[str, Tensor]) -> nn.Module:
    """Returns a copy with the constants of removed channels added to the biases."""
    model = deepcopy(model)
    give_biases(model, tuple(biases))
    for name, delta in biases.items():
        bias = cast(nn.Linear, model.get_submodule(name)).bias
        bias.add_(delta.to(bias))
    return model
