"""Removal: from kept units to the smaller model, verified part by part before anything is returned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from microglia.core.garbage import collection_paused
from microglia.core.progress import progress_bar
from microglia.core.sharded import refuse_shards
from microglia.graph.cutting.baking import baked_copy
from microglia.graph.cutting.cut import Cut, by_group
from microglia.graph.cutting.graph_model import cut_again, graph_model
from microglia.graph.cutting.hugging_face import fitting_fields, set_fields
from microglia.graph.cutting.live import unread
from microglia.graph.cutting.modules import attributes, cut_module, indices
from microglia.graph.cutting.parts import Part, double_copy, find_parts
from microglia.graph.cutting.plan import (
    Plan,
    attach,
    place,
    plan_of,
    refuse_graph,
    shapes,
    write_example,
)
from microglia.graph.cutting.surgery import GraphModel
from microglia.graph.cutting.verify import ShrinkError, Verification, difference, run_patched, verify
from microglia.graph.dims.refusals import refuse_kinds
from microglia.graph.dims.trace import Trace, copied, fixed_sizes, known_outputs

EXACT, SINGLE = 1e-9, 1e-4
"""Maximum relative difference between the cut modules and the cut graph in float64, and to a graph traced in float32."""


@dataclass(frozen=True)
class Subject:
    """A model during its removal of channels.

    Attributes:
        model: A copy of the given model, with masks and other parametrizations written into the weights.
        example: The given example inputs.
        parts: Its traceable parts: the whole model if it can be traced.
        dynamic: Free dimensions of the inputs of a graph.
        notes: Changes of the copy that the user has to know.
    """

    model: nn.Module
    example: Any
    parts: tuple[Part, ...]
    dynamic: tuple[int, ...] = (0,)
    notes: tuple[str, ...] = ()

    @staticmethod
    @collection_paused()
    def of(model: nn.Module, example_inputs: Any, dynamic: Sequence[int] = (0,)) -> Subject:
        """Traces and analyses a folded copy of a model.

        Raises:
            ShrinkError: Its weights cannot be baked, or the copy's outputs differ from the model's.
            TraceError: The model is of a kind that cannot be cut, or no part of it can be traced.
        """
        refuse_shards(model, "A cut")
        refuse_graph(model)
        refuse_kinds(model)
        with progress_bar("trace"):
            own, notes = baked_copy(model, example_inputs)
            parts = find_parts(own, double_copy(own), example_inputs)
        return Subject(own, example_inputs, tuple(parts), tuple(dynamic), notes)

    def unread(self, small: nn.Module) -> int:
        """Returns the number of parameters that the smaller model lacks because no operator of its graphs reads them."""
        if not plan_of(small).graphs:
            return 0
        held = dict(self.model.named_parameters(remove_duplicate=False))
        return sum(held[name].numel() for name in unread(self.model, small))

    def cuts(self, kept: Mapping[int, Tensor]) -> list[tuple[Part, Cut]]:
        """Returns each part with its own kept units."""
        return [(part, Cut(part.analysis, kept)) for part in self.parts]

    def changes(self, kept: Mapping[int, Tensor]) -> tuple[dict[str, dict[str, list[Any]]], dict[str, dict[str, Any]]]:
        """Returns kept indices by tensor and new attributes by module, under the model's names."""
        named: dict[str, dict[str, list[Any]]] = {}
        changed: dict[str, dict[str, Any]] = {}
        for part, cut in self.cuts(kept):
            named.update({part.name(name): by_dim for name, by_dim in indices(cut).items()})
            changed.update({part.name(path): values for path, values in attributes(cut, part.module).items()})
        return named, changed


@collection_paused()
def remove(subject: Subject, kept: Mapping[int, Tensor], *, keep_class: bool = False, verified: bool = True) -> nn.Module:
    """Returns the cut model: the user's own classes if their outputs equal the cut graph's, else the graph.

    Raises:
        ShrinkError: A value differs from the masked model's; or the classes cannot be cut although ``keep_class`` is set.
    """
    named, changed = subject.changes(kept)
    small = cut_module(subject.model, named, changed)
    graphs: dict[str, Any] = {}
    notes = list(subject.notes)
    error = 0.0
    for part, cut in subject.cuts(kept):
        checked = verify(cut) if verified else run_patched(cut)
        error = max(error, checked.error)
        notes += left_out_note(checked.left_out)
        exact = SINGLE / 10 if part.narrow else EXACT
        problem = class_problem(small.get_submodule(part.path), cut, checked, exact)
        if not problem:
            continue
        name = part.path or type(subject.model).__name__
        if keep_class:
            raise ShrinkError(f"{name} cannot keep its class: {problem} Leave keep_class out.")
        small = place(small, part.path, _as_graph(part, cut, checked, subject))
        graphs[part.path] = write_example(part.example)
        notes.append(f"{name} is returned as a graph: {problem}")
        notes += fixed_sizes(cast(GraphModel, small.get_submodule(part.path)).graph, subject.dynamic)
        if objects := part.analysis.trace.unknown_outputs:
            notes.append(f"The graph of {name} returns None where its own code returns {' and '.join(objects)}.")
        notes += cast(GraphModel, small.get_submodule(part.path)).microglia_notes
    _carry_notes(subject.model, small)
    changed_shapes = shapes(subject.model, small)
    fields = {} if graphs else fitting_fields(small, changed_shapes)
    set_fields(small, fields)
    plan = Plan(
        "graph" if graphs else "module",
        named,
        changed,
        graphs=graphs,
        dynamic=subject.dynamic,
        shapes=changed_shapes,
        error=error,
        notes=tuple(notes),
        config=fields,
        model=type(subject.model).__name__,
    )
    return attach(small, plan)


def left_out_note(operators: Sequence[str]) -> list[str]:
    """Returns a sentence for a plan about reductions in which removed channels no longer count, if any."""
    if not operators:
        return []
    shown = ", ".join(operators[:3]) + (f" and {len(operators) - 3} more" if len(operators) > 3 else "")
    return [
        f"Removed channels leave {shown}, where a channel with zero weights would still count: the error is against the masked "
        "model whose reductions run over the kept channels, not against one with zero weights."
    ]


def class_problem(small: nn.Module, cut: Cut, checked: Verification, exact: float = EXACT) -> str:
    """Returns the reason why the cut classes differ from the cut graph; empty if they are equal."""
    try:
        outputs = model_outputs(double_copy(small), cut)
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        return f"its forward does not follow the cut ({first[0]})."
    if outputs_difference(outputs, checked.outputs) > exact:
        return "its forward runs on the cut tensors, but computes something else."
    return ""


def _as_graph(part: Part, cut: Cut, checked: Verification, subject: Subject) -> nn.Module:
    """Returns a part as a graph traced in the model's own precision, after a comparison with the verified one."""
    wide = None if part.narrow else cut.analysis.trace  # widened casts no longer tell the types
    small = graph_model(part.module, part.example, indices(cut), subject.dynamic, (subject.model, part.path), wide=wide)
    _check_sizes(small, cut)
    args, kwargs = pytree.tree_map(copied, part.example)
    with torch.no_grad():
        outputs = pytree.tree_leaves(small.eval()(*args, **kwargs))
    if outputs_difference(outputs, checked.outputs) > SINGLE:
        # A comparison in a forward may have another result in another precision: check node by node.
        verify(cut_again(part.module, part.example, indices(cut), subject.dynamic), tolerance=10 * SINGLE)
    small.learn_modes(part.module)
    return small


def _check_sizes(small: nn.Module, cut: Cut) -> None:
    """Raises unless the graph's tensors have the sizes of the cut."""
    tensors = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    for name, by_dim in indices(cut).items():
        if name in tensors and name not in cut.analysis.trace.constants:
            each = {k: stay[0] if by_group(stay) else stay for k, stay in by_dim.items()}
            wrong = [k for k, stay in each.items() if tensors[name].shape[int(k)] != len(stay)]
            if wrong:
                raise ShrinkError(f"Dimension {wrong[0]} of {name} came out of another trace with another size.")


def _carry_notes(model: nn.Module, small: nn.Module) -> None:
    """Copies the library's records of a model, such as how it was built, to the smaller one."""
    for name, value in vars(model).items():
        if name.startswith("microglia_") and name not in vars(small):
            object.__setattr__(small, name, value)


def model_outputs(model: nn.Module, cut: Cut) -> list[Any]:
    """Returns a model's flat outputs on the inputs of the trace; the model is set to evaluation mode."""
    return _outputs(model, cut.analysis.trace, cut.analysis.trace.example)


def outputs_of(model: nn.Module, trace: Trace, inputs: Sequence[Any]) -> list[Any]:
    """Returns the flat outputs of a model's copy in float64 on flat inputs of a trace."""
    return _outputs(double_copy(model), trace, inputs)


@torch.no_grad()
def _outputs(model: nn.Module, trace: Trace, inputs: Sequence[Any]) -> list[Any]:
    args, kwargs = pytree.tree_unflatten([copied(v) for v in inputs], trace.in_spec)
    return pytree.tree_leaves(known_outputs(model.eval()(*args, **kwargs)))


def noise(value: Any, generator: torch.Generator) -> Any:
    """Returns random numbers in place of a floating-point input; other inputs are returned unchanged."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    return value


def outputs_difference(got: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Returns the maximum relative difference of two flat outputs; infinite if they do not correspond."""
    if len(got) != len(wanted):
        return math.inf
    worst = 0.0
    for mine, theirs in zip(got, wanted, strict=True):
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            worst = max(worst, difference(mine.to(theirs), theirs) if mine.shape == theirs.shape else math.inf)
    return worst
