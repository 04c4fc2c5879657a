"""Detections: the boxes that a network's scores leave after suppression of duplicates, and their metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microglia.data.letterbox import Placement
from microglia.tasks.average_precision import average_precision
from microglia.tasks.boxes import iou, nms
from microglia.tasks.metrics import Gathered, Record

CANDIDATES = 30_000
"""Boxes with the best scores that are compared, at most."""
SAME = 0.9
"""IoU from which boxes of two models are the same."""


@dataclass(frozen=True)
class Suppression:
    """How boxes are chosen.

    Attributes:
        confidence: Least score.
        overlap: IoU above which the lower of two boxes of a class goes.
        many: Whether a box counts for every class above ``confidence``, or only for its best one.
        most: Boxes of an image, at most.
    """

    confidence: float = 0.001
    overlap: float = 0.6
    many: bool = True
    most: int = 300


EVALUATION = Suppression()
"""For average precision, which needs boxes of every score."""
USE = Suppression(0.25, 0.45, many=False)
"""For people."""


def suppressed(boxes: Tensor, scores: Tensor, how: Suppression = EVALUATION) -> list[Tensor]:
    """Returns the detections of each image, [n, 6]: corners, score, class; the best first.

    Args:
        boxes: [B, candidates, 4], corners.
        scores: [B, candidates, classes], in [0, 1].
        how: See `Suppression`.
    """
    return [_of_one(own, score, how) for own, score in zip(boxes, scores, strict=True)]


def _of_one(boxes: Tensor, scores: Tensor, how: Suppression) -> Tensor:
    if how.many:
        place, label = (scores > how.confidence).nonzero(as_tuple=True)
    else:
        best = scores.max(1)
        place = (best.values > how.confidence).nonzero().squeeze(1)
        label = best.indices[place]
    score = scores[place, label]
    top = score.argsort(descending=True, stable=True)[:CANDIDATES]
    place, label, score = place[top], label[top], score[top]
    kept = nms(boxes[place], score, how.overlap, label, most=how.most)
    return torch.cat((boxes[place[kept]], score[kept, None], label[kept, None].to(score.dtype)), 1)


def records(detections: Sequence[Tensor], targets: Mapping[str, Tensor], canvas: tuple[int, int]) -> list[Record]:
    """Returns (index, detections, truth) of each image, with all boxes in pixels of the original image.

    Args:
        detections: As of `suppressed`, in pixels of the canvas.
        targets: As of `microglia.data.box_samples.collate_boxes`.
        canvas: (height, width) of the network's inputs.
    """
    found: list[Record] = []
    for place, own in enumerate(detections):
        height, width = targets["size"][place].tolist()
        boxes = Placement.of((height, width), canvas).undo(own[:, :4])
        high = boxes.new_tensor([width, height, width, height])
        mine = targets["image"] == place
        columns = (targets["labels"][mine], targets["crowd"][mine])
        truth = torch.cat((targets["pixels"][mine], *(c[:, None].to(torch.float32) for c in columns)), 1)
        found.append((targets["index"][place], torch.cat((boxes.clamp(min=0).minimum(high), own[:, 4:]), 1), truth))
    return found


def precision_metric(classes: Sequence[str], canvas: tuple[int, int]) -> Gathered:
    """Returns the metric ``map``, with ``map50`` and the value of each class; see `average_precision`."""
    names = tuple(classes)

    def value(gathered: list[Record]) -> dict[str, float]:
        return average_precision([(found, truth) for _, found, truth in gathered], names)

    return Gathered(lambda found, targets: records(found, targets, canvas), value)


def same_boxes(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[int, int]:
    """Returns the number of images in which two models find the same boxes, and of all images.

    The same: equally many, and each of the first has one of the second with its class and an IoU of `SAME` or more.
    """
    equal = sum(_matched(mine, theirs) for mine, theirs in zip(first, second, strict=True))
    return equal, len(first)


def _matched(first: Tensor, second: Tensor) -> bool:
    if len(first) != len(second):
        return False
    close = (iou(first[:, :4], second[:, :4]) >= SAME) & (first[:, None, 5] == second[None, :, 5])
    return bool(close.any(1).all() and close.any(0).all()) if len(first) else True
