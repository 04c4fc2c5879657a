"""Neighbours of a graph that become one module: which value each reads, and which results others read."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import count, groupby
from typing import NamedTuple

from torch import nn
from torch.fx import GraphModule, Node


class Part(NamedTuple):
    """A module of a segment. Values are numbered: first the inputs of the segment, then the result of each part.

    Attributes:
        module: The module.
        reads: Numbers of the values that it is called with.
        goes_out: Whether something outside of the segment reads its result.
    """

    module: nn.Module
    reads: tuple[int, ...]
    goes_out: bool


def joined(
    graph: GraphModule, name: str, fits: Callable[[nn.Module], bool], make: Callable[[Sequence[Part], int], nn.Module]
) -> GraphModule:
    """Replaces runs of two or more neighbours of a graph by one module each, in place, and returns the graph.

    Args:
        graph: The graph.
        name: Start of the names of the modules that are made.
        fits: Tells whether a module, called with values alone, can be a part.
        make: Returns the module of some parts and a number of inputs: it returns the results that go out as a list.
    """

    def joins(node: Node) -> bool:
        values = not node.kwargs and all(isinstance(argument, Node) for argument in node.args)
        return node.op == "call_module" and values and fits(graph.get_submodule(str(node.target)))

    runs = [list(nodes) for found, nodes in groupby(list(graph.graph.nodes), joins) if found]
    free = (title for number in count() if not hasattr(graph, title := f"{name}_{number}"))
    for nodes in (nodes for nodes in runs if len(nodes) > 1):
        _replace(graph, nodes, next(free), make)
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    return graph


def _replace(graph: GraphModule, nodes: list[Node], name: str, make: Callable[[Sequence[Part], int], nn.Module]) -> None:
    inside = set(nodes)
    read = [argument for node in nodes for argument in node.all_input_nodes]
    inputs = list(dict.fromkeys(argument for argument in read if argument not in inside))
    number = {node: index for index, node in enumerate([*inputs, *nodes])}
    out = [node for node in nodes if not inside.issuperset(node.users)]
    parts = []
    for node in nodes:
        reads = tuple(number[argument] for argument in node.args if isinstance(argument, Node))
        parts.append(Part(graph.get_submodule(str(node.target)), reads, node in out))
    graph.add_module(name, make(parts, len(inputs)))
    with graph.graph.inserting_before(nodes[0]):
        results = graph.graph.call_module(name, tuple(inputs))
        for index, node in enumerate(out):
            result = graph.graph.call_function(operator.getitem, (results, index))
            result.meta = dict(node.meta)
            node.replace_all_uses_with(result)
    for node in reversed(nodes):
        graph.graph.erase_node(node)
