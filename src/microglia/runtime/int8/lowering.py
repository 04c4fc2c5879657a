"""A model's graph in which some layers run in 8 bits: values stay rounded between such layers, and are float32 elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.runtime.candidates import Candidate
from microglia.runtime.dense.fusion import Site, fuse, mutates
from microglia.runtime.int8.calibration import Ranges
from microglia.runtime.int8.candidates import Planned, int8_layer
from microglia.runtime.int8.layers import Dequantize, Pool8, Quantize, Scale, fuses
from microglia.runtime.int8.program import programmed
from microglia.runtime.sparse_layers.chain import chained

aten = torch.ops.aten
RESHAPED = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
"""Operators that move numbers alone, so that they run on rounded ones as they are."""


def lower_to_int8(model: nn.Module, example: Example, ways: Sequence[Candidate], ranges: Ranges) -> GraphModule:
    """Returns a folded model as a graph in which each layer runs in its way.

    Between layers in 8 bits, also through pooling by maximum and reshaping, values stay in uint8. A residual is added in 8 bits
    where the sum is read by a layer in 8 bits.

    Args:
        model: A model in evaluation mode on the CPU; the graph shares its other weights.
        example: Example inputs.
        ways: The way of each layer, in the order of `fuse`.
        ranges: The range of each value, of `ranges_of`.
    """
    left = iter(ways)
    graph = fuse(model, example, lambda site: next(left).make())
    _Lowering(graph, ranges).lower()
    return chained(programmed(graph))


class _Lowering:
    """Replaces the planned layers of one graph, in place."""

    def __init__(self, module: GraphModule, ranges: Ranges) -> None:
        self.module, self.graph, self.ranges = module, module.graph, ranges
        self.planned: dict[Node, Site] = {}
        for node in self.graph.nodes:
            found = module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(found, Planned):
                self.planned[node] = found.site
        self.rounded: set[Node] = set()  # nodes whose output is uint8
        for node in reversed(self.graph.nodes):  # readers before what they read
            if self._may_round(node) and any(self._wants(reader, node) for reader in node.users):
                self.rounded.add(node)
        self.sources = {node: node.all_input_nodes[0] for node in self.rounded}
        self.made: dict[Node, Node] = {}
        self.count = 0

    def lower(self) -> None:
        """Replaces every planned layer and converts values where a reader wants the other form."""
        for node in list(self.graph.nodes):
            if node in self.planned:
                self._place(node, self.planned[node])
            elif node in self.rounded:
                self._carry(node)
            else:
                node.args = map_arg(node.args, partial(self._wide, reader=node))
                node.kwargs = map_arg(node.kwargs, partial(self._wide, reader=node))
        self.graph.lint()
        self.module.delete_all_unused_submodules()
        self.module.recompile()

    def _may_round(self, node: Node) -> bool:
        if node in self.planned:
            return fuses(self.planned[node])
        value = node.meta.get("val")
        single = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return single and node.op == "call_function" and (node.target in RESHAPED or _pooling(node) is not None)

    def _wants(self, reader: Node, node: Node) -> bool:
        """Tells whether a reader takes a value in uint8."""
        return reader in self.rounded or (reader in self.planned and reader.args[0] is node)

    def _scale(self, node: Node) -> Scale:
        """Returns the scale of a value; pooling and reshaping keep that of their input."""
        while node not in self.planned and node in self.rounded:
            node = self.sources[node]
        if node.name not in self.ranges:
            raise MicrogliaError(f"The range of the value {node.name} is not known; calibrate the model anew.")
        return Scale.of(*self.ranges[node.name])

    def _narrow(self, node: Node, reader: Node) -> Node:
        """Returns a value in uint8, for a reader."""
        return node if node in self.rounded else self._converted(node, Quantize(self._scale(node)), reader)

    def _wide(self, node: Node, reader: Node) -> Node:
        """Returns a value in float32, for a reader."""
        return node if node not in self.rounded else self._converted(node, Dequantize(self._scale(node)), reader)

    def _converted(self, node: Node, converter: nn.Module, reader: Node) -> Node:
        """Returns a value converted before its first reader, once for all of them unless another operator writes into it."""
        if node in self.made and not any(map(mutates, node.users)):
            return self.made[node]
        self.count += 1
        name = f"convert_{self.count}"
        self.module.add_module(name, converter)
        with self.graph.inserting_before(reader):
            self.made[node] = self.graph.call_module(name, (node,))
        return self.made[node]

    def _place(self, node: Node, site: Site) -> None:
        """Puts the layer into the place of a planned one."""
        source, residual = (*node.args, None)[:2]
        assert isinstance(source, Node)
        rounded = node in self.rounded
        target = self._scale(node) if rounded else None
        if isinstance(residual, Node):
            other = self._scale(residual) if rounded else None
            added: tuple[Node, ...] = ((self._narrow if rounded else self._wide)(residual, node),)
        else:
            other, added = None, ()
        self.module.set_submodule(str(node.target), int8_layer(site, self._scale(source), target, other))
        node.args = (self._narrow(source, node), *added)

    def _carry(self, node: Node) -> None:
        """Lets pooling or a reshape work on uint8."""
        pooled, narrow = _pooling(node), self._narrow(self.sources[node], node)
        if pooled is None:
            node.args = (narrow, *node.args[1:])
            return
        name = f"pool_{node.name}"
        self.module.add_module(name, Pool8(*pooled))
        node.op, node.target, node.args, node.kwargs = "call_module", name, (narrow,), {}


def _pooling(node: Node) -> tuple[list[int], list[int], list[int]] | None:
    """Returns kernel, stride and padding of a pooling by maximum that runs in 8 bits; None for any other node."""
    if node.target is not aten.max_pool2d.default or node.kwargs:
        return None
    defaults: list[Any] = [None, None, [], [0, 0], [1, 1], False]
    given: list[Any] = [*node.args, *defaults[len(node.args) :]]
    _, kernel, stride, padding, dilation, ceil = given
    sides = [list(value) * 2 if len(value) == 1 else list(value) for value in (kernel, stride or kernel, padding, dilation)]
    return None if ceil or sides[3] != [1, 1] else (sides[0], sides[1], sides[2])
