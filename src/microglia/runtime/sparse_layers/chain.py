"""Consecutive block convolutions as one operator: intermediate results stay in the kernels' own layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from microglia.core.errors import MicrogliaError
from microglia.runtime.operators import ACTIVATIONS, level
from microglia.runtime.segments import Part, joined
from microglia.runtime.sparse_layers.chain_steps import Step, Weights, split, steps_of
from microglia.runtime.sparse_layers.layers import BlockConv2d
from microglia.runtime.sparse_layers.layout import STRIPE


class Link(NamedTuple):
    """A layer of a chain. Values are numbered: first the images given to the chain, then the result of each layer.

    Attributes:
        layer: A block convolution in float32, on the CPU.
        input: Number of the value that it reads.
        residual: Number of the value that it adds; None without one.
        goes_out: Whether the chain returns its result.
    """

    layer: BlockConv2d
    input: int
    residual: int | None = None
    goes_out: bool = False


class BlockChain(nn.Module):
    """Consecutive block convolutions in one call of the kernels.

    Intermediate results stay in a few shared buffers, in the kernels' layout, with zero padding around them. Only the input of
    a layer with a stride is copied. A few images at a time go through all layers, so that the buffers stay in the cache.

    Args:
        links: Its layers, in order.
        images: Number of images of a call.

    Raises:
        MicrogliaError: There is no layer; a layer is not in float32 on the CPU; a layer reads or adds a value that does not
            exist yet or has another number of channels; or no result goes out.
    """

    values: Tensor
    row_pointer: Tensor
    channel: Tensor
    tap: Tensor
    bias: Tensor

    def __init__(self, links: Sequence[Link], images: int = 1) -> None:
        super().__init__()
        if not links or not all(chainable(link.layer) for link in links):
            raise MicrogliaError("A chain is of one or more block convolutions in float32 on the CPU.")
        _check(links, images)
        self.program = [number for link in links for number in _step(link)]
        self.images = images
        self.inputs = [link.layer.inputs for link in links]
        layers = [link.layer for link in links]
        places = [layer.places for layer in layers]
        taps = (torch.zeros(len(p.channel), dtype=torch.uint8) if p.tap is None else p.tap for p in places)
        flat = Weights(
            torch.cat([p.values.flatten() for p in places]),
            torch.cat([p.row_pointer for p in places]),
            torch.cat([p.channel for p in places]),
            torch.cat(list(taps)),
            torch.cat([torch.zeros(0), *(layer.bias for layer in layers if layer.bias is not None)]),
        )
        for name, tensor in flat._asdict().items():
            self.register_buffer(name, tensor)
        level()

    def forward(self, *images: Tensor) -> list[Tensor]:
        """Returns the results that go out, each (batch, outputs, height, width) in channels last."""
        if len(images) != self.images:
            raise MicrogliaError(f"The chain is called with {self.images} images, not with {len(images)}.")
        weights = self.values, self.row_pointer, self.channel, self.tap, self.bias
        out: list[Tensor] = torch.ops.microglia.block_chain(images, *weights, self.program)
        return out

    def layers(self) -> list[BlockConv2d]:
        """Returns the single layers; their tensors are views of the chain's."""
        weights = Weights(self.values, self.row_pointer, self.channel, self.tap, self.bias)
        made = []
        for inputs, (step, places, bias) in zip(self.inputs, split(weights, steps_of(self.program)), strict=True):
            settings = dict(zip(("kernel", "stride", "padding", "dilation"), step.geometry, strict=True))
            made.append(BlockConv2d(places, bias, inputs, step.outputs, activation=ACTIVATIONS[step.activation], **settings))
        return made

    def extra_repr(self) -> str:
        """Returns the number of layers and of blocks, for the printed form."""
        return f"{len(self.inputs)} layers, {len(self.channel)} blocks"


def _check(links: Sequence[Link], images: int) -> None:
    widths: dict[int, int] = {}  # channels of the values that a layer made, read or added
    for index, link in enumerate(links):
        made = images + index
        for value, width in ((link.input, link.layer.inputs), (link.residual, link.layer.outputs)):
            if value is None:
                continue
            if not 0 <= value < made:
                raise MicrogliaError(f"Layer {index} of a chain asks for value {value}; then there are {made}, counted from 0.")
            if widths.setdefault(value, width) != width:
                raise MicrogliaError(
                    f"Layer {index} of a chain asks value {value} for {width} channels; it has {widths[value]}."
                )
        widths[made] = link.layer.outputs
    if not any(link.goes_out for link in links):
        raise MicrogliaError("No result of the chain goes out: say goes_out=True for one.")


def _step(link: Link) -> Step:
    layer = link.layer
    geometry = [number for pair in layer.geometry for number in pair]
    blocks, width = layer.values.shape[:2]
    residual = -1 if link.residual is None else link.residual
    has_bias = int(layer.bias is not None)
    rest = [layer.code, width, blocks, has_bias, link.input, residual, int(link.goes_out)]
    return Step._make([layer.outputs, *geometry, *rest])


def chainable(module: nn.Module) -> bool:
    """Tells whether a module can be a layer of a chain."""
    if type(module) is not BlockConv2d:
        return False
    values = module.values
    plain = values.ndim == 3 and values.dtype == torch.float32 and values.device.type == "cpu"
    return plain and values.shape[1] <= 8 and values.shape[2] == STRIPE


def chained(graph: GraphModule) -> GraphModule:
    """Joins consecutive block convolutions of a graph into chains, in place, and returns the graph."""
    return joined(graph, "chain", chainable, _chain)


def _chain(parts: Sequence[Part], images: int) -> BlockChain:
    links = []
    for layer, (first, *rest), goes_out in parts:
        assert isinstance(layer, BlockConv2d)
        links.append(Link(layer, first, rest[0] if rest else None, goes_out))
    return BlockChain(links, images)
