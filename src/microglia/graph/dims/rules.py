"""The table of ATen rules: how each operator relates the Dims of its inputs and outputs.

A rule is ``(analysis, node, arguments) -> Dims``: it unifies, cuts, factors or freezes, and returns the Dims of the result.
Operators of the same kind share a rule. An operator without a rule freezes all its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from microglia.graph.dims.nodes import nodes_in, operator_name, shape_of

if TYPE_CHECKING:
    from microglia.graph.dims.analysis import Analysis, Arguments

Rule = Callable[["Analysis", fx.Node, "Arguments"], Any]

RULES: dict[str, Rule] = {}
"""Operator name without namespace and overload -> its rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def rule_of(node: fx.Node) -> Rule | None:
    """Returns the rule of a node; in-place operators use the rule of the plain operator, pointwise ones a common rule."""
    for room in ("rules_layers", "rules_shape", "rules_entries", "rules_reduce"):
        import_module(f"microglia.graph.dims.{room}")
    name = operator_name(node)
    found = RULES.get(name) or RULES.get(name.rstrip("_"))
    if found is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return pointwise
    return found


# Not all pointwise operators carry torch's tag.
@rule("hardswish", "hardtanh", "relu6", "leaky_relu", "masked_fill", "where", "clamp", "clamp_min", "clamp_max", "dropout_")
def pointwise(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Broadcasts; Dims that meet are unified."""
    tensors = [x for x in nodes_in(list(a.values())) if isinstance(x.meta.get("val"), Tensor)]
    return s.broadcast([s.of(x) for x in tensors], n)


@rule(
    "alias", "contiguous", "dropout", "to", "lift_fresh_copy", "clone", "detach", "_to_copy", "type_as", "feature_dropout",
    "bernoulli", "alpha_dropout", "requires_grad_", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like",
    "randn_like", "rrelu", "native_dropout",
)  # fmt: skip
def same(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """The first argument's Dims."""
    x = s.of(n.args[0])  # type: ignore[arg-type]
    return x if isinstance(n.meta["val"], Tensor) else [list(x) for _ in n.meta["val"]]


@rule("fill", "copy")
def overwrite(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """In place: Dims that meet are unified, so views of the overwritten tensor stay correct."""
    pointwise(s, n, a)
    return s.of(n.args[0])  # type: ignore[arg-type]


@rule("zeros", "ones", "new_zeros", "new_ones", "full", "new_full", "empty", "new_empty")
def fill(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """The same value at every index: free until it meets another Dim."""
    return [s.algebra.fresh(k) for k in shape_of(n)]


@rule("arange", "linspace", "eye", "scalar_tensor", "tril_indices", "triu_indices", "rand", "randn")
def positions(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Values that are positions."""
    return s.frozen(n.meta["val"], f"{n.name}: {operator_name(n)}")


@rule("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size")
def nothing(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Checks of the trace; the pruned graph drops them."""
    return None
