"""Access to a traced graph: a node's operator, its arguments by name, the shape of its value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx


def operator_name(node: fx.Node) -> str:
    """Returns the name of a node's operator without namespace and overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return str(getattr(target, "__name__", target))


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Returns a node's arguments by their names in the operator's schema, defaults filled in."""
    found: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if i < len(node.args):
            found[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value if argument.has_default_value() else None
    return found


def split_dim(name: str, a: Mapping[str, Any], rank: int) -> int:
    """Returns the dimension that an operator of the split family cuts."""
    if name in ("hsplit", "vsplit"):
        return int(name == "hsplit" and rank > 1)
    return int(a["dim"]) % rank


def concrete(size: Any) -> int:
    """Returns an integer size; for a symbolic size the value of the trace."""
    return size if isinstance(size, int) else int(size.node.hint)


def shape_of(value: fx.Node | Tensor) -> list[int]:
    """Returns the concrete shape of a node's value."""
    tensor = value.meta["val"] if isinstance(value, fx.Node) else value
    return [concrete(s) for s in tensor.shape]


def nodes_in(value: Any) -> list[fx.Node]:
    """Returns the nodes in nested arguments, in order."""
    found: list[fx.Node] = []
    fx.node.map_arg(value, lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found
