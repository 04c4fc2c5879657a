"""The record of an accelerated model: all that makes it again on the same machine without timing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.runtime.dense.kinds import execution_names, is_exact
from microglia.runtime.precisions import precision_names
from microglia.runtime.report import AccelerationReport, LayerChoice, is_dense

DRAWN = ("float16", "bfloat16", "float32", "float64")
"""Types of inputs whose values are not written: a file holds no image of its user. They are drawn anew."""
WRITTEN = ("bool", "uint8", "int8", "int16", "int32", "int64")
"""Types of inputs that are written with their values, because an index or a mask must be valid."""
LARGEST = 2**28
"""Elements of the inputs that a file may ask for: a gigabyte in float32."""
LOWERED = "bf16 "
"""Beginning of the names of the dense executions in bfloat16."""
PLANS = ("sparse", "dense, layer by layer")
"""Beginnings of the names of whole models that have an execution for each layer."""


@dataclass(frozen=True)
class Record:
    """The choices of `accelerate`, and all that they depend on.

    Attributes:
        report: Choice for each layer and for the whole model, with all times.
        machine: The machine of the timing, as `timing_cache.machine` describes it.
        against: The dense executions of the comparison.
        example: The example inputs as JSON: shapes and types, and the values of whole numbers.
        ranges: The range of each value of the graph, where a precision is calibrated.
    """

    report: AccelerationReport
    machine: dict[str, Any]
    against: tuple[str, ...]
    example: Any
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def by_layer(self) -> bool:
        """Whether each layer has an execution of its own."""
        return self.report.chosen.startswith(PLANS)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, JSON-ready."""
        return asdict(self)

    def inputs(self, device: torch.device | str = "cpu") -> Example:
        """Returns inputs of the example's shapes and types; floating-point values are drawn anew, always the same.

        Raises:
            MicrogliaError: The example is damaged or asks for too many elements.
        """
        try:
            args, kwargs = _Reader().read(self.example)
            example = Example(tuple(args), dict(kwargs))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
            raise MicrogliaError(f"Its example inputs are damaged ({type(error).__name__}).") from error
        return example.map(lambda tensor: tensor.to(device))

    def elsewhere(self, machine: dict[str, Any]) -> list[str]:
        """Returns the properties in which a machine differs from that of the timing; the times hold only where none does."""
        now = json.loads(json.dumps(machine))
        return [key for key in dict.fromkeys((*self.machine, *now)) if self.machine.get(key) != now.get(key)]


def record_of(
    report: AccelerationReport,
    machine: dict[str, Any],
    against: Sequence[str],
    example: Example,
    ranges: dict[str, tuple[float, float]] | None = None,
) -> Record | str:
    """Returns the record of an accelerated model, or the reason why no file can hold it."""
    if any(tensor.device.type != "cpu" for tensor in example.tensors):
        return "choices on a GPU are not kept"
    try:
        written = _write((example.args, example.kwargs))
    except TypeError as error:
        return str(error)
    return Record(report, json.loads(json.dumps(machine)), tuple(against), written, ranges or {})


def read_record(text: str) -> Record:
    """Returns a record from JSON, checked; it builds and imports nothing that the text names.

    Raises:
        MicrogliaError: The text is no record, or it names an execution that nothing here knows.
    """
    try:
        record = TypeAdapter(Record).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise MicrogliaError(f"{'.'.join(map(str, first['loc'])) or 'It'} is damaged: {first['msg']}.") from error
    report = record.report
    for times, chosen in [(report.times, report.chosen), *((layer.times, layer.chosen) for layer in report.layers)]:
        if chosen not in times or not all(math.isfinite(time) and time > 0 for time in times.values()):
            raise MicrogliaError(f"The choice {chosen[:80]!r} has no time.")
    if not all(math.isfinite(number) for pair in record.ranges.values() for number in pair):
        raise MicrogliaError("A range of the values is not finite.")
    known = report.precision in precision_names() and report.best_dense in report.times and all(map(_has_dense, report.layers))
    if not known or record.machine.keys() < {"level", "threads"}:
        raise MicrogliaError("It lacks a dense execution, a precision or a machine.")
    execution_names(record.against)
    if not record.by_layer:
        name = report.chosen.removeprefix(LOWERED)
        if execution_names(name) != (name,) or not is_exact(name):
            raise MicrogliaError(f"The chosen execution {name!r} is not one that computes with the weights as they are.")
    return record


def _has_dense(layer: LayerChoice) -> bool:
    return any(map(is_dense, layer.times))


def _write(value: Any) -> Any:
    """Returns a tree of inputs as JSON.

    Raises:
        TypeError: It holds another type; the text is for the reader.
    """
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        if kind not in DRAWN + WRITTEN:
            raise TypeError(f"its example holds a tensor of {kind}")
        content = {} if kind in DRAWN else {"values": value.flatten().tolist()}
        return {"tensor": {"dtype": kind, "shape": list(value.shape), **content}}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_write(item) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _write(item) for key, item in value.items()}}
    if value is None or (isinstance(value, bool | int | float | str) and type(value) in (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"its example holds a {type(value).__name__}")


class _Reader:
    """Makes inputs of their JSON, up to `LARGEST` elements together."""

    def __init__(self) -> None:
        self.generator, self.left = torch.Generator().manual_seed(0), LARGEST

    def read(self, written: Any) -> Any:
        ((kind, content),) = written.items()
        if kind == "value":
            return content
        if kind == "dict":
            return {key: self.read(item) for key, item in content.items()}
        if kind in ("list", "tuple"):
            return (list if kind == "list" else tuple)(self.read(item) for item in content)
        shape, dtype = [int(size) for size in content["shape"]], content["dtype"]
        self.left -= math.prod(shape)
        if kind != "tensor" or dtype not in DRAWN + WRITTEN or min(shape, default=0) < 0 or self.left < 0:
            raise ValueError(f"no tensor of {str(dtype)[:20]} and {shape}")
        if dtype in WRITTEN:
            return torch.tensor(content["values"], dtype=getattr(torch, dtype)).reshape(shape)
        return torch.randn(shape, generator=self.generator).to(getattr(torch, dtype))
