"""Overwrites residuals that have no further reader: this saves memory and memory traffic."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten


def overwrite_residuals(module: GraphModule, made: Collection[Node]) -> None:
    """Sets ``overwrites`` on each fused layer that may write its output over its residual.

    This is allowed under four conditions. The residual is another fused layer's output; the layer does not also read it as its
    input; the layer is its last reader; no reader can hold a view of it.

    Args:
        module: The graph module.
        made: The nodes of its fused layers. Only layers with the attribute ``overwrites`` can overwrite.
    """
    place = {node: index for index, node in enumerate(module.graph.nodes)}
    for node in made:
        layer: Any = module.get_submodule(str(node.target))
        if hasattr(layer, "overwrites"):
            layer.overwrites = _may_overwrite(node, place, made)


def _may_overwrite(node: Node, place: dict[Node, int], made: Collection[Node]) -> bool:
    source, residual = (*node.args, None)[:2]
    return (
        isinstance(residual, Node)
        and residual in made
        and residual is not source
        and all(reader in made or reader.target is aten.layer_norm.default for reader in residual.users)
        and max(residual.users, key=place.__getitem__) is node
    )
