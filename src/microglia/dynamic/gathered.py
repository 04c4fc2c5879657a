"""Execution of a gated model that computes only the channels that an input needs.

Between a gate and the next convolution a map holds only the kept channels. The convolution gathers the weight columns of
arriving channels and the rows that its own gate keeps, and runs dense on these. A residual sum scatters them into the full
width again. Inputs of a batch stay together while the gates keep the same channels for them. Spec, section 7.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from microglia.core.errors import MicrogliaError
from microglia.core.running import twin
from microglia.dynamic.flow import Convolution, Flow, Step
from microglia.dynamic.gate_plan import ACTIVATIONS
from microglia.dynamic.gates import Gate, detach_gates, gate_plan, gates_of, shift_of
from microglia.dynamic.kernels import choose_rows, prepacked, run_depthwise, run_part, silent
from microglia.dynamic.steps import Channels, Environment, Value, compile_steps, whole
from microglia.runtime import operators

Work = Callable[[Environment], Any]
Routed = Callable[[Environment, Tensor], Any]
"""Computes a step from earlier values and the output channels that its gate keeps, ascending."""


class Gathered:
    """A gated model, compiled into steps that compute what each input needs; equal to the masked model's outputs.

    Example:
        >>> fast = Gathered(model, example)                   # doctest: +SKIP
        >>> logits = fast(images)                             # doctest: +SKIP

    Args:
        model: A gated model; its current weights are used, in evaluation mode.
        example_inputs: One batch of inputs.

    Attributes:
        macs: Multiply-accumulates of convolutions and heads in the last call, all inputs together.
        limits: Layer -> fraction of its products above which it runs whole and is masked because that is faster (see `tune`). A
            layer without an entry is always gathered.

    Raises:
        MicrogliaError: The model has no gates, or takes more than one input.
        TraceError: It cannot be traced.
    """

    def __init__(self, model: nn.Module, example_inputs: Tensor) -> None:
        if gate_plan(model) is None:
            raise MicrogliaError(f"{type(model).__name__} has no gates: prune it with the method 'ftwt' first.")
        operators.level()  # the same operators decide from the first input on
        own = twin(model)
        self._gates = gates_of(own)
        self._shifts = {layer: shift_of(own, gate) for layer, gate in self._gates.items() if gate.boost}
        self.flow = Flow(detach_gates(own).eval(), example_inputs)
        self.macs = 0
        self.limits: dict[str, float] = {}
        graph, tensors, names = self.flow.trace.graph, self.flow.trace.tensors, self.flow.trace.name_of
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self._constants = {n: tensors[names[n.name]].detach() for n in placeholders if n.name in names}
        inputs = [n for n in placeholders if n.name in self.flow.trace.inputs]
        if len(inputs) != 1:
            raise MicrogliaError(
                f"The gathered execution is for models of one input; {type(model).__name__} has {len(inputs)}."
            )
        self._input = inputs[0]
        self._results = pytree.tree_leaves(next(n for n in reversed(graph.nodes) if n.op == "output").args[0])
        self._last_use = _last_uses(self.flow)
        self._packed: dict[str, Callable[[Tensor], Tensor]] = {}
        self._routed = {s.node: self._gated(s, s.convolution) for s in self._convolutions(gated=True)}
        self._works: dict[fx.Node, Work] = {s.node: self._ungated(s, s.convolution) for s in self._convolutions(gated=False)}
        self._works |= compile_steps([s for s in self.flow.steps if s.convolution is None])

    def _convolutions(self, *, gated: bool) -> list[Any]:
        return [s for layer, s in self.flow.convolutions.items() if (layer in self._gates) is gated]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Any:
        """Returns the model's output."""
        self.macs = 0
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        leaves = self._run({**self._constants, self._input: x}, 0, len(x))
        return pytree.tree_unflatten(leaves, self.flow.trace.out_spec)

    # ------------------------------------------------------------------------------------------------------- executing
    def _run(self, values: Environment, start: int, batch: int, kept: Tensor | None = None) -> list[Any]:
        """Returns the outputs of inputs that are together up to step ``start``, whose kept channels may be known."""
        for number in range(start, len(self.flow.steps)):
            step = self.flow.steps[number]
            routed = self._routed.get(step.node)
            if routed is None:
                values[step.node] = self._works[step.node](values)
            else:
                if kept is None:
                    found = self._choose(step, values, batch)
                    if found.dtype == torch.bool:
                        return self._split(values, number, found)
                    kept = found
                values[step.node], kept = routed(values, kept), None
            for node in self._last_use.get(step.node, ()):
                values.pop(node, None)
        return [whole(values[n]) if isinstance(n, fx.Node) else n for n in self._results]

    def _split(self, values: Environment, number: int, masks: Tensor) -> list[Any]:
        """Returns the outputs of inputs on different routes from here on; inputs of one route stay together."""
        ways, way = torch.unique(masks, dim=0, return_inverse=True)
        members = [(way == k).nonzero()[:, 0] for k in range(len(ways))]
        parts = [
            self._run(_taken(values, self._constants, index), number, len(index), mask.nonzero()[:, 0])
            for mask, index in zip(ways, members, strict=True)
        ]
        order = torch.cat(members).argsort()
        return [
            torch.cat(leaves).index_select(0, order) if isinstance(leaves[0], Tensor) else leaves[0]
            for leaves in zip(*parts, strict=True)
        ]

    def _choose(self, step: Step, values: Environment, batch: int) -> Tensor:
        """Returns the channels that all inputs keep, int64; if inputs differ, all masks, boolean (batch, outputs)."""
        assert step.convolution is not None
        gate = self._gates[step.convolution.layer]
        x = values[step.sources[0]]
        self.macs += gate.weight.numel() * batch
        if batch == 1:
            kept = choose_rows(gate, x.values, x.index) if isinstance(x, Channels) else choose_rows(gate, x, None)
            if kept is not None:
                return kept
        masks = gate.decide(gate.logits(_embed(gate, x)))
        return masks[0].nonzero()[:, 0] if batch == 1 or bool((masks == masks[0]).all()) else masks

    # ------------------------------------------------------------------------------------------------------- compiling
    def _ungated(self, step: Step, c: Convolution) -> Work:
        source = step.sources[0]

        def work(values: Environment) -> Value:
            x = values[source]
            columns = x.index if isinstance(x, Channels) and c.groups == 1 else None
            if columns is None or len(columns) > self._limit(c) * c.inputs:
                return self._whole(c, whole(x))
            if not len(columns):
                return silent(c, x.values, _all(c.outputs, x.values))
            out = run_part(x.values, c, None, columns)
            self.macs += _products(c, out, len(columns))
            return out

        return work

    def _gated(self, step: Step, c: Convolution) -> Routed:
        return self._boosted(step, c) if c.layer in self._shifts else self._chosen(step, c)

    def _chosen(self, step: Step, c: Convolution) -> Routed:
        """Compiles a layer that computes the filters that its gate keeps."""
        source = step.sources[0]

        def work(values: Environment, kept: Tensor) -> Value:
            x = values[source]
            arriving = len(x.index) if isinstance(x, Channels) else c.inputs
            share = len(kept) / c.outputs * (1 if c.depthwise else arriving / c.inputs)
            if share > self._limit(c):
                mask = c.weight.new_zeros(c.outputs).index_fill_(0, kept, 1)
                return self._whole(c, whole(x)).mul_(mask.reshape(-1, *[1] * (c.weight.ndim - 2)))
            return self._depthwise(c, x, kept) if c.depthwise else self._gather(c, x, kept)

        return work

    def _boosted(self, step: Step, c: Convolution) -> Routed:
        """Compiles a layer whose kept filters are multiplied by their saliency, between the norm and the activation."""
        gate, shift, activation = self._gates[c.layer], self._shifts[c.layer], ACTIVATIONS[c.activation]
        linear = self._chosen(step, replace(c, activation="identity"))

        def work(values: Environment, kept: Tensor) -> Value:
            logits = gate.logits(_embed(gate, values[step.sources[0]]))[:, kept]
            out = linear(values, kept)
            maps = out.values if isinstance(out, Channels) else out.index_select(1, kept)
            own = None if shift is None else shift[kept]
            maps = activation(gate.boosted(maps, logits, torch.ones_like(logits, dtype=torch.bool), own))
            return Channels(maps, kept, c.outputs)

        return work

    def _limit(self, c: Convolution) -> float:
        return self.limits.get(c.layer, 1.0)

    def _whole(self, c: Convolution, x: Tensor) -> Tensor:
        if c.layer not in self._packed:
            self._packed[c.layer] = prepacked(c, x)
        out = self._packed[c.layer](x)
        self.macs += _products(c, out, c.weight.shape[1])
        return out

    def _gather(self, c: Convolution, x: Value, kept: Tensor) -> Channels:
        columns = x.index if isinstance(x, Channels) else None
        arriving = x.values if isinstance(x, Channels) else x
        if not len(kept) or not arriving.shape[1]:
            return Channels(silent(c, arriving, kept), kept, c.outputs)
        out = run_part(arriving, c, kept, columns)
        self.macs += _products(c, out, arriving.shape[1])
        return Channels(out, kept, c.outputs)

    def _depthwise(self, c: Convolution, x: Value, kept: Tensor) -> Channels:
        """Compiles a depthwise layer; filters without an arriving input are constant, not zero."""
        if isinstance(x, Channels):
            places = torch.full((x.width,), -1, device=kept.device).scatter_(0, x.index, _all(len(x.index), kept))[kept]
            present = (places >= 0).nonzero()[:, 0]
            arriving = x.values.index_select(1, places[present])
        else:
            present, arriving = _all(len(kept), kept), x.index_select(1, kept)
        rows = kept[present]
        if not len(rows):
            return Channels(silent(c, arriving, kept), kept, c.outputs)
        computed = run_depthwise(arriving, c, rows)
        self.macs += _products(c, computed, 1)
        if len(rows) < len(kept):
            computed = silent(c, arriving, kept).index_copy_(1, present, computed)
        return Channels(computed, kept, c.outputs)


def _embed(gate: Gate, x: Value) -> Tensor:
    """Returns the input of a head, (batch, inputs); channels that did not arrive are pooled to 0."""
    if gate.static or not isinstance(x, Channels):
        return gate.embed(x.values if isinstance(x, Channels) else x)
    space = x.values.flatten(2)
    pooled = space.mean(2) if gate.pool == "avg" else space.amax(2)
    full = pooled.new_zeros(len(pooled), x.width).index_copy_(1, x.index, pooled)
    return full.softmax(1) if gate.softmax else full


def _taken(values: Environment, constants: Environment, index: Tensor) -> Environment:
    """Returns the values of some inputs of a batch."""

    def one(node: fx.Node, value: Any) -> Any:
        if node in constants:
            return value
        if not isinstance(value, Tensor | Channels):  # a size, which may depend on the batch
            size = node.meta.get("val")
            expression = size.node.expr if isinstance(size, torch.SymInt) else None
            return value if expression is None else int(expression.subs(dict.fromkeys(expression.free_symbols, len(index))))
        if isinstance(value, Channels):
            return replace(value, values=value.values.index_select(0, index))
        return value.index_select(0, index)

    return {node: one(node, value) for node, value in values.items()}


def _all(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)


def _products(c: Convolution, out: Tensor, columns: int) -> int:
    """Returns the number of products for an output from this number of input channels."""
    return out.numel() * columns * math.prod(c.weight.shape[2:])


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
