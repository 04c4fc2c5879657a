"""Steps of a forward pass, except convolutions, on maps that hold only some of their channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from microglia.dynamic.flow import Step
from microglia.dynamic.kernels import is_image
from microglia.graph.dims.nodes import concrete, shape_of


@dataclass(frozen=True)
class Channels:
    """A map that holds only some of its channels, the same for every input; the others are zero.

    Attributes:
        values: (batch, kept, *space).
        index: Kept channels, ascending, int64 (kept,).
        width: Number of all channels.
    """

    values: Tensor
    index: Tensor
    width: int

    def whole(self) -> Tensor:
        """Returns the map with its zero channels."""
        shape = (self.values.shape[0], self.width, *self.values.shape[2:])
        order = torch.channels_last if self.values.ndim == 4 else torch.contiguous_format  # the layout of convolutions
        full = torch.empty(shape, dtype=self.values.dtype, device=self.values.device, memory_format=order).zero_()
        return full.index_copy_(1, self.index, self.values)


Value = Tensor | Channels
Environment = dict[fx.Node, Any]


def whole(value: Any) -> Any:
    """Returns a value with all its channels."""
    return value.whole() if isinstance(value, Channels) else value


def compile_steps(steps: Sequence[Step]) -> dict[fx.Node, Callable[[Environment], Any]]:
    """Returns functions that compute steps other than convolutions from earlier values; a sum includes the ReLU behind it."""
    relus = {step.node: step.sources[0] for step in steps if _is_relu(step.node)}
    sums = {step.node for step in steps if step.kind == "add" and _is_sum(step.node)}
    inside = {source: node for node, source in relus.items() if source in sums and set(source.users) == {node}}
    works = {step.node: _compile(step, relu=step.node in inside) for step in steps}
    return works | {node: partial(_computed, source) for source, node in inside.items()}


def _computed(source: fx.Node, values: Environment) -> Any:
    return values[source]


def _compile(step: Step, *, relu: bool) -> Callable[[Environment], Any]:
    if step.kind == "keep":
        return _channelwise(step)
    if step.kind == "add" and _is_sum(step.node):
        return _sum(step, relu=relu)
    if step.kind == "cat":
        return _side_by_side(step)
    return _padded(step) if step.kind == "pad" else _plain(step)


def _sum(step: Step, *, relu: bool) -> Callable[[Environment], Any]:
    left, right = step.sources

    def work(values: Environment) -> Any:
        a, b = values[left], values[right]
        if isinstance(a, Channels):
            a, b = (a.whole(), b) if isinstance(b, Channels) else (b, a)
        if isinstance(b, Channels):
            return _scattered(a, b, relu=relu)
        return (a + b).relu_() if relu else a + b

    return work


def _scattered(a: Tensor, b: Channels, *, relu: bool) -> Tensor:
    """Returns the sum of a whole map and a map with only some channels, and its ReLU if that follows."""
    if is_image(a):
        return torch.ops.microglia.add_rows(a, b.values, b.index, relu)  # type: ignore[no-any-return]
    total = a.index_add(1, b.index, b.values)
    return total.relu_() if relu else total


def _side_by_side(step: Step) -> Callable[[Environment], Any]:
    widths = [shape_of(source)[1] for source in step.sources]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    run = _plain(step)

    def work(values: Environment) -> Any:
        parts = [values[source] for source in step.sources]
        if not any(isinstance(part, Channels) for part in parts):
            return run(values)
        maps = [part.values if isinstance(part, Channels) else part for part in parts]
        indices = [
            part.index if isinstance(part, Channels) else torch.arange(part.shape[1], device=part.device) for part in parts
        ]
        placed = torch.cat([index + start for index, start in zip(indices, starts, strict=True)])
        return Channels(torch.cat(maps, 1), placed, sum(widths))

    return work


def _padded(step: Step) -> Callable[[Environment], Any]:
    run, (source,), (before, after) = _plain(step), step.sources, step.amount

    def work(values: Environment) -> Any:
        x = values[source]
        return Channels(x.values, x.index + before, x.width + before + after) if isinstance(x, Channels) else run(values)

    return work


def _channelwise(step: Step) -> Callable[[Environment], Any]:
    run, source = _plain(step), step.sources[0]

    def work(values: Environment) -> Any:
        x = values[source]
        if not isinstance(x, Channels):
            return run(values)
        out = run(values, x.values) if len(x.index) else run(values)[:, :0]  # operators on no channels may fail
        return Channels(out, x.index, x.width)

    return work


def _plain(step: Step) -> Callable[..., Any]:
    """Returns a function that calls the operator itself, on maps with all their channels or on a given one."""
    node = step.node
    target: Any = node.target

    def work(values: Environment, given: Tensor | None = None) -> Any:
        def value(n: fx.Node) -> Any:
            if given is not None and n is step.sources[0]:
                return given
            return whole(values[n]) if n in values else concrete(n.meta["val"])

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
        return target(*args, **kwargs)

    return work


def _is_relu(node: fx.Node) -> bool:
    return str(node.target) in ("aten.relu.default", "aten.relu_.default")


def _is_sum(node: fx.Node) -> bool:
    scaled = any(v not in (1, None) for v in node.kwargs.values()) or len(node.args) != 2
    return str(node.target).startswith("aten.add") and not scaled
