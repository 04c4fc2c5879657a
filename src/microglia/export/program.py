"""A torch.export program (``.pt2``): every operator of PyTorch, for whoever serves with PyTorch or compiles further."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from microglia.core.batch import tensors_of
from microglia.core.errors import ExportError
from microglia.core.running import first_line
from microglia.export.exported import Exported
from microglia.export.traced import Source
from microglia.graph.dims.trace import quiet

METADATA = "microglia.json"
"""Name under which a program or a directory holds what a file tells of the model."""


class ExportedModule(Exported):
    """An exported model that PyTorch runs: it is called like the model and returns what the model returns."""

    def __init__(self, call: Callable[..., Any], engine: str) -> None:
        super().__init__(lambda tensors: tensors_of(call(*tensors)), (), engine)
        self.call = call

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the outputs; arguments as the model's."""
        return self.call(*args, **kwargs)


def write_program(source: Source, path: Path) -> None:
    """Writes the program; the model's parameters keep their names in it.

    Through memory, for where the disk is full torch's own writer ends the whole process.
    """
    content = io.BytesIO()
    with quiet():
        torch.export.save(source.traced.program, content, extra_files={METADATA: json.dumps(dict(source.metadata))})
    path.write_bytes(content.getbuffer())


def open_program(path: Path) -> Exported:
    """Opens a program; only of a source that you trust, for torch.export reads pickled parts.

    Raises:
        ExportError: It cannot be read.
    """
    try:
        with quiet():
            module = torch.export.load(path).module()
    except Exception as error:
        raise ExportError(f"torch.export does not open {path}: {first_line(error)}") from error
    return ExportedModule(module, f"torch.export, PyTorch {torch.__version__}")
