"""Boxes as tensors: overlap, complete overlap for training, and suppression of duplicates without compiled operators.

Boxes are (left, top, right, bottom) unless a function says otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 256
"""Candidates that are compared at once in `nms`."""
TINY = 1e-7
"""Added to denominators."""


def corners(boxes: Tensor) -> Tensor:
    """Returns boxes (centre x, centre y, width, height), [..., 4], by their corners."""
    centre, side = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centre - side / 2, centre + side / 2), -1)


def areas(boxes: Tensor) -> Tensor:
    """Returns the area of each box, [..., 4] -> [...]; boxes without area have 0."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the intersection and the union of each pair, both [n, m], of boxes [n, 4] and [m, 4]."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    return shared, areas(first)[:, None] + areas(second)[None] - shared


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Returns intersection over union of each pair, [n, m], of boxes [n, 4] and [m, 4]; 0 where both have no area."""
    shared, union = overlaps(first, second)
    return torch.where(union > 0, shared / union.clamp(min=torch.finfo(union.dtype).tiny), torch.zeros_like(union))


def complete_iou(first: Tensor, second: Tensor) -> Tensor:
    """Returns the complete IoU of boxes one by one, [n]: IoU less the distance of centres and the difference of aspect.

    No gradient flows through the weight of the aspect.

    Source: Zheng et al. 2020, "Distance-IoU Loss", equations 8 to 11.

    Args:
        first: Predicted boxes, [n, 4].
        second: True boxes, [n, 4].
    """
    low, high = torch.maximum(first[:, :2], second[:, :2]), torch.minimum(first[:, 2:], second[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    side, wanted = first[:, 2:] - first[:, :2], second[:, 2:] - second[:, :2]
    union = side.prod(-1) + wanted.prod(-1) - shared + TINY
    plain = shared / union
    hull = torch.maximum(first[:, 2:], second[:, 2:]) - torch.minimum(first[:, :2], second[:, :2])
    distance = (first[:, :2] + first[:, 2:] - second[:, :2] - second[:, 2:]).square().sum(-1) / 4
    angles = [torch.atan(sides[:, 0] / sides[:, 1].clamp(min=TINY)) for sides in (wanted, side)]
    aspect = 4 / math.pi**2 * (angles[0] - angles[1]).square()
    with torch.no_grad():
        weight = aspect / (aspect - plain + 1 + TINY)
    return plain - distance / (hull.square().sum(-1) + TINY) - weight * aspect


def nms(boxes: Tensor, scores: Tensor, limit: float, labels: Tensor | None = None, *, most: int | None = None) -> Tensor:
    """Returns the indices that greedy non-maximum suppression keeps, in descending order of score.

    Greedy: the best box stays, every box of its class whose IoU with it is above ``limit`` goes, and so on. Equal scores count
    in the order given. Blocks of candidates are compared at once: the result is that of the greedy loop, on every device.

    Args:
        boxes: [n, 4].
        scores: [n].
        limit: IoU in [0, 1].
        labels: [n] class of each box; None for one class.
        most: Maximum number of kept boxes, None for all.
    """

    def removes(rows: Tensor, columns: Tensor) -> Tensor:
        close = iou(boxes[rows], boxes[columns]) > limit
        return close if labels is None else close & (labels[rows][:, None] == labels[columns][None])

    order = scores.argsort(descending=True, stable=True)
    kept = order[:0]
    for start in range(0, len(order), BLOCK):
        chunk = order[start : start + BLOCK]
        left = chunk[~removes(kept, chunk).any(0)]
        within = removes(left, left).triu(1)
        kept = torch.cat((kept, left[_settled(within)]))
        if most is not None and len(kept) >= most:
            return kept[:most]
    return kept


def _settled(removes: Tensor) -> Tensor:
    """Returns which candidates stay, [n], if ``removes[i, j]`` says that i, if it stays, removes the later j.

    After k rounds the first k decisions are final, so that the fixed point is the result of the loop over candidates.
    """
    stays = torch.ones(len(removes), dtype=torch.bool, device=removes.device)
    while True:
        again = ~(removes & stays[:, None]).any(0)
        if torch.equal(again, stays):
            return stays
        stays = again
