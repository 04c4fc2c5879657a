"""Tuning: each convolution is timed whole and in parts on this machine, and runs the faster way.

A layer gathers only below a measured fraction of its products. Above this fraction, running it whole and packed, then masking
the result, is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import Example
from microglia.core.running import folded_twin
from microglia.core.timing import time_interleaved
from microglia.dynamic.flow import Convolution
from microglia.dynamic.gathered import Gathered
from microglia.dynamic.kernels import prepacked, run_depthwise, run_part, settings_key
from microglia.graph.dims.nodes import shape_of
from microglia.runtime.dense.packing import pack

Call = Callable[[Tensor], Any]

FRACTIONS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Fractions of kept channels on each side that are timed."""


@dataclass(frozen=True)
class Crossover:
    """The measurements of one shape of convolution.

    Attributes:
        layers: Convolutions of this shape.
        shape: Shape of the weight.
        space: Spatial size of the input.
        whole: Milliseconds of the whole convolution, packed, with its mask.
        parts: Fraction of the products -> milliseconds gathered.
        limit: Interpolated largest fraction of the products at which gathering is faster; 0 for none.
    """

    layers: tuple[str, ...]
    shape: tuple[int, ...]
    space: tuple[int, ...]
    whole: float
    parts: dict[float, float]
    limit: float


def tune(gathered: Gathered, *, rounds: int = 7, seed: int = 0) -> list[Crossover]:
    """Sets the limits of a gathered model by timing, in place; returns the measurements, one entry for each shape."""
    alike: dict[tuple[Any, ...], list[tuple[Convolution, tuple[int, ...]]]] = {}
    for step in gathered.flow.convolutions.values():
        c = step.convolution
        assert c is not None
        if c.groups == 1 or c.depthwise:
            space = tuple(shape_of(step.sources[0])[2:])
            alike.setdefault(settings_key(c, space), []).append((c, space))
    generator = torch.Generator().manual_seed(seed)
    found = [_measure([c.layer for c, _ in same], *same[0], generator, rounds) for same in alike.values()]
    for crossover in found:
        gathered.limits.update(dict.fromkeys(crossover.layers, crossover.limit))
    return found


class Fastest:
    """A gated model in its fastest execution for inputs of a shape: gathered, or whole with masks.

    The first inputs of each shape are timed both ways. Usually gathering wins for few inputs, and masking for many inputs of
    different routes.

    Args:
        model: A gated model; its current weights are used.
        example_inputs: One batch of inputs.

    Attributes:
        times: Shape of the inputs -> execution -> milliseconds.
        chosen: Shape of the inputs -> name of the execution that runs them.
    """

    def __init__(self, model: nn.Module, example_inputs: Tensor) -> None:
        self.gathered = Gathered(model, example_inputs)
        if example_inputs.device.type == "cpu":
            tune(self.gathered)
        self.masked = folded_twin(model)
        self.times: dict[tuple[int, ...], dict[str, float]] = {}
        self.chosen: dict[tuple[int, ...], str] = {}
        self._calls: dict[tuple[int, ...], Call] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Any:
        """Returns the model's output."""
        shape = tuple(x.shape)
        if shape not in self._calls:
            self._choose(shape, x)
        return self._calls[shape](x)

    def _choose(self, shape: tuple[int, ...], x: Tensor) -> None:
        calls: dict[str, Call] = {"gathered": self.gathered, "masked": self.masked}
        if x.device.type == "cpu" and x.dtype == torch.float32:
            calls["masked packed"] = pack(self.masked, Example.of(x))
        timed = {name: (lambda call=call: call(x)) for name, call in calls.items()}
        times = time_interleaved(timed, rounds=7, warmup=2)  # type: ignore[arg-type]
        self.times[shape] = {name: time.median for name, time in times.items()}
        self.chosen[shape] = min(self.times[shape], key=self.times[shape].__getitem__)
        self._calls[shape] = calls[self.chosen[shape]]


@torch.no_grad()
def _measure(layers: list[str], c: Convolution, space: tuple[int, ...], generator: torch.Generator, rounds: int) -> Crossover:
    x = torch.randn(1, c.inputs, *space, generator=generator).to(c.weight.dtype)
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    run = prepacked(c, x)
    mask = torch.ones(1, c.outputs, *[1] * len(space), dtype=x.dtype)
    calls: dict[str, Any] = {"whole": lambda: run(x).mul_(mask)}
    for fraction in FRACTIONS:
        calls[str(fraction)] = _part(x, c, fraction, generator)
    times = time_interleaved(calls, rounds=rounds, warmup=2, min_round_seconds=0.002, seed=0)
    first = c.inputs <= 4  # nothing before it is gated
    parts = {f if first or c.depthwise else f * f: times[str(f)].median for f in FRACTIONS}
    whole = times["whole"].median
    return Crossover(tuple(layers), tuple(c.weight.shape), space, whole, parts, _limit(parts, whole))


def _part(x: Tensor, c: Convolution, fraction: float, generator: torch.Generator) -> Any:
    """Returns a gathered run with a random fraction of the channels; the first layer's input is always whole."""
    rows = _some(c.outputs, fraction, generator)
    if c.depthwise:
        given = x.index_select(1, rows)
        return lambda: run_depthwise(given, c, rows)
    if c.inputs <= 4:
        return lambda: run_part(x, c, rows, None)
    columns = _some(c.inputs, fraction, generator)
    given = x.index_select(1, columns)
    return lambda: run_part(given, c, rows, columns)


def _some(count: int, fraction: float, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[: max(1, round(fraction * count))].sort().values


def _limit(parts: dict[float, float], whole: float) -> float:
    """Returns the fraction at which the times of parts cross the whole's time, by linear interpolation."""
    before = (0.0, 0.0)
    for fraction, time in sorted(parts.items()):
        if time >= whole:
            if before == (0.0, 0.0):
                return 0.0
            share = (whole - before[1]) / (time - before[1])
            return before[0] + share * (fraction - before[0])
        before = (fraction, time)
    return 1.0
