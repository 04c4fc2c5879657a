"""Other engines as executions: ONNX Runtime, OpenVINO, and OpenVINO in int8, registered like the dense ones of PyTorch.

Each converts the model for the shapes of the example alone, which is what an engine is fastest with, and runs on the CPU
with as many threads as PyTorch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from microglia.core.batch import Example
from microglia.core.errors import ExportError
from microglia.core.running import run
from microglia.export.exported import Exported
from microglia.export.int8 import ROUNDED, Int8, quantize
from microglia.export.onnx import open_onnx, to_onnx
from microglia.export.openvino import open_openvino
from microglia.runtime.dense.kinds import ExecutionKind, register_execution

_files: WeakKeyDictionary[nn.Module, tuple[tempfile.TemporaryDirectory[str], Path]] = WeakKeyDictionary()
"""Model -> its ONNX file, deleted with it. The engines of one model share the file, because the conversion takes longest."""


def onnxruntime(model: nn.Module, example: Example) -> Exported:
    """Returns a model in ONNX Runtime, for inputs of the example's shapes.

    Raises:
        MicrogliaError: The example is not on the CPU, or the model cannot be converted.
    """
    return _opened(model, example, open_onnx)


def openvino(model: nn.Module, example: Example) -> Exported:
    """Returns a model in OpenVINO, for inputs of the example's shapes.

    Raises:
        MicrogliaError: The example is not on the CPU, or the model cannot be converted.
    """
    return _opened(model, example, open_openvino)


def openvino_int8(model: nn.Module, example: Example) -> Exported:
    """Returns a model in OpenVINO in int8, calibrated on the example alone: for its time, not for its predictions.

    Raises:
        MicrogliaError: The example is not on the CPU, or the model cannot be converted or quantized.
    """
    import openvino

    def rounded(file: Path) -> Exported:
        return open_openvino(quantize(openvino.Core().read_model(file), Int8([example], correct=False))[0])

    return _opened(model, example, rounded)


def _opened(model: nn.Module, example: Example, opener: Callable[[Path], Exported]) -> Exported:
    """Returns the model's file in an engine, with outputs in the model's own structure."""
    structure = outputs_of(model, example)
    opened = opener(_file(model, example))
    opened.structure = structure
    return opened


def _file(model: nn.Module, example: Example) -> Path:
    """Returns the model as an ONNX file for the example's shapes.

    An execution is prepared on a copy of its own that nobody changes (`runners`), so the file stays true.
    """
    if model not in _files:
        folder = tempfile.TemporaryDirectory()
        _files[model] = folder, to_onnx(model, example, Path(folder.name) / "model.onnx", dynamic=())
    return _files[model][1]


def outputs_of(model: nn.Module, example: Example) -> Callable[[list[Tensor]], Any]:
    """Returns a function that makes the model's own outputs of the list of their tensors.

    Raises:
        MicrogliaError: The example is not on the CPU, or the model does not run on it.
    """
    if any(tensor.device.type != "cpu" for tensor in example.tensors):
        raise ExportError("this engine runs on the CPU.")
    with torch.no_grad():
        leaves, structure = tree_flatten(run(model, example.copied()))

    def restored(tensors: list[Tensor]) -> Any:
        left = iter(tensors)
        return tree_unflatten([next(left) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)

    return restored


register_execution("onnxruntime", ExecutionKind(onnxruntime, packages=("onnxruntime", "onnx", "onnxscript"), extra="export"))
register_execution("openvino", ExecutionKind(openvino, packages=("openvino", "onnx", "onnxscript"), extra="export"))
register_execution(
    "openvino-int8",
    ExecutionKind(
        openvino_int8, tolerance=ROUNDED, exact=False, packages=("nncf", "openvino", "onnx", "onnxscript"), extra="export"
    ),
)
