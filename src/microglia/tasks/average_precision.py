"""Average precision of detections as COCO defines it, in double precision and without compiled operators.

Source: the definition of the COCO challenge (Lin et al. 2014); equal to ``pycocotools`` for all areas and 100 detections.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from microglia.tasks.boxes import areas, overlaps

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU from which a detection counts as right."""
RECALLS = np.linspace(0.0, 1.0, 101)
"""Points at which precision is read."""
MOST = 100
"""Detections of an image and a class that count, the best ones."""
Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def average_precision(pairs: Sequence[tuple[Tensor, Tensor]], classes: Sequence[str]) -> dict[str, float]:
    """Returns ``map`` (mean over IoU 0.50 to 0.95), ``map50`` (IoU 0.50), and ``map/NAME`` of each class with true boxes.

    Args:
        pairs: (detections, truth) of every image, in their order. Detections are [n, 6]: corners, score, class. Truth is
            [m, 6]: corners, class, and 1 for a crowd region, which no detection has to find.
        classes: Names of the classes. A class without true boxes is left out of the means; without any, both are 0.
    """
    each = {name: value for k, name in enumerate(classes) if (value := class_precision(pairs, k)) is not None}
    if not each:
        return {"map": 0.0, "map50": 0.0}
    values = np.stack(list(each.values()))
    own = {f"map/{name}": float(value.mean()) for name, value in each.items()}
    return {"map": float(values.mean()), "map50": float(values[:, 0].mean()), **own}


def class_precision(pairs: Sequence[tuple[Tensor, Tensor]], label: int) -> Array | None:
    """Returns the average precision of one class at each of `THRESHOLDS`; None for a class without true boxes."""
    scores: list[Array] = []
    hits: list[Flags] = []
    ignored: list[Flags] = []
    wanted = 0
    for detections, truth in pairs:
        own, real = detections[detections[:, 5] == label].double().cpu(), truth[truth[:, 4] == label].double().cpu()
        best = np.argsort(-own[:, 4].numpy(), kind="stable")[:MOST].copy()
        own = own[best]
        crowd = real[:, 5].numpy() > 0
        wanted += int((~crowd).sum())
        hit, left = matched(own[:, :4], real[:, :4], crowd)
        scores.append(own[:, 4].numpy())
        hits.append(hit)
        ignored.append(left)
    if not wanted:
        return None
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return _read(np.concatenate(hits, 1)[:, order], np.concatenate(ignored, 1)[:, order], wanted)


def matched(detections: Tensor, truth: Tensor, crowd: Flags) -> tuple[Flags, Flags]:
    """Returns, for one image and class, which detections are right and which are not counted, both [thresholds, n].

    Each detection, the best first, takes the free true box of largest IoU at or above the threshold; the later one of equals.
    One that finds none, but lies in a crowd region, is not counted.

    Args:
        detections: float64 [n, 4], in descending order of score.
        truth: float64 [m, 4].
        crowd: bool [m].
    """
    shape = (len(THRESHOLDS), len(detections))
    hit, ignored = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    if not len(detections) or not len(truth):
        return hit, ignored
    shared, union = overlaps(detections, truth)
    union[:, crowd] = areas(detections)[:, None]
    ratio = (shared / union.clamp(min=np.finfo(np.float64).tiny)).numpy()
    plain, regions = ratio[:, ~crowd], ratio[:, crowd]
    free = np.ones((len(THRESHOLDS), plain.shape[1]), dtype=bool)
    rows = np.arange(len(THRESHOLDS))
    last = plain.shape[1] - 1
    for index in range(len(detections)):
        if last >= 0 and plain[index].max() >= THRESHOLDS[0]:
            fit = np.where(free & (plain[index] >= THRESHOLDS[:, None]), plain[index], -1.0)
            best = last - fit[:, ::-1].argmax(1)
            hit[:, index] = fit[rows, best] >= 0
            free[rows, best] &= ~hit[:, index]
        if regions.shape[1]:
            ignored[:, index] = ~hit[:, index] & (regions[index].max() >= THRESHOLDS)
    return hit, ignored


def _read(hits: Flags, ignored: Flags, wanted: int) -> Array:
    """Returns the mean precision at `RECALLS` for each threshold, from detections in descending order of score."""
    found = np.zeros(len(THRESHOLDS))
    for place, (hit, left) in enumerate(zip(hits, ignored, strict=True)):
        right = np.cumsum(hit & ~left).astype(np.float64)
        wrong = np.cumsum(~hit & ~left).astype(np.float64)
        precision = right / (right + wrong + np.spacing(1))
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(right / wanted, RECALLS, side="left")
        found[place] = (
            np.where(at < len(precision), precision[np.minimum(at, len(precision) - 1)], 0.0).mean() if len(precision) else 0
        )
    return found
