"""Targets of export: what is written, under which suffix, and what opens it again; one registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microglia.core.errors import ExportError
from microglia.core.registry import Registry, unknown_name
from microglia.export import executorch, hugging_face, onnx, openvino, program
from microglia.export.exported import Exported


@dataclass(frozen=True)
class Target:
    """One kind of file that a model is exported to.

    Attributes:
        suffix: End of the file's name; empty for a directory.
        write: (source, path, options) -> nothing; writes the file and what belongs beside it into an empty folder.
        open: Path -> the file in its engine.
        sentence: Description for people.
        options: Names of the options that ``write`` takes.
        free: Whether a file can take inputs of other sizes than the example's.
    """

    suffix: str
    write: Callable[..., Any]
    open: Callable[[Path], Exported]
    sentence: str
    options: tuple[str, ...] = ()
    free: bool = True


targets: Registry[Target] = Registry("export target")
"""Targets by the name that ``to=`` and ``--to`` take."""

targets.add("onnx")(
    Target(".onnx", onnx.write_onnx, onnx.open_onnx, "ONNX, run by ONNX Runtime", options=("opset", "external_data"))
)
targets.add("openvino")(Target(".xml", openvino.write_openvino, openvino.open_openvino, "OpenVINO IR, run by OpenVINO"))
targets.add("program")(Target(".pt2", program.write_program, program.open_program, "a torch.export program, run by PyTorch"))
targets.add("executorch")(
    Target(
        ".pte",
        executorch.write_executorch,
        executorch.open_executorch,
        "a program of ExecuTorch for phones, run by XNNPACK",
        free=False,
    )
)
targets.add("hf")(Target("", hugging_face.write_directory, hugging_face.open_directory, "a directory that transformers reads"))


def target_for(path: Path, to: str | None) -> tuple[str, Target]:
    """Returns the (name, target) that a path is written as.

    Args:
        path: File or directory to write.
        to: Name of the target; None for the one of the path's suffix.

    Raises:
        UnknownNameError: There is no target of this name.
        ExportError: The suffix is another target's, or nobody's.
    """
    by_suffix = {target.suffix: (name, target) for name, target in targets.items()}
    if to is None:
        if path.suffix not in by_suffix:
            raise ExportError(
                f"No export target writes {path.suffix} files; give {path} one of the suffixes "
                f"{', '.join(suffix or 'none (a directory, hf)' for suffix in by_suffix)}, or say which target."
            )
        return by_suffix[path.suffix]
    target = targets[to]
    if path.suffix != target.suffix and not (target.suffix == "" and path.suffix not in by_suffix):
        wanted = f"a file that ends in {target.suffix}" if target.suffix else "a directory"
        raise ExportError(f"The target {to!r} writes {wanted}; got {path}.")
    return to, target


def check_options(name: str, target: Target, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that were given; raises where the target takes none of that name."""
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in target.options and not target.options:
            raise ExportError(f"The export target {name!r} has no option {key!r}; it has none at all.")
        if key not in target.options:
            raise unknown_name(f"option of the export target {name!r}", key, target.options)
    return given
