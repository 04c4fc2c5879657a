"""Training: the operators of a traced graph that read a module's mode, and code of a model that runs in one mode only.

A graph no longer contains the model's own code, which reads `self.training`. The traces of both modes show its effect. If they
differ only in an argument, such as that of dropout, the graph reads it from the module. If they differ in more, the model needs
a graph for each mode.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from microglia.core.modes import modes_kept
from microglia.graph.cutting.modules import issuer
from microglia.graph.dims.nodes import named_arguments, operator_name
from microglia.graph.dims.trace import CHECKS, Trace

FLAGS = {
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), "train"),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), "train"),
    **dict.fromkeys(("batch_norm", "rrelu"), "training"),
    "instance_norm": "use_input_stats",
}
"""Operator -> its argument for the training mode."""

COUNTER = ".num_batches_tracked"
"""Suffix of the name of the buffer in which a batch norm counts its batches."""


@dataclass(frozen=True)
class Mode:
    """The module whose mode an operator follows.

    Attributes:
        path: Path of the module in the graph.
        counter: Name of the buffer in which a batch norm counts its batches, if it does.
        momentum: Momentum of such a batch norm; None for the mean over all batches.
    """

    path: str
    counter: str | None = None
    momentum: float | None = None

    @property
    def flag(self) -> str:
        """Name of the attribute that holds the mode."""
        return f"{self.path}.training".lstrip(".")


def batch_norm(
    x: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    statistics: tuple[Tensor, Tensor, Tensor],
    *,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Returns the output of a batch norm of torch.nn, which counts its training batches.

    Args:
        x: Input, (N, C, ...).
        affine: Weight and bias, each (C,) or None.
        statistics: Running mean and variance, each (C,), and the number of batches seen.
        training: Whether to use the batch's own statistics and update the running ones.
        momentum: Weight of the newest batch; None for the mean over all batches.
        eps: Constant added to the variance.
    """
    mean, variance, batches = statistics
    if training:
        batches.add_(1)
        momentum = 1.0 / float(batches) if momentum is None else momentum
    return F.batch_norm(x, mean, variance, *affine, training, momentum or 0.0, eps)


def modes_of(model: nn.Module) -> dict[bool, dict[str, bool]]:
    """Returns the mode of each module, by path, after ``model.train(mode)``, which a class may override; restores the modes."""
    found = {}
    with modes_kept(model, through_train=True):
        for mode in (True, False):
            model.train(mode)
            found[mode] = {path: module.training for path, module in model.named_modules(remove_duplicate=False)}
    return found


def exceptions(modes: Mapping[bool, Mapping[str, bool]], path: str = "") -> dict[bool, tuple[str, ...]]:
    """Returns for each mode the modules of a part, by their path in it, that stay in the other mode."""
    prefix = f"{path}." if path else ""
    return {
        mode: tuple(p.removeprefix(prefix) for p, own in by_path.items() if p.startswith(prefix) and own != mode)
        for mode, by_path in modes.items()
    }


@contextmanager
def averaging(model: nn.Module) -> Iterator[None]:
    """Gives a momentum to batch norms that average over all batches, because a trace cannot follow their counter."""
    changed = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.momentum is None]
    for module in changed:
        module.momentum = 0.1
    try:
        yield
    finally:
        for module in changed:
            module.momentum = None


def drew(run: Callable[[], Any]) -> tuple[Any, bool]:
    """Returns a function's result, and whether it drew random numbers of Python or NumPy, which no graph holds."""
    python, state = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002 - what the model draws from
    try:
        result = run()
        after = np.random.get_state(legacy=False)  # noqa: NPY002
        drawn = random.getstate() != python or not _same(after, state)
    finally:
        random.setstate(python)
        np.random.set_state(state)  # noqa: NPY002
    return result, drawn


def _same(one: Any, other: Any) -> bool:
    """Tells whether two states of NumPy's generator, mappings of arrays and plain values, are equal."""
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return bool(np.array_equal(one, other))


# ------------------------------------------------------------------------------------------------------------- comparing
def own_code(evaluation: Trace, training: Trace) -> tuple[str, ...]:
    """Returns the modules, by path, whose code differs in training beyond the operators' mode arguments.

    The result is empty if one graph serves both modes.
    """
    if _written(evaluation) == _written(training):
        return ()

    def signatures(trace: Trace) -> dict[str, list[str]]:
        return {path: [_signature(node, {}) for node in nodes] for path, nodes in steps(trace).items()}

    before, after = signatures(evaluation), signatures(training)
    found = [path for path in dict.fromkeys((*before, *after)) if before.get(path) != after.get(path)]
    return tuple(found) or ("",)


def steps(trace: Trace) -> dict[str, list[fx.Node]]:
    """Returns the operators of each module, in order, without checks, sizes and counters of batches."""
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for node in trace.graph.nodes:
        if node.op == "call_function" and operator_name(node) not in _BESIDE and counter_of(node, trace) is None:
            found[issuer(node)].append(node)
    return found


_BESIDE = (*CHECKS, "sym_size")


def counter_of(node: fx.Node, trace: Trace) -> str | None:
    """Returns the name of the buffer to which an operator adds a batch; None for every other operator."""
    source: Any = node
    while isinstance(source, fx.Node) and source.op == "call_function" and operator_name(source) == "add_":
        source = source.args[0]
    name = trace.name_of.get(source.name, "") if isinstance(source, fx.Node) and source is not node else ""
    return name if name.endswith(COUNTER) else None


def _written(trace: Trace) -> list[str]:
    """Returns a graph as text that is equal for both modes if they differ only in the operators' mode arguments."""
    place = {node: str(i) for i, node in enumerate(n for own in steps(trace).values() for n in own)}
    for node in trace.graph.nodes:
        if node.op == "placeholder":
            name = trace.name_of.get(node.name, node.name)
            place[node] = f"constant {tuple(node.meta['val'].shape)}" if name in trace.constants else name
        elif operator_name(node) == "sym_size":
            place[node] = "size"
    lines = [_signature(node, place) for node, where in place.items() if where.isdigit()]
    output = next(iter(reversed(trace.graph.nodes)))
    return [*lines, repr(fx.node.map_arg(output.args, lambda n: place.get(n, "?")))]  # type: ignore[arg-type,return-value]


def _signature(node: fx.Node, place: Mapping[fx.Node, str]) -> str:
    told = isinstance(node.target, torch._ops.OpOverload)
    given: dict[Any, Any] = named_arguments(node) if told else {**dict(enumerate(node.args)), **node.kwargs}
    left_out = (FLAGS.get(operator_name(node)), "momentum")
    given = {k: v for k, v in given.items() if k not in left_out}
    return f"{node.target} {fx.node.map_aggregate(given, lambda v: place.get(v, '') if isinstance(v, fx.Node) else v)}"


# -------------------------------------------------------------------------------------------------------------- following
def following(
    model: nn.Module, trace: Trace, other: Trace | None, modes: Mapping[bool, Mapping[str, bool]], *, training: bool = False
) -> dict[fx.Node, Mode]:
    """Returns the operators of a trace that follow the mode of a module: the module whose code calls them.

    Args:
        model: The traced model.
        trace: Trace in one mode.
        other: Trace in the other mode; without it every operator with a mode argument follows its module.
        modes: Modes of its modules after ``train(True)`` and ``train(False)``.
        training: The mode of the trace.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    homes = _homes(model, trace)
    theirs = steps(other) if other is not None else {}
    found = {}
    for path, nodes in steps(trace).items():
        module = modules.get(path)
        mine = [n for n in nodes if operator_name(n) in FLAGS]
        pairs = [n for n in theirs.get(path, []) if operator_name(n) in FLAGS]
        alike = [operator_name(n) for n in mine] == [operator_name(n) for n in pairs]
        for i, node in enumerate(mine):
            if module is None or _without_statistics(node, module):
                continue
            flags = {training: _flag(node), not training: _flag(pairs[i])} if alike else dict[bool, Any]()
            asks = flags == {m: modes[m][path] for m in modes} and (
                flags[True] != flags[False] or isinstance(module, _BatchNorm)
            )
            if other is None or type(module).__module__.startswith("torch.nn.") or asks:
                found[node] = _mode(node, module, homes[path], trace)
    return found


def _flag(node: fx.Node) -> Any:
    return named_arguments(node)[FLAGS[operator_name(node)]]


def _without_statistics(node: fx.Node, module: nn.Module) -> bool:
    """Tells whether a norm uses the statistics of its own input in both modes, or from now on in training."""
    a = named_arguments(node)
    return "running_mean" in a and (a["running_mean"] is None or not getattr(module, "track_running_stats", True))


def _mode(node: fx.Node, module: nn.Module, path: str, trace: Trace) -> Mode:
    counter = f"{path}{COUNTER}"
    counts = isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm) and counter in trace.tensors
    mean = named_arguments(node).get("running_mean")
    if counts and isinstance(mean, fx.Node) and trace.name_of.get(mean.name) == f"{path}.running_mean":
        return Mode(path, counter, module.momentum)  # type: ignore[arg-type]
    return Mode(path)


def _homes(model: nn.Module, trace: Trace) -> dict[str, str]:
    """Returns the path under which a graph holds each module, by every path: the path of its tensors, else the first."""
    used = {
        trace.name_of[n.name].rpartition(".")[0]
        for n in trace.graph.nodes
        if n.op == "placeholder" and n.users and n.name in trace.name_of
    }
    first: dict[int, str] = {}
    paths = [(path, id(module)) for path, module in model.named_modules(remove_duplicate=False)]
    for path, one in paths:
        if first.setdefault(one, path) not in used and path in used:
            first[one] = path
    return {path: first[one] for path, one in paths}


# ------------------------------------------------------------------------------------------------------------------ notes
def note(name: str, own: tuple[str, ...], model: nn.Module) -> list[str]:
    """Returns a note for the user about graphs for each mode: the code that does not follow a single module's mode."""
    shown = [f"{path} ({type(model.get_submodule(path)).__name__})" for path in own if path]
    if not shown:
        return []
    return [
        f"{name} has a graph of its own for training, for what {_listed(shown)} does there: this follows the mode of the whole "
        "graph, not that of one module put into another mode by hand."
    ]


def lost(name: str, model: nn.Module, why: str) -> str:
    """Returns a note that a model's own code for training could not be followed, with the modules."""
    asking = [f"{path or name} ({type(m).__name__})" for path, m in model.named_modules() if _asks(type(m))]
    whose = f"that of {_listed(asking)}" if asking else "what its modules do in training alone"
    return f"In training {name} runs this graph too, with batch norm and dropout told: its own code for training " \
           f"({whose}) {why}."  # fmt: skip


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _asks(kind: type) -> bool:
    """Tells whether a class or its base has code that reads its mode; classes of torch take it as argument."""
    codes = [
        function.__code__
        for base in kind.__mro__
        if not base.__module__.startswith("torch.")
        for function in vars(base).values()
        if hasattr(function, "__code__")
    ]
    return any("training" in code.co_names for code in codes)
