"""One graph for both modes: runs of a model, recorded call by call, often show it without a second trace.

A trace takes seconds, runs on tensors without values a fraction of that. A model may call the same functions on the same values
in both modes, apart from the mode arguments of dropout and batch norm. Then the trace of evaluation serves training too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from microglia.core.running import undisturbed
from microglia.graph.cutting.training import COUNTER, averaging, drew
from microglia.graph.dims.trace import arguments, copied, doubled, quiet

FLAGGED: dict[Callable[..., Any], str] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), "training"),
    **dict.fromkeys((F.batch_norm, F.rrelu), "training"),
    F.instance_norm: "use_input_stats",
}
"""Function -> its argument for the training mode."""

_PARAMETERS = {function: list(signature(function).parameters) for function in FLAGGED}

Call = tuple[Any, ...]


def alike_in_training(model: nn.Module, example_inputs: Any) -> bool:
    """Tells whether a model surely runs the same code in training as in evaluation; False where two runs do not show it.

    The model does not run itself: a copy does, on tensors without values. Every mode argument has to follow the mode of the
    model: code that gives a constant one, or that of a module whose mode its owner keeps, is not alike.

    Args:
        model: A model that `torch.export` can trace.
        example_inputs: See `microglia.graph.dims.trace.trace`.
    """
    given = doubled(arguments(example_inputs))
    try:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        twin, inputs = _fake_copy(model, fake), pytree.tree_map_only(Tensor, fake.from_tensor, given)
        with quiet(), undisturbed(), fake, averaging(twin):
            twin.train().eval()
            _run(twin, pytree.tree_map(copied, inputs))  # what the code makes once and keeps is there in the next run
            evaluation = _recorded(twin, inputs)
            training, drawn = drew(lambda: _recorded(twin.train(), inputs))
    except Exception:  # batch norm of one value, a step that depends on values: a trace tells more
        return False
    return not (drawn or evaluation.strange or training.strange) and evaluation.calls == training.calls


def _fake_copy(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """Returns a copy of a model whose tensors have no values, so that its runs compute none and leave the model alone."""
    tensors = (*model.parameters(), *model.buffers())
    return deepcopy(model, {id(tensor): fake.from_tensor(tensor) for tensor in tensors})


def _recorded(model: nn.Module, inputs: Any) -> _Record:
    """Returns the record of one run in the mode of the model."""
    inputs = pytree.tree_map(copied, inputs)
    record = _Record(model, pytree.tree_leaves(inputs))
    with record:
        _run(model, inputs)
    return record


def _run(model: nn.Module, inputs: Any) -> None:
    args, kwargs = inputs
    model(*args, **kwargs)


class _Record(TorchFunctionMode):
    """Notes every call of a function of torch: its arguments, with tensors by their name or the call that made them.

    ``strange`` tells that a mode argument was not the mode of the model.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        super().__init__()
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self.names: dict[int, str] = {id(value): f"input {place}" for place, value in enumerate(inputs)}
        self.names.update({id(tensor): name for name, tensor in named})
        self.counters = {key for key, name in self.names.items() if name.endswith(COUNTER)}
        self.made: dict[int, tuple[weakref.ref[Tensor], Call]] = {}
        self.calls: list[Call] = []
        self.training, self.strange = model.training, False

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        counts = function is Tensor.add_ and id(args[0]) in self.counters
        if not counts:
            given = self._without_mode(function, args, kwargs)
            self.calls.append((function, pytree.tree_map(self._named, given)))
        result = function(*args, **kwargs)
        for place, value in enumerate(pytree.tree_leaves(result)):
            if not isinstance(value, Tensor):
                continue
            if function in FLAGGED or self._named(value)[0] == "constant":  # dropout may return its input
                self.made[id(value)] = weakref.ref(value), ("made", len(self.calls), place)
        return result

    def _without_mode(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        flag = FLAGGED.get(function)
        if flag is None:
            return tuple(args), kwargs
        given = {**dict(zip(_PARAMETERS[function], args, strict=False)), **kwargs}
        mode = given.pop(flag, None)
        own_statistics = "running_mean" in given and given["running_mean"] is None
        if mode is not self.training and not own_statistics:
            self.strange = True
        return (), {**given, flag: mode if own_statistics else None}

    def _named(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value if isinstance(value, _PLAIN) else (type(value), id(value))
        if (name := self.names.get(id(value))) is not None:
            return ("named", name)
        found = self.made.get(id(value))
        return found[1] if found and found[0]() is value else ("constant", id(value))


_PLAIN = (
    str
    | int
    | float
    | complex
    | None
    | torch.dtype
    | torch.device
    | torch.memory_format
    | torch.layout
    | type(Ellipsis)
    | slice
)
