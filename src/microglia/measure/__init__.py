"""Measure a model: parameters, multiply-accumulates, time and bytes; one counter each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from microglia.core.batch import Example
from microglia.core.shown import html_table
from microglia.core.timing import Timing, time_interleaved
from microglia.measure.latency import LatencyReport, measure_latency
from microglia.measure.macs import Macs, count_macs
from microglia.measure.parameters import Parameters, count_parameters
from microglia.measure.size import Bytes, bytes_on_disk
from microglia.runtime.accelerated import Accelerated
from microglia.runtime.dense.execution import bind, executions

__all__ = [
    "Bytes",
    "LatencyReport",
    "Macs",
    "Measurement",
    "Parameters",
    "Timing",
    "bytes_on_disk",
    "count_macs",
    "count_parameters",
    "executions",
    "measure",
    "measure_latency",
    "time_interleaved",
]


@dataclass(frozen=True)
class Measurement:
    """All that is measured of one model.

    Attributes:
        parameters: Parameters, and those kept.
        macs: Multiply-accumulates of one sample.
        bytes: Size on disk.
        latency: Times of the example batch under the model name ``"model"``; None if latency was not measured.
    """

    parameters: Parameters
    macs: Macs
    bytes: Bytes
    latency: LatencyReport | None

    def __repr__(self) -> str:
        kept = f"{self.parameters.all:,} parameters, density {self.parameters.density:.4g}"
        time = f", {self.latency.fastest}" if self.latency else ""
        return f"Measurement({kept}, {self.macs.total:,} MACs, {self.bytes.raw:,} bytes ({self.bytes.zipped:,} zipped){time})"

    def _repr_html_(self) -> str:
        rows = [
            ("parameters", self.parameters.all),
            ("prunable weights kept", f"{self.parameters.kept:,} of {self.parameters.prunable:,}"),
            ("MACs", self.macs.total),
            ("MACs of kept weights", self.macs.effective),
            ("bytes", self.bytes.raw),
            ("bytes, zipped", self.bytes.zipped),
        ]
        times = self.latency._repr_html_() if self.latency else ""
        return html_table("Measurement", ("what", "value"), rows) + times

    def to_dict(self) -> dict[str, Any]:
        """Returns every number, JSON-ready."""
        return {
            "parameters": self.parameters.to_dict(),
            "macs": self.macs.to_dict(),
            "bytes": self.bytes.to_dict(),
            "latency": self.latency.to_dict() if self.latency else None,
        }


def measure(
    model: nn.Module,
    example_inputs: Any,
    *,
    latency: bool = True,
    executions: str | Sequence[str] = "all",
    layers: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> Measurement:
    """Measures a model, masked or folded, and leaves it bit for bit unchanged.

    Args:
        model: Any module with at least one linear or convolution layer. An accelerated one is counted as the model that was
            accelerated, and timed as ``accelerated`` beside its dense executions if it takes these inputs.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments. MACs are counted for one
            sample, time for the batch as given.
        latency: False leaves the time out, which takes longest; see `measure_latency` to compare models.
        executions: Ways to run it, see `measure_latency`.
        layers: Selectors of the layers that count as prunable.
        exclude: Selectors of the layers that do not count as prunable.

    Raises:
        SelectorError: A selector matches no layer, or no layer remains.
        MicrogliaError: The model does not run on these inputs or cannot be measured.
    """
    ready = {}
    if isinstance(model, Accelerated):
        example = Example.of(example_inputs)
        if model.takes(*example.args, **example.kwargs):
            ready = {"model": {"accelerated": bind(model, example)}}
        model = model.dense
    return Measurement(
        parameters=count_parameters(model, layers, exclude),
        macs=count_macs(model, example_inputs),
        bytes=bytes_on_disk(model),
        latency=measure_latency({"model": model}, example_inputs, executions=executions, ready=ready) if latency else None,
    )
