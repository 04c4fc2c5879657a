"""Live values: constants of a trace become the computations that the model's code runs at each call.

In evaluation mode some classes cache a tensor that they compute from a parameter, such as attention biases by position. A trace
holds it as a constant, which no optimizer reaches. The trace in training mode shows its computation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from microglia.graph.cutting.alike import alike_in_training
from microglia.graph.cutting.training import averaging, drew
from microglia.graph.dims.nodes import named_arguments, operator_name
from microglia.graph.dims.refusals import TraceError, is_random
from microglia.graph.dims.trace import CHECKS, Trace, trace


class Traces:
    """The traces of a model in both modes, each made at most once and the one in training mode only where it is needed.

    Args:
        model: See `trace`.
        example_inputs: See `trace`.
        dynamic: See `trace`.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, dynamic: Sequence[int] = (0,)) -> None:
        self._trace = partial(trace, model, example_inputs, dynamic=dynamic)
        self._model, self._inputs = model, example_inputs

    @cached_property
    def alike(self) -> bool:
        """Whether the trace in evaluation mode surely serves both modes; see `alike_in_training`."""
        return alike_in_training(self._model, self._inputs)

    @cached_property
    def evaluation(self) -> Trace:
        """The trace in evaluation mode; constants are computed from parameters if the model's code for training does so.

        Raises `TraceError` if torch.export cannot trace the model.
        """
        traced = self._trace()
        if kept_constants(traced) and not self.alike:
            with suppress(TraceError):
                return with_live_constants(traced, self.training[0])
        return traced

    @cached_property
    def training(self) -> tuple[Trace, bool]:
        """The trace in training mode, and whether the model drew random numbers of Python or NumPy; raises `TraceError`."""
        with averaging(self._model):
            return drew(lambda: self._trace(training=True))


def live_trace(model: nn.Module, example_inputs: Any, *, dynamic: Sequence[int] = (0,)) -> Trace:
    """Returns the trace of a model in evaluation mode; see `Traces`.

    Raises:
        TraceError: torch.export cannot trace the model.
    """
    return Traces(model, example_inputs, dynamic).evaluation


def kept_constants(traced: Trace) -> list[fx.Node]:
    """Returns the placeholders of constants possibly computed from parameters: floating-point, more than one number."""
    return [
        node
        for node in traced.graph.nodes
        if node.op == "placeholder"
        and traced.name_of.get(node.name) in traced.constants
        and node.users
        and (value := traced.tensors[traced.name_of[node.name]]).is_floating_point()
        and value.numel() > 1
    ]


@torch.no_grad()
def with_live_constants(evaluation: Trace, training: Trace) -> Trace:
    """Returns the trace of evaluation, with constants computed from parameters if the code of training does so.

    A constant is identified with a value of the training graph if the same module uses both and they are equal.
    """
    values = _from_parameters(training)
    by_module: dict[str, list[fx.Node]] = {}
    for node in values:
        for path in _users(node, values):
            by_module.setdefault(path, []).append(node)
    gone: set[str] = set()
    for constant in kept_constants(evaluation):
        name = evaluation.name_of[constant.name]
        tensor = evaluation.tensors[name]
        candidates = [n for path in _users(constant, {}) for n in by_module.get(path, []) if _equal(values[n], tensor)]
        if candidates and len({id(n) for n in candidates}) == 1:
            _compute(evaluation, training, constant, candidates[0])
            evaluation.graph.erase_node(constant)
            gone.add(name)
    if not gone:
        return evaluation
    return replace(
        evaluation,
        tensors={name: tensor for name, tensor in evaluation.tensors.items() if name not in gone},
        name_of={place: name for place, name in evaluation.name_of.items() if name not in gone},
        constants=evaluation.constants - gone,
    )


def _from_parameters(traced: Trace) -> dict[fx.Node, Tensor]:
    """Returns the values that depend only on parameters, not on inputs or random numbers."""
    known: dict[fx.Node, Any] = {}
    learned: set[fx.Node] = set()
    for node in traced.graph.nodes:
        name = traced.name_of.get(node.name)
        if node.op == "placeholder" and name is not None:
            known[node] = traced.tensors[name].detach()
            if isinstance(traced.tensors[name], nn.Parameter):
                learned.add(node)
        elif _is_pure(node) and node.all_input_nodes and all(n in known for n in node.all_input_nodes):
            args, kwargs = (fx.node.map_arg(a, known.__getitem__) for a in (node.args, node.kwargs))
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            if learned.intersection(node.all_input_nodes):
                learned.add(node)
    return {n: v for n, v in known.items() if n in learned and n.op == "call_function" and isinstance(v, Tensor)}


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function" or operator_name(node) in CHECKS or is_random(node):
        return False
    return isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable


def _users(node: fx.Node, within: Mapping[fx.Node, Any]) -> list[str]:
    """Returns the modules, by path, that use a value other than to compute another of the given values."""
    found = {}
    for user in node.users:
        if user.op == "call_function" and operator_name(user) in ("lift_fresh_copy", "detach_", "detach"):
            found.update(dict.fromkeys(_users(user, within)))
        elif user not in within:
            stack = list((user.meta.get("nn_module_stack") or {}).values())
            found[str(stack[-1][0]) if stack else ""] = None
    return list(found)


def _equal(value: Tensor, constant: Tensor) -> bool:
    return value.shape == constant.shape and torch.equal(value.to(constant), constant)


def _compute(evaluation: Trace, training: Trace, constant: fx.Node, source: fx.Node) -> None:
    """Replaces a constant by the operators that compute it in the training graph."""
    places = {name: node for node in evaluation.graph.nodes if (name := evaluation.name_of.get(node.name)) is not None}
    needed: dict[fx.Node, None] = {}

    def need(node: fx.Node) -> None:
        for below in node.all_input_nodes:
            need(below)
        needed[node] = None

    need(source)
    copies: dict[fx.Node, fx.Node] = {}
    first = next(n for n in evaluation.graph.nodes if n in constant.users)
    with evaluation.graph.inserting_before(first):
        for node in needed:
            if node.op == "placeholder":
                copies[node] = places[training.name_of[node.name]]
            else:
                copies[node] = evaluation.graph.node_copy(node, copies.__getitem__)
    constant.replace_all_uses_with(copies[source])


# ---------------------------------------------------------------------------------------------------------------- precision
def following_precision(traced: Trace, wide: Trace) -> tuple[dict[fx.Node, tuple[str, ...]], frozenset[str], bool]:
    """Returns the arguments and constants of a trace that follow the precision of the model.

    Args:
        traced: Trace in the model's own precision.
        wide: Trace of its copy in float64; its batch may be fixed.

    Returns:
        Operators with the names of their arguments that are the model's dtype; constants that keep their dtype; and whether
        this is known, because the two traces may not correspond.
    """
    mine, theirs = _operators(traced), _operators(wide)
    if [str(n.target) for n in mine] != [str(n.target) for n in theirs] or _constants(traced) != _constants(wide):
        return {}, frozenset(), False
    follows = {}
    for node, other in zip(mine, theirs, strict=True):
        if isinstance(node.target, torch._ops.OpOverload):
            pairs = named_arguments(node), named_arguments(other)
            if keys := tuple(k for k, v in pairs[0].items() if isinstance(v, torch.dtype) and v != pairs[1][k]):
                follows[node] = keys
    fixed = [n for n in traced.constants if traced.tensors[n].dtype == wide.tensors[n].dtype]
    return follows, frozenset(fixed), True


_NUMBER = int | float | torch.SymInt | torch.SymFloat | torch.SymBool
"""Values of operators that are no tensors: sizes."""


def _constants(traced: Trace) -> dict[str, torch.Size]:
    return {name: traced.tensors[name].shape for name in traced.constants}


def _operators(traced: Trace) -> list[fx.Node]:
    """Returns the operators on tensors, in order, without sizes and slices.

    With a fixed batch a trace holds no sizes, and a slice of all entries is an alias or absent.
    """
    nodes = (n for n in traced.graph.nodes if n.op == "call_function" and not isinstance(n.meta.get("val"), _NUMBER))
    return [n for n in nodes if operator_name(n) not in (*CHECKS, "slice", "alias")]


def unread(model: nn.Module, small: nn.Module) -> list[str]:
    """Returns the parameters that the smaller model does not hold under any name, because no operator reads them."""
    held = {name for name, _ in small.named_parameters(remove_duplicate=False)}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [own[0] for own in names.values() if not held.intersection(own)]


def states_precision(traced: Trace) -> bool:
    """Tells whether a trace names a floating-point type or holds constants of one."""
    named = (v for n in traced.graph.nodes if n.op == "call_function" for v in (*n.args, *n.kwargs.values()))
    return any(isinstance(v, torch.dtype) and v.is_floating_point for v in named) or any(
        traced.tensors[name].is_floating_point() for name in traced.constants
    )
