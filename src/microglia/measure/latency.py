"""Measures time: all compared executions run interleaved in one process, against the best dense execution."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.core.registry import unknown_name
from microglia.core.shown import html_table
from microglia.core.timing import Timing, processor_name, time_interleaved
from microglia.runtime.dense.execution import executions as prepare_executions
from microglia.runtime.dense.kinds import execution_names, is_exact


@dataclass(frozen=True)
class LatencyReport:
    """Times of one batch through several models and executions, all measured interleaved.

    Attributes:
        timings: Model -> execution -> time of one batch.
        device: Name of the device.
        threads: CPU threads of PyTorch.
        batch: Samples in the batch.
        torch_version: Version of PyTorch.
        notes: Omitted executions, with the reasons.
    """

    timings: dict[str, dict[str, Timing]]
    device: str
    threads: int
    batch: int
    torch_version: str
    notes: tuple[str, ...] = ()

    def best(self, model: str) -> tuple[str, Timing]:
        """Returns the execution with the lowest median time for a model, and that time.

        One that rounds the weights, such as ``openvino-int8``, counts only where no other was timed.

        Raises:
            UnknownNameError: No model with this name was measured.
        """
        if model not in self.timings:
            raise unknown_name("measured model", model, self.timings)
        timings = self.timings[model]
        exact = {name: timing for name, timing in timings.items() if is_exact(name)}
        return min((exact or timings).items(), key=lambda item: item[1].median)

    def speedup(self, model: str, over: str) -> float:
        """Returns how many times faster ``model`` is than ``over``, comparing the best execution of each.

        Raises:
            UnknownNameError: No model with one of these names was measured.
        """
        return self.best(over)[1].median / self.best(model)[1].median

    @property
    def fastest(self) -> str:
        """The best execution of each model with its median time, as one line."""
        found = ((name, *self.best(name)) for name in self.timings)
        return ", ".join(f"{name} {timing.median:.4g} ms ({execution})" for name, execution, timing in found)

    def __repr__(self) -> str:
        return f"LatencyReport({self.fastest}; batch {self.batch}, {self.threads} thread(s), {self.device})"

    def _repr_html_(self) -> str:
        rows = [(name, execution, t.median) for name, times in self.timings.items() for execution, t in times.items()]
        return html_table(repr(self), ("model", "execution", "median, ms"), rows, self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, JSON-ready, with the name of each model's best execution."""
        return {**asdict(self), "notes": list(self.notes), "best": {name: self.best(name)[0] for name in self.timings}}


def measure_latency(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    executions: str | Sequence[str] = "all",
    ready: Mapping[str, Mapping[str, Callable[[], object]]] | None = None,
    rounds: int = 15,
    warmup: int = 3,
    min_round_seconds: float = 0.02,
    max_seconds: float = 60.0,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyReport:
    """Times models against each other, each in several executions, and leaves them unchanged.

    Args:
        models: Name -> model; all take the same inputs.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments, of the batch size to time.
        executions: Ways to run each model (see `microglia.measure.executions`): names, ``torch`` for PyTorch's own, or
            ``all`` for every exact one that is installed. One that does not work here is left out and named in the notes.
        ready: Name of a model -> further executions of it, by name, that are ready to be called.
        rounds: Rounds, as are the following arguments, of `time_interleaved`.
        warmup: Calls before the first round.
        min_round_seconds: Minimum time of one turn, in seconds.
        max_seconds: No further round starts after this time, in seconds.
        seed: Seed of the order.
        clock: Returns the time in seconds.

    Raises:
        UnknownNameError: An execution of an unknown name.
        MicrogliaError: No model, or none of the executions works for one of them.
    """
    notes: list[str] = []
    example = Example.of(example_inputs)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, model in models.items():
        own: list[str] = []
        prepared: dict[str, Callable[[], object]] = prepare_executions(model, example, executions, notes=own)
        notes += [f"{name}: {note}" for note in own]
        prepared = {**prepared, **(ready or {}).get(name, {})}
        if not prepared:
            raise MicrogliaError(f"None of {list(execution_names(executions))} works for the model {name!r}. {' '.join(own)}")
        calls.update({(name, kind): execution for kind, execution in prepared.items()})
    keys = {str(index): key for index, key in enumerate(calls)}
    times = time_interleaved(
        {index: calls[key] for index, key in keys.items()},
        rounds=rounds,
        warmup=warmup,
        min_round_seconds=min_round_seconds,
        max_seconds=max_seconds,
        seed=seed,
        clock=clock,
        title="measure",
    )
    timings: dict[str, dict[str, Timing]] = {name: {} for name in models}
    for index, (name, kind) in keys.items():
        timings[name][kind] = times[index]
    return LatencyReport(timings, _device(example), torch.get_num_threads(), example.batch, torch.__version__, tuple(notes))


def _device(example: Example) -> str:
    """Returns the name of the processor that holds the inputs."""
    device = next((tensor.device for tensor in example.tensors), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    return processor_name()
