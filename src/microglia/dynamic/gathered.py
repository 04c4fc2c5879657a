"""Executing a gated model so that only what an input needs is computed.

Between a gate and the next convolution a map holds the kept channels alone; the convolution gathers the columns of its weight
that arrive and the rows its own gate keeps, and runs dense on these. A residual sum scatters them into the full width again.
Spec, section 7.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from microglia.core.errors import MicrogliaError
from microglia.dynamic.flow import Convolution, Flow, Step
from microglia.dynamic.gates import Gate, detach_gates, gate_plan, gates_of
from microglia.dynamic.kernels import prepacked, run_depthwise, run_part, silent
from microglia.graph.trace import concrete, shape_of
from microglia.measure.running import twin

AT_ONCE = 10_000
"""Kernels from which on both sides of a weight are gathered in one pass."""


@dataclass(frozen=True)
class Channels:
    """A map of one input that holds some channels; the others are zero.

    Attributes:
        values: (1, kept, *space).
        index: Which channels, ascending, int64 (kept,).
        width: Of how many.
    """

    values: Tensor
    index: Tensor
    width: int

    def whole(self) -> Tensor:
        """Returns the map with its zeros."""
        full = self.values.new_zeros(self.values.shape[0], self.width, *self.values.shape[2:])
        return full.index_copy_(1, self.index, self.values)


Value = Tensor | Channels
Environment = dict[fx.Node, Any]


def whole(value: Any) -> Any:
    """Returns a value with all its channels."""
    return value.whole() if isinstance(value, Channels) else value


class Gathered:
    """A gated model, compiled into steps that compute what each input needs; equal to the masked model's outputs.

    Example:
        >>> fast = Gathered(model, example)                   # doctest: +SKIP
        >>> logits = fast(images)                             # doctest: +SKIP

    Args:
        model: A gated model in evaluation mode; its weights of this moment are taken.
        example_inputs: One input.

    Attributes:
        macs: Multiply-accumulates of the last call, heads included, all inputs together.
        limits: Layer -> fraction of its products above which it runs whole and is masked, for that is faster (see `tune`); no
            entry: it is always gathered.

    Raises:
        MicrogliaError: The model has no gates.
        TraceError: It cannot be traced.
    """

    def __init__(self, model: nn.Module, example_inputs: Tensor) -> None:
        if gate_plan(model) is None:
            raise MicrogliaError(f"{type(model).__name__} has no gates: prune it with the method 'ftwt' first.")
        own = twin(model)
        self._gates = gates_of(own)
        plain = detach_gates(own).eval()
        self.flow = Flow(plain, example_inputs)
        self.macs = 0
        self.limits: dict[str, float] = {}
        self._packed: dict[str, Callable[[Tensor], Tensor]] = {}
        self._last_use = _last_uses(self.flow)
        self._inputs = [n for n in self.flow.trace.graph.nodes if n.name in self.flow.trace.inputs]
        self._constants = {
            n: self.flow.trace.tensors[self.flow.trace.name_of[n.name]].detach()
            for n in self.flow.trace.graph.nodes
            if n.op == "placeholder" and n.name in self.flow.trace.name_of
        }
        self._works = {step.node: self._compile(step) for step in self.flow.steps}
        self._result = next(n for n in self.flow.trace.graph.nodes if n.op == "output").args[0]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Any:
        """Returns the model's output; of several inputs each goes its own way."""
        self.macs = 0
        if len(x) == 1:
            return self._one(x)
        parts = [self._one(x[i : i + 1]) for i in range(len(x))]
        if not isinstance(parts[0], Tensor):
            raise MicrogliaError("Batches go through the gathered execution where the model returns one tensor.")
        return torch.cat(parts)

    def _one(self, x: Tensor) -> Any:
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        values: Environment = {**self._constants, self._inputs[0]: x}
        for step in self.flow.steps:
            values[step.node] = self._works[step.node](values)
            for node in self._last_use.get(step.node, ()):
                values.pop(node, None)
        return fx.node.map_arg(self._unwrapped(), lambda n: whole(values[n]))

    def _unwrapped(self) -> Any:
        results = self._result
        alone = self.flow.trace.out_spec.num_leaves == 1 and isinstance(results, tuple | list)
        return results[0] if alone else results  # type: ignore[index]

    # ------------------------------------------------------------------------------------------------------ compiling
    def _compile(self, step: Step) -> Callable[[Environment], Any]:
        """Returns what computes a step's value from those before it."""
        if step.convolution is not None:
            return self._convolution(step, step.convolution)
        first = step.sources[0] if step.sources else None
        if step.kind == "keep":
            return _channelwise(step, first)
        if step.kind == "add" and _is_sum(step.node):
            return _sum(step)
        if step.kind == "cat":
            return _side_by_side(step)
        if step.kind == "pad":
            return _padded(step)
        return _plain(step)

    def _convolution(self, step: Step, c: Convolution) -> Callable[[Environment], Any]:
        source, gate = step.sources[0], self._gates.get(c.layer)
        area = math.prod(shape_of(step.node)[2:]) * c.weight[0, 0].numel()  # products of one kernel
        products = c.outputs * c.weight.shape[1]

        def ungated(values: Environment) -> Value:
            x = values[source]
            columns = x.index if isinstance(x, Channels) and c.groups == 1 else None
            if columns is None or len(columns) * c.outputs > self._limit(c) * products:
                self.macs += area * products
                return self._whole(c, whole(x))
            self.macs += area * c.outputs * len(columns)
            return run_part(x.values, c, None, columns) if len(columns) else silent(c, x.values, torch.arange(c.outputs))

        def gated(values: Environment) -> Value:
            assert gate is not None
            x = values[source]
            mask = gate.decide(gate.logits(self._embed(gate, x)))
            self.macs += gate.weight.numel()
            kept = mask[0].nonzero()[:, 0]
            arriving = len(x.index) if isinstance(x, Channels) else c.inputs
            if len(kept) * (1 if c.depthwise else arriving) > self._limit(c) * products:
                self.macs += area * products
                return self._whole(c, whole(x)).mul_(mask.to(c.weight.dtype).reshape(1, -1, *[1] * (c.weight.ndim - 2)))
            return self._depthwise(c, x, kept, area) if c.depthwise else self._gather(c, x, kept, area)

        return ungated if gate is None else gated

    def _limit(self, c: Convolution) -> float:
        return self.limits.get(c.layer, 1.0)

    def _whole(self, c: Convolution, x: Tensor) -> Tensor:
        if c.layer not in self._packed:
            self._packed[c.layer] = prepacked(c, x)
        return self._packed[c.layer](x)

    def _embed(self, gate: Gate, x: Value) -> Tensor:
        """Returns what a head sees: channels that did not arrive are pooled to 0."""
        if not isinstance(x, Channels):
            return gate.embed(x)
        space = x.values.flatten(2)
        pooled = space.mean(2) if gate.pool == "avg" else space.amax(2)
        full = pooled.new_zeros(1, x.width).index_copy_(1, x.index, pooled)
        return full.softmax(1) if gate.softmax else full

    def _gather(self, c: Convolution, x: Value, kept: Tensor, area: int) -> Channels:
        columns = x.index if isinstance(x, Channels) else None
        arriving = x.values if isinstance(x, Channels) else x
        self.macs += area * len(kept) * arriving.shape[1]
        nothing = not len(kept) or not arriving.shape[1]
        out = silent(c, arriving, kept) if nothing else run_part(arriving, c, kept, columns)
        return Channels(out, kept, c.outputs)

    def _depthwise(self, c: Convolution, x: Value, kept: Tensor, area: int) -> Channels:
        """Filters whose input did not arrive are constant, not zero."""
        if isinstance(x, Channels):
            places = torch.full((x.width,), -1).scatter_(0, x.index, torch.arange(len(x.index)))[kept]
            present = (places >= 0).nonzero()[:, 0]
            arriving = x.values.index_select(1, places[present])
        else:
            present, arriving = torch.arange(len(kept)), x.index_select(1, kept)
        rows = kept[present]
        self.macs += area * len(rows)
        if len(rows) == len(kept) > 0:
            return Channels(run_depthwise(arriving, c, rows), kept, c.outputs)
        out = silent(c, arriving, kept)
        if len(rows):
            out.index_copy_(1, present, run_depthwise(arriving, c, rows))
        return Channels(out, kept, c.outputs)


def _sum(step: Step) -> Callable[[Environment], Any]:
    left, right = step.sources

    def work(values: Environment) -> Tensor:
        a, b = values[left], values[right]
        if isinstance(a, Channels):
            a, b = (a.whole(), b) if isinstance(b, Channels) else (b, a)
        if isinstance(b, Channels):
            return a.index_add(1, b.index, b.values)  # type: ignore[no-any-return]
        return a + b  # type: ignore[no-any-return]

    return work


def _side_by_side(step: Step) -> Callable[[Environment], Any]:
    widths = [shape_of(source)[1] for source in step.sources]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    run = _plain(step)

    def work(values: Environment) -> Any:
        parts = [values[source] for source in step.sources]
        if not any(isinstance(part, Channels) for part in parts):
            return run(values)
        maps = [part.values if isinstance(part, Channels) else part for part in parts]
        indices = [part.index if isinstance(part, Channels) else torch.arange(part.shape[1]) for part in parts]
        placed = torch.cat([index + start for index, start in zip(indices, starts, strict=True)])
        return Channels(torch.cat(maps, 1), placed, sum(widths))

    return work


def _padded(step: Step) -> Callable[[Environment], Any]:
    run, (source,), (before, after) = _plain(step), step.sources, step.amount

    def work(values: Environment) -> Any:
        x = values[source]
        return Channels(x.values, x.index + before, x.width + before + after) if isinstance(x, Channels) else run(values)

    return work


def _channelwise(step: Step, source: fx.Node | None) -> Callable[[Environment], Any]:
    run = _plain(step)

    def work(values: Environment) -> Any:
        x = values[source]  # type: ignore[index]
        if not isinstance(x, Channels):
            return run(values)
        if not len(x.index):
            return run({**values, source: x.whole()})  # type: ignore[dict-item]
        out = run({**values, source: x.values})  # type: ignore[dict-item]
        return Channels(out, x.index, x.width)

    return work


def _plain(step: Step) -> Callable[[Environment], Any]:
    """Returns what calls the operator itself, on maps with all their channels."""
    node = step.node
    target: Any = node.target

    def value(n: fx.Node, values: Environment) -> Any:
        return whole(values[n]) if n in values else concrete(n.meta["val"])

    def work(values: Environment) -> Any:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: value(n, values))
        return target(*args, **kwargs)

    return work


def _is_sum(node: fx.Node) -> bool:
    scaled = any(v not in (1, None) for v in node.kwargs.values()) or len(node.args) != 2
    return str(node.target).startswith("aten.add") and not scaled


def _last_uses(flow: Flow) -> dict[fx.Node, list[fx.Node]]:
    """Returns step -> values that nobody reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for step in flow.steps:
        for source in step.node.all_input_nodes if step.convolution is None else step.sources:
            last[source] = step.node
    results = set(next(n for n in flow.trace.graph.nodes if n.op == "output").all_input_nodes)
    found: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        if source not in results and source.op != "placeholder":
            found.setdefault(node, []).append(source)
    return found
