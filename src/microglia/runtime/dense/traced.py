"""Tracing of a model whose layers are replaced, perhaps once for several replacements."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.core.running import first_line

if TYPE_CHECKING:
    from torch.export import ExportedProgram

UNKNOWN_OUTPUT = re.compile(r"Found <class '([\w.]+)'> in output, which is not a known type")
"""The words of torch.export for an output that is neither a tensor nor a container of tensors."""

_kept: ContextVar[list[tuple[nn.Module, Example, ExportedProgram]] | None] = ContextVar("_kept", default=None)


@contextmanager
def traced_once() -> Iterator[None]:
    """Context in which `fuse` traces a model once for the same inputs; within it no model that is fused may change."""
    token = _kept.set([])
    try:
        yield
    finally:
        _kept.reset(token)


def _program_of(model: nn.Module, example: Example) -> ExportedProgram:
    """Returns the traced model, perhaps that of an earlier call within `traced_once`."""
    kept = _kept.get()
    for other, inputs, program in kept or ():
        if other is model and inputs is example:
            return program
    program = _export(model, example)
    if kept is not None:
        kept.append((model, example, program))
    return program


def _export(model: nn.Module, example: Example) -> ExportedProgram:
    """Returns the traced model, in which no step writes into memory that another node shares."""
    try:
        program = torch.export.export(model, example.args, example.kwargs, strict=False)
        if any(_writes_through_a_view(node) for node in program.graph.nodes):
            program = program.run_decompositions({})
    except Exception as error:
        raise MicrogliaError(f"{type(model).__name__} cannot be traced by torch.export: {_cause(error)}") from error
    return program


def graph_of(model: nn.Module, example: Example) -> GraphModule:
    """Returns a model's graph, a new one at each call, in which no step writes into memory that another node shares.

    Args:
        model: The model in evaluation mode; the graph shares its weights.
        example: Example inputs.

    Raises:
        MicrogliaError: torch.export cannot trace the model.
    """
    exported = _program_of(model, example).module()
    assert isinstance(exported, GraphModule)
    return exported


def _cause(error: Exception) -> str:
    """Returns the short cause of a failed trace, with the remedy where there is one."""
    found = UNKNOWN_OUTPUT.search(str(error))
    if found is None:
        return first_line(error)
    return (
        f"its output holds a {found[1].rpartition('.')[2]}, and a graph returns tensors alone. Wrap the model so that it "
        "returns tensors; a model of transformers does with config.use_cache = False."
    )


def _writes_through_a_view(node: Node) -> bool:
    """Tells whether a step writes into a view or into its base: in another layout the view would be a copy."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return False
    written = [a for a, kind in zip(node.args, schema.arguments, strict=False) if kind.alias_info and kind.alias_info.is_write]
    nodes = [leaf for leaf in tree_leaves(written) if isinstance(leaf, Node)]
    return any(_is_view(found) or any(map(_is_view, found.users)) for found in nodes)


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and _is_view(node.args[0])
    return schema is not None and not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)
