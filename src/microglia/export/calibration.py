"""Calibration sets: from batches of any form to the arrays that a converted model takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from microglia.core.batch import Example, take_examples, tensors_of
from microglia.core.errors import ExportError
from microglia.export.exported import arranged

if TYPE_CHECKING:
    import openvino

Arrays = list[NDArray[Any]]
"""Inputs of one call, in the order of the model's inputs."""


def calibration_items(model: openvino.Model, calibration: Iterable[Any]) -> Iterator[Arrays]:
    """Returns calibration inputs one by one, or in the model's own batches where these are fixed.

    Args:
        model: The model that they calibrate.
        calibration: Batches of inputs, or of (inputs, targets); one tensor is one batch.

    Raises:
        ExportError: They have another structure than the example, or shapes that the model does not take.
    """
    shapes = [port.partial_shape for port in model.inputs]
    fixed = [shape[0] for shape in shapes if shape.rank.is_static and shape.rank.get_length() and shape[0].is_static]
    size = fixed[0].get_length() if fixed else 1
    names = [port.get_any_name() for port in model.inputs]
    if not isinstance(calibration, Iterable):
        raise ExportError(
            f"Int8 is calibrated on inputs: give batches of training inputs, such as a loader, not {calibration!r}."
        )
    for batch in (calibration,) if isinstance(calibration, Tensor) else calibration:
        tensors = _inputs_of(batch, names)
        for start in range(0, len(tensors[0]) - size + 1, size):
            part = take_examples(tensors, torch.arange(start, start + size))
            for tensor, shape in zip(part, shapes, strict=True):
                if not shape.compatible(_shape(tensor)):
                    raise ExportError(
                        f"The calibration inputs have the shape {tuple(tensor.shape)}, but the model takes {shape}; "
                        "give inputs of the shape that it is called with."
                    )
            yield [tensor.detach().cpu().contiguous().numpy() for tensor in part]


def _inputs_of(batch: Any, names: list[str]) -> list[Tensor]:
    """Returns the input tensors of one entry of a calibration set, inputs or (inputs, targets), in the model's order."""
    count = len(batch.tensors if isinstance(batch, Example) else tensors_of(batch))
    if count != len(names) and isinstance(batch, list | tuple) and len(batch) == 2:
        batch, count = batch[0], len(tensors_of(batch[0]))
    if count == len(names):
        example = Example.of(batch)
        tensors = arranged(names, example.args, example.kwargs)
        if all(tensor.ndim for tensor in tensors):
            return tensors
    raise ExportError(
        f"The calibration set gives {count} tensors at a time, but the model takes {len(names)}; give batches of inputs, or "
        "pairs of inputs and targets as a loader does."
    )


def _shape(tensor: Tensor) -> Any:
    import openvino

    return openvino.PartialShape(list(tensor.shape))
