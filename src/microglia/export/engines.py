"""Other engines as executions: ONNX Runtime, OpenVINO, and OpenVINO in int8, registered like the dense ones of PyTorch.

Each converts the model for the shapes of the example alone, which is what an engine is fastest with, and runs on the CPU
with as many threads as PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.core.running import run
from microglia.export._temp import onnx_bytes, to_openvino
from microglia.export.int8 import quantize
from microglia.export.sessions import Session, onnxruntime_session, openvino_session
from microglia.runtime.dense.kinds import ExecutionKind, register_execution

if TYPE_CHECKING:
    from openvino import Model as OpenVinoModel

ROUNDED = 0.5
"""How far outputs of int8 may be from the model's, against the largest: it says that the same network ran, no more. With
random weights, calibrated on one input of noise, ResNet-50 was measured to differ by XX %."""


def onnxruntime(model: nn.Module, example: Example) -> Session:
    """Returns a model in ONNX Runtime, for inputs of the example's shapes.

    Raises:
        MicrogliaError: It is not on the CPU or cannot be converted.
    """
    outputs = _outputs(model, example)
    return onnxruntime_session(onnx_bytes(model, example), outputs)


def openvino(model: nn.Module, example: Example) -> Session:
    """Returns a model in OpenVINO, for inputs of the example's shapes.

    Raises:
        MicrogliaError: It is not on the CPU or cannot be converted.
    """
    outputs = _outputs(model, example)
    return openvino_session(static_openvino(model, example), outputs)


def openvino_int8(model: nn.Module, example: Example) -> Session:
    """Returns a model in OpenVINO in int8, calibrated on the example alone: for its time, not for its predictions.

    Raises:
        MicrogliaError: It is not on the CPU, cannot be converted, or NNCF cannot quantize it.
    """
    outputs = _outputs(model, example)
    small, _ = quantize(static_openvino(model, example), example, [example.tensors])
    return openvino_session(small, outputs)


def static_openvino(model: nn.Module, example: Example) -> OpenVinoModel:
    """Returns a model converted for OpenVINO, for inputs of the example's shapes alone."""
    import openvino

    converted = to_openvino(model, example)
    shapes = [openvino.PartialShape(list(tensor.shape)) for tensor in example.tensors]
    converted.reshape(dict(zip(converted.inputs, shapes, strict=True)))
    return converted


def _outputs(model: nn.Module, example: Example) -> Any:
    """Returns what the model says of the example, for the structure.

    Raises:
        MicrogliaError: The example is not on the CPU.
    """
    if any(tensor.device.type != "cpu" for tensor in example.tensors):
        raise MicrogliaError("this engine runs on the CPU.")
    with torch.no_grad():
        return run(model, example.copied())


register_execution("onnxruntime", ExecutionKind(onnxruntime, packages=("onnxruntime", "onnxscript"), extra="export"))
register_execution("openvino", ExecutionKind(openvino, packages=("openvino",), extra="export"))
register_execution(
    "openvino-int8",
    ExecutionKind(openvino_int8, tolerance=ROUNDED, exact=False, packages=("openvino", "nncf"), extra="export"),
)
