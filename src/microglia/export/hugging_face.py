"""A directory of transformers: weights and a configuration that follows the cut, so that `from_pretrained` reads it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from microglia.core.errors import ExportError
from microglia.core.optional import needs
from microglia.core.running import first_line
from microglia.export.exported import Exported
from microglia.export.program import METADATA, ExportedModule
from microglia.export.traced import Source
from microglia.graph.dims.trace import quiet


def write_directory(source: Source, path: Path) -> None:
    """Writes what ``save_pretrained`` of the model writes, and what the file tells of the model.

    Raises:
        ExportError: It is no model of transformers, or came back as a graph.
        FileError: Neither its configuration nor a list of sizes can say the widths that the cut left.
    """
    model: Any = source.model
    if not _is_pretrained(model):
        raise ExportError(
            f"A {type(model).__name__} is no model of transformers, whose configuration could say how it is built: export "
            "it to onnx, openvino or program, or cut a model of transformers with keep_class=True."
        )
    with quiet():  # bars of progress
        model.save_pretrained(path)
    (path / METADATA).write_text(json.dumps(dict(source.metadata), indent=2) + "\n")


def open_directory(path: Path) -> Exported:
    """Opens a directory with the class that its configuration names.

    Raises:
        ExportError: It cannot be read, or the class does not build the saved shapes.
    """
    needs("zoo", "transformers")
    import transformers

    from microglia.hugging_face import SizedConfig, open_sized

    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(path)
            (name, *_) = config.architectures
            kind = getattr(transformers, name)
            if isinstance(config, SizedConfig):
                model, told = open_sized(kind, path, config=config, output_loading_info=True)
            else:
                model, told = kind.from_pretrained(path, output_loading_info=True)
    except Exception as error:
        raise ExportError(f"transformers does not open {path}: {first_line(error)}") from error
    unread = sorted({*told["missing_keys"], *told["unexpected_keys"]})
    if unread or told["mismatched_keys"]:
        raise ExportError(f"transformers does not open {path} whole: {', '.join(unread) or 'shapes differ'}.")
    return ExportedModule(model.eval(), f"transformers {transformers.__version__}")


def _is_pretrained(model: nn.Module) -> bool:
    kind: Any = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)  # imported if it is one
    return kind is not None and isinstance(model, kind)
