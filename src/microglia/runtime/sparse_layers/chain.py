"""Consecutive block convolutions as one operator: intermediate results stay in the kernels' own layout."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import count, groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from microglia.core.errors import MicrogliaError
from microglia.runtime.operators import ACTIVATIONS, level
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

    def joins(node: Node) -> bool:
        return node.op == "call_module" and not node.kwargs and chainable(graph.get_submodule(str(node.target)))

    runs = [list(nodes) for found, nodes in groupby(list(graph.graph.nodes), joins) if found]
    free = (name for number in count() if not hasattr(graph, name := f"chain_{number}"))
    for nodes in (nodes for nodes in runs if len(nodes) > 1):
        _replace(graph, nodes, next(free))
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    return graph


def _replace(graph: GraphModule, nodes: list[Node], name: str) -> None:
    inside = set(nodes)
    read = [argument for node in nodes for argument in node.all_input_nodes]
    images = list(dict.fromkeys(argument for argument in read if argument not in inside))
    number = {node: index for index, node in enumerate([*images, *nodes])}
    out = [node for node in nodes if not inside.issuperset(node.users)]
    links = []
    for node in nodes:
        layer = graph.get_submodule(str(node.target))
        assert isinstance(layer, BlockConv2d)
        first, *rest = (number[argument] for argument in node.args if isinstance(argument, Node))
        links.append(Link(layer, first, rest[0] if rest else None, node in out))
    graph.add_module(name, BlockChain(links, len(images)))
    with graph.graph.inserting_before(nodes[0]):
        results = graph.graph.call_module(name, tuple(images))
        for index, node in enumerate(out):
            result = graph.graph.call_function(operator.getitem, (results, index))
            result.meta = dict(node.meta)
            node.replace_all_uses_with(result)
    for node in reversed(nodes):
        graph.graph.erase_node(node)
