"""ExecuTorch (``.pte``): a program for phones and embedded devices, whose layers XNNPACK runs where it has them.

The memory of such a program is planned in advance, so it takes inputs of the example's shapes alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from microglia.core.errors import ExportError
from microglia.core.optional import needs
from microglia.core.running import first_line
from microglia.export.exported import Exported
from microglia.export.traced import Source
from microglia.graph.dims.trace import quiet

INPUTS = "microglia_inputs"
"""Method of the program that returns the names of its inputs."""


def write_executorch(source: Source, path: Path) -> None:
    """Writes the program; what a file tells of the model are methods of it that return text.

    Raises:
        ExportError: ExecuTorch has no form of an operator.
    """
    needs("mobile", "executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    for tensor in (*source.model.parameters(), *source.model.buffers()):
        tensor.data = tensor.data.contiguous()  # a weight in channels-last layout is refused by the passes of XNNPACK
    told = {**source.metadata, INPUTS: json.dumps(source.traced.inputs)}
    with quiet():
        lowered = to_edge_transform_and_lower(source.traced.program, partitioner=[XnnpackPartitioner()], constant_methods=told)
        path.write_bytes(lowered.to_executorch().buffer)


def open_executorch(path: Path) -> Exported:
    """Opens a program in ExecuTorch's own runtime on the CPU.

    Raises:
        ExportError: It cannot be read.
    """
    needs("mobile", "executorch")
    from importlib.metadata import version

    from executorch.runtime import Runtime, Verification

    try:
        program = Runtime.get().load_program(str(path), verification=Verification.InternalConsistency)
        method = program.load_method("forward")
        names = _input_names(program, method)
        shapes = [tuple(method.metadata.input_tensor_meta(place).sizes()) for place in range(len(names))]
    except Exception as error:
        raise ExportError(f"ExecuTorch does not open {path}: {first_line(error)}") from error

    def run(tensors: list[Tensor]) -> list[Tensor]:
        if (given := [tuple(tensor.shape) for tensor in tensors]) != shapes:
            raise ExportError(f"The program takes inputs of the shapes {shapes} alone; got {given}. Export it for others.")
        return [tensor.clone() for tensor in method.execute([tensor.contiguous() for tensor in tensors])]

    return Exported(run, names, f"ExecuTorch {version('executorch')}, XNNPACK")


def _input_names(program: Any, method: Any) -> list[str]:
    """Returns the names that the writer left, or numbers for a program of another writer."""
    if INPUTS in program.method_names:
        return list(json.loads(program.load_method(INPUTS).execute(())[0]))
    return [f"input_{number}" for number in range(method.metadata.num_inputs())]
