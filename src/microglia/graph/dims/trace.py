"""Tracing: one ATen graph of the model's forward pass, through torch.export, with the names of its own parameters."""

from __future__ import annotations

import io
import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from microglia.core.batch import Example
from microglia.core.modes import modes_kept
from microglia.graph.dims.lean import lean
from microglia.graph.dims.nodes import operator_name
from microglia.graph.dims.refusals import TraceError, place_of

CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size")
"""Operators of the trace that only check bounds; after a cut these no longer hold."""


@dataclass(frozen=True)
class Trace:
    """One traced forward pass.

    Attributes:
        graph: The ATen graph (training IR, no decompositions), wrappers inlined.
        tensors: Parameters, buffers and constants by their original name.
        name_of: Placeholder name -> name of its tensor.
        inputs: Placeholder names of the model's own inputs, in order.
        in_spec: How the inputs flatten, (args, kwargs).
        out_spec: How the outputs flatten.
        example: The inputs of the trace, flat.
        constants: Names of tensors that are neither parameter nor buffer of the model: values that its code makes.
        unknown_outputs: Classes of outputs that are None here, because torch.export cannot return them.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    name_of: dict[str, str]
    inputs: tuple[str, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    example: tuple[Any, ...]
    constants: frozenset[str] = frozenset()
    unknown_outputs: tuple[str, ...] = ()


def trace(model: nn.Module, example_inputs: Any, *, dynamic: Sequence[int] = (0,), training: bool = False) -> Trace:
    """Returns the traced forward pass of a model, which stays unchanged.

    Args:
        model: Any module that torch.export can trace.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments. With free dimensions a batch of one
            is doubled; otherwise torch.export would treat it as a constant.
        dynamic: Dimensions of the inputs that may change later: by default the batch; (0, 2, 3) also height and width of
            images, (0, 1) also the length of token ids. A size that the model's own code fixes stays fixed.
        training: Whether to trace in training mode instead of evaluation mode.

    Raises:
        TraceError: torch.export cannot trace the model.
    """
    with lean():
        exported, unknown = export_program(model, example_inputs, dynamic=dynamic, training=training)
    inline_wrappers(exported.graph_module)
    _refuse_unknown_sizes(exported.graph, model)
    return replace(_as_trace(exported, model), unknown_outputs=unknown)


def export_program(
    model: nn.Module, example_inputs: Any, *, dynamic: Sequence[int] = (0,), training: bool = False
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """Returns what torch.export makes of a model, and the classes of the outputs that it leaves out; arguments as `trace`.

    Raises:
        TraceError: torch.export cannot trace it.
    """
    args, kwargs = arguments(example_inputs)
    unknown: dict[str, None] = {}

    def known(module: nn.Module, args: Any, outputs: Any) -> Any:
        unknown.update(_unknown_outputs(outputs, module))
        return known_outputs(outputs)

    with modes_kept(model, through_train=True):  # the model's own train() may keep or discard computed values
        model.train(not training)
        model.train(training)
        if not training:
            _run_once(model, args, kwargs)
        hook = model.register_forward_hook(known)
        try:
            return _export(model, args, kwargs, dynamic), tuple(unknown)
        finally:
            hook.remove()


def _run_once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Runs a model once, so that it makes lazy values, such as tables of positions, before every trace."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    args, kwargs = pytree.tree_map(copied, (args, kwargs))
    with suppress(Exception), torch.no_grad():  # the trace reports the error
        model(*args, **kwargs)
    for buffer, value in before:
        buffer.copy_(value)


def _refuse_unknown_sizes(graph: fx.Graph, model: nn.Module) -> None:
    """Raises if a size is known only at run time: the number of remaining boxes, of nonzero entries."""
    for node in graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            sizes = value.shape if isinstance(value, Tensor) else (value,)
            if any(isinstance(s, torch.SymInt) and s.node.hint is None for s in sizes):
                raise TraceError(
                    f"A size in {type(model).__name__} depends on values: that of {node.name} ({operator_name(node)})."
                )


def _as_trace(exported: torch.export.ExportedProgram, model: nn.Module) -> Trace:
    tensors: dict[str, Tensor] = {**exported.constants, **exported.state_dict}
    own = dict(itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    names, inputs = {}, []
    for spec in exported.graph_signature.input_specs:
        if spec.target is None:
            inputs.append(spec.arg.name)
        elif isinstance(tensors.get(spec.target), Tensor):
            names[spec.arg.name] = spec.target
    example = tuple(pytree.tree_leaves(exported.example_inputs))
    used = {target: own.get(target, tensors[target]) for target in names.values()}
    call = exported.call_spec
    made = frozenset(used) - frozenset(own)
    return Trace(exported.graph, used, names, tuple(inputs), call.in_spec, call.out_spec, example, made)


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns (args, kwargs) of example inputs in any of the accepted forms."""
    example = Example.of(example_inputs)
    return example.args, example.kwargs


def copied(value: Any) -> Any:
    """Returns a copy of a tensor, which a model may overwrite; other values are returned unchanged."""
    return value.clone() if isinstance(value, Tensor) else value


def as_inputs(example: Any) -> Any:
    """Returns (args, kwargs) in a form that `trace` accepts."""
    args, kwargs = example
    if args and kwargs:
        raise TraceError("Inputs given both by position and by name cannot be traced; give them all by name.")
    return kwargs or tuple(args)


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Sequence[int]
) -> torch.export.ExportedProgram:
    """Exports with a free batch first, then as given: a dimension that cannot be free is a constant of the graph."""
    given = (args, kwargs)
    twice = doubled(given)
    attempts = [(twice, tuple(dynamic)), (twice, ()), (given, ())] if dynamic else [(given, ())]
    problem: Exception | None = None
    for (positional, named), free in attempts:
        try:
            with warnings.catch_warnings(), quiet():
                warnings.simplefilter("ignore")
                return torch.export.export(
                    model, positional, named or None, dynamic_shapes=_free((positional, named), free), strict=False
                )
        except TraceError:
            raise
        except Exception as error:
            problem = problem or error
    raise TraceError(_untraceable(model, problem)) from problem


def _untraceable(model: nn.Module, problem: Exception | None) -> str:
    """Returns the position in the model's code at which torch.export stops, and the reason."""
    first = (str(problem).strip().splitlines() or [""])[0]
    what = f"{type(problem).__name__}: {first[:300]}"
    if "DataDependent" in what or "data-dependent" in what:
        what = "what it does depends on the values of tensors"
    where = place_of(problem) if problem is not None else ""
    return (
        f"torch.export cannot trace {type(model).__name__}{f' ({where})' if where else ''}: {what.rstrip('.')}; "
        "remove what depends on the values of tensors from its forward, or shrink an exportable part of it."
    )


def known_outputs(outputs: Any) -> Any:
    """Returns outputs with None for values that torch.export cannot return, such as the cache of a language model."""
    return pytree.tree_map(lambda v: v if isinstance(v, _KNOWN) else None, outputs)


_KNOWN = Tensor | int | float | str | None


def _unknown_outputs(outputs: Any, model: nn.Module) -> dict[str, None]:
    """Returns the classes of outputs that are left out; raises if no other output remains."""
    leaves = pytree.tree_leaves(outputs)
    found = dict.fromkeys(type(v).__name__ for v in leaves if not isinstance(v, _KNOWN))
    if found and not any(isinstance(v, Tensor) for v in leaves):
        raise TraceError(
            f"{type(model).__name__} returns {' and '.join(found)}, in which no tensor can be followed: let it return tensors, "
            "or a tuple, list or dict of them."
        )
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Context without torch's log and printed output, the whole graph on failure; the error itself is enough."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def widen(graph: fx.Graph) -> bool:
    """Changes every cast of a graph to a narrower floating-point type into one to float64; tells whether there was any."""
    found = False

    def one(value: Any) -> Any:
        nonlocal found
        if isinstance(value, torch.dtype) and value.is_floating_point and value != torch.float64:
            found = True
            return torch.float64
        return value

    for node in graph.nodes:
        if node.op == "call_function":
            node.args = tuple(one(a) for a in node.args)
            node.kwargs = {k: one(v) for k, v in node.kwargs.items()}
    return found


def doubled(inputs: Any) -> Any:
    """Returns nested inputs in which every tensor with a batch of one holds it twice: torch.export takes 1 as a constant."""
    return pytree.tree_map_only(Tensor, lambda x: torch.cat([x, x]) if x.ndim and x.shape[0] == 1 else x, inputs)


def _free(inputs: Any, dynamic: Sequence[int]) -> Any:
    if not dynamic:
        return None
    from torch.export import Dim  # takes half a second, which only a trace needs

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        return {d: Dim.AUTO for d in dynamic if d < value.ndim and value.shape[d] > 1}

    positional, named = pytree.tree_map(one, inputs)
    return (*positional, *named.values()) if positional else named


def fixed_sizes(graph: fx.Graph, dynamic: Sequence[int]) -> list[str]:
    """Returns a sentence for each requested free dimension of an input that is a constant of the graph."""
    values = {n.name: n.meta.get("val") for n in graph.nodes if n.op == "placeholder"}
    found = []
    for name, value in values.items():
        for d in dynamic if isinstance(value, Tensor) else ():
            size = value.shape[d] if d < value.ndim else None
            if isinstance(size, torch.SymInt):
                size = size.node.maybe_as_int()
            if size is not None:
                found.append(
                    f"Dimension {d} of the input {name} stays {size}, as in the example: the model's own code fixes it."
                )
    return found


# -------------------------------------------------------------------------------------------------------- rewriting
def inline_wrappers(module: fx.GraphModule) -> fx.GraphModule:
    """Inlines autocast and no-grad regions, which are exported as calls of a submodule; autocast itself is dropped."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        below = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        if len(below) != 1:
            continue
        given = node.args[node.args.index(below[0]) + 1 :]
        inner = inline_wrappers(getattr(module, str(below[0].target))).graph
        _inline(graph, node, inner, given)
        graph.erase_node(node)
        if not below[0].users:
            graph.erase_node(below[0])
    return module


def _inline(graph: fx.Graph, node: fx.Node, inner: fx.Graph, given: Iterable[Any]) -> None:
    known: dict[fx.Node, Any] = dict(zip([n for n in inner.nodes if n.op == "placeholder"], given, strict=False))
    results: Any = None
    with graph.inserting_before(node):
        for step in inner.nodes:
            if step.op == "output":
                results = fx.node.map_arg(step.args[0], known.__getitem__)
            elif step.op != "placeholder":
                known[step] = graph.node_copy(step, known.__getitem__)
    if isinstance(results, tuple | list):
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(results)
