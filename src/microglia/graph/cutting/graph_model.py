"""Builds the smaller model from its graphs, which train, change precision and copy like the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from microglia.graph.cutting.cut import Cut
from microglia.graph.cutting.live import Traces, following_precision, live_trace, states_precision, unread
from microglia.graph.cutting.modules import Indices, indices, kept_units
from microglia.graph.cutting.parts import double_copy, to_double
from microglia.graph.cutting.surgery import Follows, GraphModel, cut_graph, forward_names
from microglia.graph.cutting.training import Mode, averaging, drew, exceptions, following, lost, modes_of, note, own_code
from microglia.graph.dims.analysis import Analysis
from microglia.graph.dims.refusals import TraceError
from microglia.graph.dims.trace import Trace, as_inputs, doubled


def graph_model(
    model: nn.Module,
    example: Any,
    kept: Indices,
    dynamic: Sequence[int] = (0,),
    whole: tuple[nn.Module, str] | None = None,
    *,
    wide: Trace | None = None,
) -> GraphModel:
    """Returns the cut model as its graph, or as two graphs if its own code differs in training.

    Args:
        model: Model to trace.
        example: Its inputs, (args, kwargs).
        kept: Kept indices by tensor.
        dynamic: Free dimensions of the inputs.
        whole: The whole model and the part's path in it; its own `train` decides which modules keep their mode.
        wide: Trace in evaluation mode of its copy in float64, with any batch, if there is one.
    """
    root, path = whole or (model, "")
    modes, stay = modes_of(model), exceptions(modes_of(root), path)
    own, doubles = Traces(model, as_inputs(example), dynamic), _Wide(model, example, dynamic, wide)
    names, evaluation = forward_names(model), _cut(own.evaluation, kept)
    training, why = (None, "") if own.alike else _in_training(own, kept)
    first, second = evaluation.analysis.trace, training.analysis.trace if training else None
    follows, known = _follows(first, following(model, first, second, modes), doubles.traces(training=False))
    small = cut_graph(evaluation, names, follows)
    small.microglia_exceptions = stay
    name = path or type(model).__name__
    notes = [lost(name, model, why)] if why else []
    if training and second and (differing := own_code(first, second)):
        mode = following(model, second, first, modes, training=True)
        follows, also = _follows(second, mode, doubles.traces(training=True))
        known = known and also
        small.learn_training(training, names, follows)
        notes += note(name, differing, model)
    small.learn_layers(model)
    small.learn_modes(model)
    small.microglia_notes = (*notes, *([] if known else [_PRECISION.format(name=name)]), *_unread(name, model, small))
    return small


_PRECISION = (
    "Types that the code of {name} states stay as they were traced, so that its graph may not run in another precision: "
    "convert the model before it is cut."
)


def _unread(name: str, model: nn.Module, small: nn.Module) -> list[str]:
    names = unread(model, small)
    if not names:
        return []
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [
        f"The graph of {name} does not hold {shown}: no operator reads it. What the model's code computed from it "
        "once and kept is a constant, which no optimizer reaches; the parameters are counted without it."
    ]


@dataclass(frozen=True)
class _Wide:
    """Traces of a model's copy in float64, made where they are needed.

    The types of operators do not depend on a free batch, which more than doubles the time of a trace. So it comes last.
    """

    model: nn.Module
    example: Any
    dynamic: Sequence[int]
    evaluation: Trace | None

    @cached_property
    def twin(self) -> nn.Module:
        return double_copy(self.model)

    def traces(self, *, training: bool) -> Iterator[Trace]:
        """Yields traces in one mode, as long as they are asked for."""
        if self.evaluation is not None and not training:
            yield self.evaluation
        inputs = to_double(self.example)
        for given, dynamic in ((doubled(inputs), ()), (inputs, tuple(self.dynamic))):
            if (traced := self._traced(as_inputs(given), dynamic, training=training)) is not None:
                yield traced

    def _traced(self, inputs: Any, dynamic: Sequence[int], *, training: bool) -> Trace | None:
        traces = Traces(self.twin, inputs, dynamic)
        with suppress(TraceError), averaging(self.twin):
            return traces.training[0] if training else drew(lambda: traces.evaluation)[0]
        return None


def _follows(traced: Trace, modes: Mapping[Any, Mode], wide: Iterator[Trace]) -> tuple[Follows, bool]:
    """Returns the modes and types that operators of a trace follow, and whether the types are known."""
    if not states_precision(traced):
        return Follows(modes), True
    for other in wide:
        types, fixed, known = following_precision(traced, other)
        if known:
            return Follows(modes, types, fixed), True
    return Follows(modes), False


def _in_training(own: Traces, kept: Indices) -> tuple[Cut | None, str]:
    """Returns the cut of the trace in training mode, or the reason why there is none."""
    try:
        traced, drawn = own.training
        cut = _cut(traced, kept)
    except TraceError:
        return None, "cannot be traced"
    if drawn:
        return None, "draws random numbers from Python or NumPy, which a graph cannot"
    if indices(cut) != {name: dict(by_dim) for name, by_dim in kept.items() if name in cut.analysis.parameter_dims}:
        return None, "cannot be cut in the same way"
    return cut, ""


def cut_again(model: nn.Module, example: Any, kept: Indices, dynamic: Sequence[int] = (0,)) -> Cut:
    """Returns the cut by kept indices of a new trace of the model, in its own precision."""
    return _cut(live_trace(model, as_inputs(example), dynamic=dynamic), kept)


def _cut(traced: Trace, kept: Indices) -> Cut:
    analysis = Analysis(traced)
    return Cut(analysis, kept_units(analysis, kept))
