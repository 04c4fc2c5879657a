"""YOLOv5's raw maps: decoding to boxes, assignment of true boxes to cells, loss, and distillation.

A map is [B, anchors, ny, nx, 5 + classes] of logits: x, y, width, height, objectness, classes. All is written from the
published definitions (v6.0 to v7.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import ConfigDict
from torch import Tensor
from torch.nn import functional

from microglia.tasks.boxes import complete_iou, corners

RATIO = 4.0
"""A true box fits an anchor if neither side is this many times larger or smaller."""
BALANCE = (4.0, 1.0, 0.4)
"""Weights of the objectness of the maps at stride 8, 16 and 32."""
PUBLISHED = 640
"""Side in pixels for which the gain of objectness is published."""
CLASSES = 80
"""Number of classes for which the gain of classes is published."""
SURE = 0.5
"""Objectness of a teacher above which a student learns its boxes and classes."""
Maps = Sequence[Tensor]


@dataclass(frozen=True)
class Grid:
    """The cells and anchors of the maps.

    Attributes:
        strides: Pixels of each cell, one number per map.
        anchors: (width, height) in pixels, of each anchor of each map.
    """

    strides: tuple[int, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...]

    def sides(self, level: int, like: Tensor) -> Tensor:
        """Returns the anchors of a map in cells, [anchors, 2]."""
        return like.new_tensor(self.anchors[level]) / self.strides[level]


@dataclass(frozen=True)
class Gains:
    """Weights of the three parts of the loss.

    Attributes:
        box: Weight of 1 - complete IoU.
        obj: Weight of objectness.
        cls: Weight of classes.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    box: float = 0.05
    obj: float = 1.0
    cls: float = 0.5


def decoded(maps: Maps, grid: Grid) -> tuple[Tensor, Tensor]:
    """Returns all predicted boxes, [B, cells, 4] by corners in pixels, and their class scores, [B, cells, classes].

    A centre may leave its cell by half a cell; a side is at most four times the anchor's. A score is objectness times class.
    """
    boxes, scores = [], []
    for level, raw in enumerate(maps):
        sigma = raw.float().sigmoid()
        ny, nx = raw.shape[2:4]
        rows, columns = torch.meshgrid(torch.arange(ny, device=raw.device), torch.arange(nx, device=raw.device), indexing="ij")
        centre = (2 * sigma[..., :2] - 0.5 + torch.stack((columns, rows), -1)) * grid.strides[level]
        side = (2 * sigma[..., 2:4]).square() * grid.sides(level, sigma)[:, None, None] * grid.strides[level]
        boxes.append(corners(torch.cat((centre, side), -1)).flatten(1, 3))
        scores.append((sigma[..., 4:5] * sigma[..., 5:]).flatten(1, 3))
    return torch.cat(boxes, 1), torch.cat(scores, 1)


@dataclass(frozen=True, eq=False)
class Assigned:
    """The cells of one map that are responsible for true boxes; all have the length of the matches.

    Attributes:
        image: Place of the image in the batch.
        anchor: Index of the anchor.
        row: Row of the cell.
        column: Column of the cell.
        box: [n, 4] centre relative to the cell, width and height, in cells.
        label: Class.
    """

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    box: Tensor
    label: Tensor

    @property
    def cells(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Index of the cells in a map."""
        return self.image, self.anchor, self.row, self.column


def assign(targets: Mapping[str, Tensor], anchors: Tensor, size: tuple[int, int]) -> Assigned:
    """Returns which cells of a map are responsible for the true boxes.

    A box goes to every anchor whose sides differ from its own by a factor below `RATIO`. Its own cell takes it, the nearest one
    to the left or right, and the nearest one above or below. Cells outside the map are left out.

    Args:
        targets: ``boxes`` [n, 4] (centre, sides, as shares of the image), ``labels`` and ``image`` [n]; ``crowd`` [n], if it is
            there, says which boxes are no targets.
        anchors: [anchors, 2] in cells.
        size: (rows, columns) of the map.
    """
    ny, nx = size
    keep = ~targets["crowd"] if "crowd" in targets else torch.ones_like(targets["labels"], dtype=torch.bool)
    boxes = targets["boxes"][keep].float() * anchors.new_tensor([nx, ny, nx, ny])
    ratio = boxes[None, :, 2:] / anchors[:, None]
    anchor, which = (torch.maximum(ratio, 1 / ratio).amax(2) < RATIO).nonzero(as_tuple=True)
    boxes, label, image = boxes[which], targets["labels"][keep][which], targets["image"][keep][which]
    x, y = boxes[:, 0], boxes[:, 1]
    near = (
        torch.ones_like(x, dtype=torch.bool),
        (x % 1 < 0.5) & (x > 1),
        (y % 1 < 0.5) & (y > 1),
        ((nx - x) % 1 < 0.5) & (nx - x > 1),
        ((ny - y) % 1 < 0.5) & (ny - y > 1),
    )
    steps = boxes.new_tensor([[0, 0], [0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]])
    direction, match = torch.stack(near).nonzero(as_tuple=True)
    boxes = boxes[match]
    cell = (boxes[:, :2] - steps[direction]).floor().long()
    column, row = cell[:, 0].clamp(0, nx - 1), cell[:, 1].clamp(0, ny - 1)
    relative = torch.cat((boxes[:, :2] - torch.stack((column, row), 1), boxes[:, 2:]), 1)
    return Assigned(image[match], anchor[match], row, column, relative, label[match])


@dataclass(frozen=True)
class DetectionLoss:
    """The loss of raw maps: boxes by complete IoU, objectness by it, classes one by one.

    Attributes:
        grid: Cells and anchors.
        gains: Weights of the parts for `PUBLISHED` pixels and `CLASSES` classes; they are scaled to the maps at hand.
        summed: Whether the loss is multiplied by the number of images in the batch over all ranks, as the published training
            does: its learning rates are made for that.
    """

    grid: Grid
    gains: Gains = Gains()
    summed: bool = False

    def __call__(self, maps: Maps, targets: Mapping[str, Tensor]) -> Tensor:
        """Returns the loss; a batch without boxes has only the part of objectness."""
        total = maps[0].new_zeros((), dtype=torch.float32)
        classes = maps[0].shape[-1] - 5
        for level, raw in enumerate(maps):
            box, obj, cls = self.parts(raw.float(), targets, level)
            total = total + self.gains.box * box + self._gain_obj(maps) * BALANCE[level] * obj
            total = total + self.gains.cls * classes / CLASSES * cls
        total = total * 3 / len(maps)
        return total * len(maps[0]) * _ranks() if self.summed else total

    def parts(self, raw: Tensor, targets: Mapping[str, Tensor], level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the mean losses of boxes, objectness and classes on one map, without gains."""
        anchors = self.grid.sides(level, raw)
        found = assign(targets, anchors, (raw.shape[2], raw.shape[3]))
        wanted = torch.zeros_like(raw[..., 4])
        box = cls = raw.sum() * 0
        if len(found.label):
            own = raw[found.cells]
            centre, side = 2 * own[:, :2].sigmoid() - 0.5, (2 * own[:, 2:4].sigmoid()).square() * anchors[found.anchor]
            overlap = complete_iou(corners(torch.cat((centre, side), 1)), corners(found.box))
            box = (1 - overlap).mean()
            wanted = _last_wins(wanted, found, overlap.detach().clamp(min=0))
            if own.shape[1] > 6:  # one class needs no choice
                hot = functional.one_hot(found.label, own.shape[1] - 5).to(own.dtype)
                cls = functional.binary_cross_entropy_with_logits(own[:, 5:], hot)
        return box, functional.binary_cross_entropy_with_logits(raw[..., 4], wanted), cls

    def _gain_obj(self, maps: Maps) -> float:
        stride = self.grid.strides[0]
        return self.gains.obj * (maps[0].shape[2] * maps[0].shape[3] * stride**2) / PUBLISHED**2


def _last_wins(wanted: Tensor, found: Assigned, values: Tensor) -> Tensor:
    """Returns the targets of objectness; of several matches of a cell the last one counts, on every device."""
    image, anchor, row, column = found.cells
    flat = ((image * wanted.shape[1] + anchor) * wanted.shape[2] + row) * wanted.shape[3] + column
    last = torch.full((wanted.numel(),), -1, dtype=torch.int64, device=wanted.device)
    last = last.scatter_reduce(0, flat, torch.arange(len(flat), device=flat.device), "amax")
    return torch.where(last >= 0, values[last.clamp(min=0)].to(wanted.dtype), wanted.flatten()).view_as(wanted)


def _ranks() -> int:
    """Returns the number of processes whose gradients are averaged."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def distance(student: Maps, teacher: Maps, temperature: float) -> Tensor:
    """Returns how far a student's maps are from a teacher's: objectness everywhere, boxes and classes where that is sure.

    Objectness: cross-entropy to the teacher's probability, less the least possible. Boxes: squared difference of sigmoids.
    Classes: as objectness. The last two are means over the cells whose objectness, by the teacher, is above `SURE`.

    Args:
        student: Raw maps.
        teacher: Raw maps of the same shapes.
        temperature: Divides logits of objectness and classes, above 0.
    """
    total = student[0].new_zeros(())
    for mine, theirs in zip(student, [raw.detach() for raw in teacher], strict=True):
        total = total + _surprise(mine[..., 4] / temperature, theirs[..., 4] / temperature).mean()
        sure = theirs[..., 4].sigmoid() > SURE
        if sure.any():
            own, wanted = mine[sure], theirs[sure]
            total = total + (own[:, :4].sigmoid() - wanted[:, :4].sigmoid()).square().mean()
            total = total + _surprise(own[:, 5:] / temperature, wanted[:, 5:] / temperature).mean()
    return total


def _surprise(logits: Tensor, wanted: Tensor) -> Tensor:
    """Returns the divergence of Bernoulli variables by their logits, each at least 0."""
    target = wanted.sigmoid()
    bce = functional.binary_cross_entropy_with_logits
    return bce(logits, target, reduction="none") - bce(wanted, target, reduction="none")
