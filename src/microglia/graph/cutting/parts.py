"""Parts: a model that cannot be traced as a whole is traced by its largest traceable submodules.

A detector's backbone and heads are plain tensor code; the steps between them (proposals, non-maximum suppression) depend on
values. Inputs and outputs of a part keep their size; within it channels are removed as in any model.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.core.layers import layer_kind
from microglia.core.modes import evaluating
from microglia.core.running import run, undisturbed
from microglia.graph.cutting.live import live_trace
from microglia.graph.cutting.training import drew
from microglia.graph.dims.algebra import Algebra
from microglia.graph.dims.analysis import Analysis
from microglia.graph.dims.refusals import TraceError, refuse_random
from microglia.graph.dims.trace import arguments, as_inputs, widen


@dataclass(frozen=True)
class Part:
    """A traced submodule.

    Attributes:
        path: Its name in the model; empty for the model itself.
        module: The submodule, in the model's own precision.
        example: Its inputs in one forward pass of the model: (args, kwargs).
        analysis: Analysis of its twin in float64; names are the submodule's own.
        weight: Number of calls by the model.
        narrow: Whether its code casts to a narrower type, so that its modules cannot run in float64.
    """

    path: str
    module: nn.Module
    example: Any
    analysis: Analysis
    weight: int
    narrow: bool = False

    def name(self, local: str) -> str:
        """Returns the model's name of one of the part's tensors or modules."""
        return f"{self.path}.{local}".strip(".")

    def dims_of(self, name: str) -> Sequence[Any]:
        """Returns the dimensions of a tensor of the model; a weight's are (out, in, *kernel) for every layout."""
        local = name.removeprefix(f"{self.path}.") if self.path else name
        dims = self.analysis.parameter_dims[local]
        kind = layer_kind(self.module.get_submodule(local.rpartition(".")[0]))
        return (dims[1], dims[0], *dims[2:]) if kind is not None and kind.swapped and len(dims) > 1 else dims


def find_parts(model: nn.Module, twin: nn.Module, example_inputs: Any) -> list[Part]:
    """Returns the largest traceable parts of a model that hold parameters, all over one algebra.

    Args:
        model: Model in its own precision.
        twin: The model's copy in float64.
        example_inputs: Inputs in any of the accepted forms.

    Raises:
        TraceError: No part with channels can be traced, the outputs are random, or the inputs do not fit.
    """
    algebra = Algebra()
    try:
        part, drawn = drew(lambda: _part("", model, twin, arguments(example_inputs), algebra))
    except TraceError as error:
        whole = error
    else:
        refuse_random(part.analysis.trace.graph, model, drawn=drawn)
        return [part]
    _check_runs(model, example_inputs)
    calls = _record(twin, example_inputs)
    found = _descend(model, twin, "", calls, algebra)
    _freeze_shared(algebra, found)
    if not any(part.analysis.prunable() for part in found):
        raise whole
    return found


def _check_runs(model: nn.Module, example_inputs: Any) -> None:
    """Raises if the inputs are wrong, not the model; runs in the model's own precision, which the user knows."""
    try:
        with evaluating(model), undisturbed():
            run(model, Example(*arguments(example_inputs)).copied())
    except MicrogliaError as error:
        raise TraceError(str(error)) from error


def to_double(value: Any) -> Any:
    """Returns a module (changed in place) or nested inputs with every floating-point tensor in float64."""
    if isinstance(value, nn.Module):
        return value.double()
    return pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, value)


def double_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of a model in float64; each tensor is written once."""
    tensors = (*model.parameters(), *model.buffers())
    doubled: dict[int, Any] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype != torch.float64 and type(tensor) in (Tensor, nn.Parameter):
            new = tensor.detach().double()
            doubled[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return deepcopy(model, doubled).double()


def _part(path: str, module: nn.Module, twin: nn.Module, example: Any, algebra: Algebra, *, calls: int = 1) -> Part:
    traced = live_trace(twin, as_inputs(to_double(example)), dynamic=())
    narrow = widen(traced.graph)
    return Part(path, module, example, Analysis(traced, algebra), calls, narrow)


@torch.no_grad()
def _record(model: nn.Module, example_inputs: Any) -> dict[nn.Module, list[Any]]:
    """Returns the inputs of every call of every submodule in one forward pass in evaluation mode."""
    calls: dict[nn.Module, list[Any]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(module, []).append((args, kwargs))

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules()]
    try:
        args, kwargs = arguments(to_double(example_inputs))
        with evaluating(model):
            model(*args, **kwargs)
    except Exception as error:
        raise TraceError(f"{type(model).__name__} does not run on the example inputs: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _descend(model: nn.Module, twin: nn.Module, path: str, calls: dict[nn.Module, list[Any]], algebra: Algebra) -> list[Part]:
    found: list[Part] = []
    for name, child in twin.named_children():
        if not any(True for _ in child.parameters()):
            continue
        below = model.get_submodule(name)
        where = f"{path}.{name}".strip(".")
        if child in calls:
            try:
                single = _single(calls[child][0], below)
                part = _part(where, below, child, single, algebra, calls=len(calls[child]))
                refuse_random(part.analysis.trace.graph, below)
                found.append(part)
                continue
            except TraceError:
                pass
        found += _descend(below, child, where, calls, algebra)
    return found


def _single(example: Any, module: nn.Module) -> Any:
    """Returns recorded inputs in the module's own precision."""
    dtype = next(module.parameters()).dtype
    return pytree.tree_map(lambda v: v.detach().to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, example)


def _freeze_shared(algebra: Algebra, parts: Sequence[Part]) -> None:
    """Freezes tensors that two parts read: each part knows only its own use."""
    seen: dict[int, Part] = {}
    for part in parts:
        own = dict(part.module.named_parameters(remove_duplicate=False))
        for name, dims in part.analysis.parameter_dims.items():
            tensor = own.get(name)
            if tensor is None:
                continue
            first = seen.setdefault(id(tensor), part)
            if first is not part:
                why = f"{part.name(name)} is used in {first.path} too"
                mine = next(n for n, t in first.module.named_parameters(remove_duplicate=False) if t is tensor)
                algebra.freeze(*dims, *first.analysis.parameter_dims.get(mine, []), why=why)
