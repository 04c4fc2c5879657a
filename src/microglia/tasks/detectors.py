"""Families of detectors: their loss, and how their outputs become boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from microglia.tasks.detections import EVALUATION, Suppression, suppressed
from microglia.tasks.torchvision_detection import Reader, no_distance
from microglia.tasks.yolo import DetectionLoss, Gains, Grid, decoded, distance
from microglia.zoo.registry import ModelError
from microglia.zoo.yolov5 import ANCHORS, STRIDES

Anchors = tuple[tuple[tuple[float, float], ...], ...]
Size = tuple[int, int]


@dataclass(frozen=True)
class Family:
    """How the outputs of one family of detectors are read.

    Attributes:
        loss: (outputs, targets) -> mean loss of an image.
        training_loss: The loss to train with.
        read: Outputs -> (boxes [B, candidates, 4] in pixels of the canvas, scores [B, candidates, classes]).
        distance: As of `Task.distance`.
        check: Raises `ModelError` unless outputs of one example have the form for a number of classes.
    """

    loss: Callable[[Any, Any], Tensor]
    training_loss: Callable[[Any, Any], Tensor]
    read: Callable[[Any], tuple[Tensor, Tensor]]
    distance: Callable[[Any, Any, float], Tensor]
    check: Callable[[Any, int, str], None]

    def found(self, outputs: Any, how: Suppression = EVALUATION) -> list[Tensor]:
        """Returns the detections of each image; see `microglia.tasks.detections.suppressed`."""
        return suppressed(*self.read(outputs), how)


def yolo_family(gains: Gains, anchors: Anchors = ANCHORS) -> Family:
    """Returns the family of YOLOv5, with three raw maps."""
    grid = Grid(STRIDES, anchors)
    return Family(
        DetectionLoss(grid, gains),
        DetectionLoss(grid, gains, summed=True),
        lambda maps: decoded(maps, grid),
        distance,
        check_maps,
    )


def torchvision_family(detector: Any, canvas: Size) -> Family:
    """Returns the family of a one-stage detector of torchvision."""
    reader = Reader(detector, canvas)
    return Family(reader.loss, reader.loss, reader.read, no_distance, reader.check)


def check_maps(outputs: Any, classes: int, data: str) -> None:
    """Raises `ModelError` unless outputs are three maps for a number of classes."""
    form = isinstance(outputs, Sequence) and len(outputs) == len(STRIDES)
    if not form or not all(isinstance(one, Tensor) and one.ndim == 5 and one.shape[1] == len(ANCHORS[0]) for one in outputs):
        raise ModelError(
            "The model does not return three maps (batch, 3 anchors, rows, columns, 5 + classes), which detection needs."
        )
    if any(one.shape[-1] != 5 + classes for one in outputs):
        raise ModelError(
            f"The model's maps are for {outputs[0].shape[-1] - 5} classes, and {data} has {classes}; build it for as many, or "
            "name the classes in the task's options."
        )
