"""`export`: a model written as a file of another engine, and compared with the model before the file counts as written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import Example, repeat_example, take_examples, tensors_of
from microglia.core.errors import ExportError, MicrogliaError
from microglia.core.running import first_line
from microglia.export.exported import Exported
from microglia.export.files import replacing
from microglia.export.int8 import ROUNDED, Int8, Int8Report, quantizers
from microglia.export.int8_recovery import recovered
from microglia.export.program import ExportedModule
from microglia.export.targets import Target, check_options, target_for, targets
from microglia.export.traced import Source, source_of
from microglia.graph.cutting.remove import outputs_difference
from microglia.graph.dims.trace import known_outputs, quiet
from microglia.storage.changes import changes_digest, changes_of

FIXED = "The file takes inputs of the example's shapes alone."
"""Note of a target whose files have no free sizes."""
TOLERANCE, HALF = 1e-4, 2e-2
"""Largest difference to the model, relative to its largest output, in float32 and where an output is of half precision."""


@dataclass(frozen=True)
class Export:
    """A file that was written and verified.

    Attributes:
        path: The file, or the directory.
        target: Name of its target.
        engine: The engine that ran the file to verify it.
        files: Every file that belongs to it.
        bytes: Their size together.
        difference: Largest difference to the model's outputs, relative to the largest output.
        examples: How many examples were compared.
        notes: Differences from the model, in sentences.
        batch: Size of the batch that the file alone takes; None where it takes any.
        structure: Makes the model's own outputs of the file's list of tensors; None where the engine does so itself.
        int8: The effect of rounding to 8 bits; None in the model's own precision.
    """

    path: Path
    target: str
    engine: str
    files: tuple[Path, ...]
    bytes: int
    difference: float
    examples: int
    notes: tuple[str, ...] = ()
    batch: int | None = None
    structure: Callable[[Sequence[Tensor]], Any] | None = field(default=None, repr=False, compare=False)
    int8: Int8Report | None = None

    def open(self) -> Exported:
        """Returns the file in its engine, on the CPU; its outputs come in the structure in which the model returns them."""
        opened = targets[self.target].open(self.path)
        opened.structure = self.structure
        return opened

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, JSON-ready."""
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "structure"}
        told["int8"] = None if self.int8 is None else self.int8.to_dict()
        return {**told, "path": str(self.path), "files": [str(file) for file in self.files], "notes": list(self.notes)}


def export(
    model: nn.Module,
    path: str | Path,
    example: Any,
    *,
    to: str | None = None,
    dynamic: Sequence[int] = (0,),
    data: Iterable[Any] = (),
    tolerance: float | None = None,
    int8: Int8 | Iterable[Any] | None = None,
    **options: Any,
) -> Export:
    """Writes a model as a file that another engine runs, once that engine gives the model's outputs.

    The file is written beside its place, opened by its engine and compared with the model: on the example, on a batch of
    another size where it is free, and on ``data``. Only then it takes its place. Masks are written as zeros of the weights;
    an accelerated model is written as the model that was accelerated.

    Args:
        model: Any module, masked or shrunk; it is left as it is.
        path: File or directory to write; one that is there is replaced.
        example: A tensor, a tuple of arguments, or a mapping of keyword arguments.
        to: ``onnx``, ``openvino``, ``program``, ``executorch`` or ``hf``; None for the target of the path's suffix.
        dynamic: Dimensions of the inputs that shall be free: the batch by default, (0, 2, 3) also for height and width of
            images, (0, 1) for the length of token ids. The notes name what the model's code, or the target, fixes.
        data: Further inputs to compare on, such as batches of the test split.
        tolerance: Largest difference, relative to the largest output; None for 1e-4, or 2e-2 in half precision.
        int8: Training inputs on which weights and activations are rounded to 8 bits, batch by batch, or an `Int8`, which also
            says what that may cost and how the model recovers. The file in float32 is verified first. OpenVINO only.
        options: Options of the target. ONNX: ``opset``, and ``external_data`` (weights beside the file, as always over 2 GB).

    Returns:
        The written file, and its distance from the model.

    Raises:
        ExportError: The target cannot hold the model, its suffix is another, or its outputs differ. Nothing is written.
        FileError: The disk is full, or the path cannot be written. Nothing half-written is left.
        TraceError: torch.export cannot trace the model.
    """
    name, target = target_for(path := Path(path), to)
    given = check_options(name, target, options)
    quantizer = None if int8 is None else quantizers[name]
    model, rounding = recovered(model, int8, partial(_rounded, (example, dynamic, name, target, given)))
    source = source_of(model, example, dynamic=dynamic if target.free else (), metadata=metadata_of(model, example))
    size = sum(t.numel() * t.element_size() for t in (*source.model.parameters(), *source.model.buffers()))
    with replacing(path, size) as place:
        _write(source, name, target, place, given)
        opened = target.open(place)
        data = data if quantizer is None else list(data)
        difference, examples = _verify(source, opened, data, tolerance)
        rounded = None
        if quantizer is not None and rounding is not None:
            rounded = rounding.told(quantizer(place, rounding.wish, source.traced.structured))
            opened = target.open(place)
            difference, examples = _verify(source, opened, data, ROUNDED)
        written = tuple(path.parent / file for file in _files_of(place.parent))
    size = sum(file.stat().st_size for file in written)
    structure = source.traced.structured if not isinstance(opened, ExportedModule) else None
    batch, notes = None if _is_batch_free(source) else source.example.batch, _notes(source, target)
    return Export(path, name, opened.engine, written, size, difference, examples, notes, batch, structure, rounded)


def _rounded(settings: tuple[Any, Sequence[int], str, Target, dict[str, Any]], model: nn.Module, wish: Int8) -> Int8Report:
    """Returns what int8 does to a model, in a file that does not stay."""
    example, dynamic, name, target, options = settings
    source = source_of(model, example, dynamic=dynamic)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / f"model{target.suffix}"
        _write(source, name, target, place, options)
        return quantizers[name](place, wish, source.traced.structured)


def _files_of(folder: Path) -> list[Path]:
    """Returns the files below a folder, by their place in it."""
    return sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())


def metadata_of(model: nn.Module, example: Any) -> dict[str, str]:
    """Returns what a file tells of the model: version, what was done to it, a digest of that, shapes of the example."""
    from importlib.metadata import version  # slow to import

    shapes = [list(tensor.shape) for tensor in Example.of(example).tensors]
    return {
        "microglia_version": version("microglia"),
        "microglia_changes": ", ".join(changes_of(model)) or "none",
        "microglia_plan_digest": changes_digest(model),
        "microglia_input_shapes": json.dumps(shapes),
    }


def _write(source: Source, name: str, target: Target, place: Path, options: dict[str, Any]) -> None:
    try:
        target.write(source, place, **options)
    except (MicrogliaError, OSError):
        raise
    except Exception as error:  # each library has its own; C++ code tells no more than that
        raise ExportError(f"{type(source.model).__name__} cannot be written to {name}: {first_line(error)}") from error


def _verify(source: Source, opened: Exported, data: Iterable[Any], tolerance: float | None) -> tuple[float, int]:
    """Returns (largest relative difference, examples compared); raises where it is larger than the tolerance."""
    worst, examples = 0.0, 0
    for inputs in _inputs(source, data):
        wanted = source.expected(inputs)
        given = Example.of(inputs).copied()
        try:
            with quiet():
                got = tensors_of(known_outputs(opened(*given.args, **given.kwargs)))
        except Exception as error:
            raise ExportError(f"{opened.engine} does not run the file: {first_line(error)} It was not written.") from error
        found = outputs_difference(got, wanted)
        half = any(t.dtype in (torch.float16, torch.bfloat16) for t in wanted)
        limit = tolerance if tolerance is not None else HALF if half else TOLERANCE
        if not found <= limit:
            raise ExportError(
                f"The outputs of {opened.engine} differ from the model's by {found:.1e} of the largest, more than {limit:.0e}: "
                "the file was not written. Give another tolerance= if that is close enough."
            )
        worst, examples = max(worst, found), examples + Example.of(inputs).batch
    return worst, examples


def _inputs(source: Source, data: Iterable[Any]) -> Iterator[Any]:
    """Yields the inputs to compare on; one by one where the file takes a batch of one only."""
    yield source.example
    free = _is_batch_free(source)
    if free and source.example.batch == 1:
        args, kwargs = repeat_example((source.example.args, source.example.kwargs), 3)
        yield Example(args, kwargs)
    for batch in data:
        tree = Example.of(batch).map(lambda t: t.detach().cpu())
        if free:
            yield tree
        elif source.example.batch == 1:
            for i in range(min(tree.batch, 8)):
                yield Example(*take_examples((tree.args, tree.kwargs), torch.tensor([i])))


def _is_batch_free(source: Source) -> bool:
    """Tells whether the file takes a batch of any size; a target that did not trace the model keeps the model's own code."""
    if "traced" not in vars(source):
        return True
    return 0 in source.dynamic and not any(0 in sizes for sizes in source.traced.fixed.values())


def _notes(source: Source, target: Target) -> tuple[str, ...]:
    """Returns what the file does not have of the model."""
    if "traced" not in vars(source):
        return ()
    traced = source.traced
    fixed = [
        f"Dimension {d} of {name} stays {size}: the model's code fixes it."
        for name, sizes in traced.fixed.items()
        for d, size in sizes.items()
    ]
    left = [f"The file does not return the model's {kind}." for kind in traced.left_out]
    return (*fixed, *left) if target.free else (*left, FIXED)
