"""OpenVINO: converted from the ONNX file, which supports more models than OpenVINO's own reader of torch programs.

OpenVINO 2026.4 does not read the torch program of a Llama (an operator of lists remains) and loses free height and width of
images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.errors import ExportError
from microglia.core.optional import needs
from microglia.core.running import first_line
from microglia.export.exported import Exported
from microglia.export.onnx import write_onnx
from microglia.export.traced import Source, source_of


def to_openvino(model: nn.Module, example_inputs: Any, *, dynamic: Sequence[int] = (0,)) -> Any:
    """Returns a model as an `openvino.Model` in the model's own precision, unverified; `microglia.export.export` verifies.

    Args:
        model: Any module, masked, shrunk or accelerated; it is left as it is.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.
        dynamic: Dimensions of the inputs that shall be free; see `microglia.export.traced.source_of`.

    Raises:
        ExportError: ONNX or OpenVINO has no form of an operator.
        TraceError: torch.export cannot trace the model.
    """
    return as_openvino(source_of(model, example_inputs, dynamic=dynamic))


def as_openvino(source: Source) -> Any:
    """Converts a model as `to_openvino` does."""
    needs("export", "openvino", "onnx", "onnxscript")
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        file = write_onnx(source, Path(folder) / "model.onnx")
        try:
            converted = openvino.convert_model(file)
        except Exception as error:
            raise ExportError(f"OpenVINO cannot read {type(source.model).__name__}: {first_line(error)}") from error
    for key, value in source.metadata.items():
        converted.set_rt_info(value, key)
    return converted


def write_openvino(source: Source, path: Path) -> None:
    """Writes the ``.xml`` file and the ``.bin`` file of its weights, in the model's own precision."""
    converted = as_openvino(source)
    import openvino

    openvino.save_model(converted, path, compress_to_fp16=False)


def open_openvino(path: Any, *, threads: int | None = None) -> Exported:
    """Opens an OpenVINO model on the CPU, computed in float32 if its weights are float32.

    Args:
        path: The ``.xml`` file, or an `openvino.Model`.
        threads: CPU threads; None for as many as PyTorch has.

    Raises:
        ExportError: OpenVINO does not open it.
    """
    needs("export", "openvino")
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 by default where the processor has it
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        compiled = openvino.Core().compile_model(str(path) if isinstance(path, str | Path) else path, "CPU", settings)
    except Exception as error:
        raise ExportError(f"OpenVINO does not open {path}: {first_line(error)}") from error
    return compiled_openvino(compiled)


def compiled_openvino(compiled: Any) -> Exported:
    """Returns a model that OpenVINO has compiled."""
    import openvino

    request = compiled.create_infer_request()

    def run(tensors: list[Tensor]) -> list[Tensor]:
        found = request.infer({i: tensor.contiguous().numpy() for i, tensor in enumerate(tensors)}, share_inputs=True)
        return [torch.from_numpy(found[i]) for i in range(len(compiled.outputs))]

    names = [value.get_any_name() for value in compiled.inputs]
    return Exported(run, names, f"OpenVINO {openvino.__version__.partition('-')[0]}")
