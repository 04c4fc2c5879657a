"""The cost of each input in a gated model: multiply-accumulates by the published count and by an honest one.

The published count ignores heads and depthwise convolutions, and takes the width of a residual sum from the branch added last
(spec, section 7.8). The honest count includes all computation: heads, the channels that really arrive, depthwise layers, and
every layer without a gate. Neither counts norms, activations, pooling and biases; both divide by the same dense model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from microglia.dynamic.flow import Convolution, Flow, Step
from microglia.dynamic.gate_plan import GatePlan
from microglia.dynamic.targets import filters_of
from microglia.measure import count_macs

Count = Literal["honest", "paper"]
COUNTS = ("honest", "paper")


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of each input of a batch.

    Attributes:
        honest: Multiply-accumulates of all computation, float64 (batch,).
        paper: Multiply-accumulates by the published count, float64 (batch,).
        layers: Convolution -> honest multiply-accumulates, float64 (batch,); without its head.
        heads: Multiply-accumulates of all heads together, the same for every input.
        dense: Multiply-accumulates of the model without gates.
    """

    honest: Tensor
    paper: Tensor
    layers: dict[str, Tensor]
    heads: int
    dense: int

    def of(self, count: Count) -> Tensor:
        """Returns one of the two counts."""
        return self.honest if count == "honest" else self.paper


class Counter:
    """Counts the multiply-accumulates of the inputs of a gated model from their masks.

    Args:
        model: The model without gates.
        flow: Flow of this model.
        plan: Plan of the gates; only its sites and the sizes of its heads are used.
        example_inputs: One batch of inputs.
    """

    def __init__(self, model: nn.Module, flow: Flow, plan: GatePlan, example_inputs: Any) -> None:
        counted = count_macs(model, example_inputs)
        self.flow, self.dense = flow, counted.total
        self.macs = {layer: counted.layers[f"{layer}.weight"] for layer in flow.convolutions}
        self.rest = counted.total - sum(self.macs.values())
        self.heads = sum(math.prod(plan.head_of(site)) for site in plan.sites)

    def __call__(self, masks: Mapping[str, Tensor]) -> Costs:
        """Returns the costs of the inputs with these masks: layer -> boolean (batch, outputs), or (batch, units) of blocks."""
        convolutions = self.flow.convolutions
        masks = {layer: filters_of(mask, _outputs(convolutions[layer])) for layer, mask in masks.items()}
        batch = len(next(iter(masks.values())))
        arriving = self.flow.supports(masks)
        published = self.flow.supports(masks, published=True)
        layers, paper = {}, torch.full((batch,), float(self.rest), dtype=torch.float64)
        for layer, step in convolutions.items():
            assert step.convolution is not None
            kept, dense = masks.get(layer), self.macs[layer]
            source = step.sources[0]
            layers[layer] = dense * computed(step.convolution, kept, arriving.get(source), batch)
            paper += dense * _as_published(step.convolution, kept, published.get(source), batch)
        honest = torch.stack(list(layers.values())).sum(0) + self.rest + self.heads
        return Costs(honest, paper, layers, self.heads, self.dense)


def _outputs(step: Step) -> int:
    assert step.convolution is not None
    return step.convolution.outputs


def computed(c: Convolution, kept: Tensor | None, arriving: Tensor | None, batch: int) -> Tensor:
    """Returns the fraction of a convolution's products that are computed for each input, float64 (batch,)."""
    if c.depthwise and kept is not None:
        return _share(kept if arriving is None else kept & arriving, batch)
    if c.groups > 1:  # runs whole, like depthwise layers without a gate
        return torch.ones(batch, dtype=torch.float64)
    return _share(kept, batch) * _share(arriving, batch)


def _as_published(c: Convolution, kept: Tensor | None, arriving: Tensor | None, batch: int) -> Tensor:
    """Returns |kept| floor(|arriving| / groups) over its dense value; 0 for a depthwise layer unless every channel arrives."""
    if arriving is None:
        return _share(kept, batch)
    each = torch.div(arriving.sum(1), c.groups, rounding_mode="floor").double() / (c.inputs // c.groups)
    return _share(kept, batch) * each


def _share(mask: Tensor | None, batch: int) -> Tensor:
    return torch.ones(batch, dtype=torch.float64) if mask is None else mask.double().mean(1)
