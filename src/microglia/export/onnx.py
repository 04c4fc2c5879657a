"""ONNX: written by torch.onnx from the traced program, opened by ONNX Runtime."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.errors import ExportError
from microglia.core.optional import needs
from microglia.core.running import first_line
from microglia.export.exported import Exported
from microglia.export.traced import Source, Traced, source_of
from microglia.graph.dims.trace import quiet

OLDEST = 18
"""Oldest opset that torch.onnx writes reliably."""


def to_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    dynamic: Sequence[int] = (0,),
    opset: int | None = None,
    external_data: bool = False,
) -> Path:
    """Writes a model as an ONNX file, unverified; `microglia.export.export` verifies.

    Args:
        model: Any module, masked, shrunk or accelerated; it is left as it is.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.
        path: The file; over 2 GB the weights go to ``<path>.data`` beside it.
        dynamic: Dimensions of the inputs that shall be free; see `microglia.export.traced.source_of`.
        opset: Version of the operators; None for torch's default.
        external_data: Whether the weights are always written beside the file.

    Returns:
        The path.

    Raises:
        ExportError: An operator has no form in ONNX, or none in this opset.
        TraceError: torch.export cannot trace the model.
    """
    return write_onnx(source_of(model, example_inputs, dynamic=dynamic), path, opset=opset, external_data=external_data)


def write_onnx(source: Source, path: str | Path, *, opset: int | None = None, external_data: bool = False) -> Path:
    """Writes a model as `to_onnx` does."""
    needs("export", "onnx", "onnxscript")
    traced = source.traced
    try:
        with quiet(), redirect_stdout(io.StringIO()):
            written = torch.onnx.export(traced.program, opset_version=opset, dynamo=True, verbose=False)
    except Exception as error:
        raise ExportError(_unwritable(source, error)) from error
    assert written is not None
    _name_sizes(written.model.graph, traced.sizes())
    _name_outputs(written.model.graph, traced)
    written.model.metadata_props.update(source.metadata)
    found = written.model.opset_imports.get("", opset)
    if opset is not None and found != opset:
        raise ExportError(f"The model was to be written in ONNX opset {opset}, but torch.onnx wrote {found}: ask for {found}.")
    written.save(path, external_data=external_data)
    return Path(path)


def open_onnx(path: str | Path, *, threads: int | None = None) -> Exported:
    """Opens an ONNX file in ONNX Runtime, on the CPU.

    Args:
        path: The file.
        threads: CPU threads; None for as many as PyTorch has.

    Raises:
        ExportError: ONNX Runtime does not open it.
    """
    needs("export", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime does not open {path}: {first_line(error)}") from error
    names = [value.name for value in session.get_inputs()]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, given)]

    return Exported(run, names, f"ONNX Runtime {onnxruntime.__version__}")


def _unwritable(source: Source, error: BaseException) -> str:
    """Returns which operator ONNX cannot hold, or what else torch.onnx says."""
    text = ""
    cause: BaseException | None = error
    while cause is not None:
        text += f"\n{cause}"
        cause = cause.__cause__ or cause.__context__
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", text)
    name = type(source.model).__name__
    if operator is not None:
        return (
            f"ONNX has no form of the operator {operator[1]} of {name}: write the model's code without it, or export it "
            "to a torch.export program (.pt2), which holds every operator."
        )
    return f"torch.onnx cannot write {name}: {first_line(error)}"


def _name_sizes(graph: Any, names: dict[str, str]) -> None:
    """Gives free sizes their names in every shape of a graph, also in sums and products."""
    import onnx_ir

    def renamed(size: Any) -> Any:
        if not isinstance(size, onnx_ir.SymbolicDim) or size.value is None:
            return size
        return onnx_ir.SymbolicDim(re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.value))

    values = {*graph.inputs, *graph.outputs, *(value for node in graph.all_nodes() for value in node.outputs)}
    for value in values:
        if value.shape is not None and not value.shape.is_static():
            value.shape = onnx_ir.Shape([renamed(size) for size in value.shape])


def _name_outputs(graph: Any, traced: Traced) -> None:
    """Gives the outputs the names under which the model returns them."""
    made = [*graph.inputs, *(value for node in graph.all_nodes() for value in node.outputs)]
    taken = {value.name for value in made if value not in set(graph.outputs)}
    if len(graph.outputs) == len(traced.outputs) == len(set(traced.outputs)):
        for value, name in zip(graph.outputs, traced.outputs, strict=True):
            if name not in taken and value.producer() is not None:
                value.name = name
