"""The two ends of a connection: networks of one architecture on the same data, their masks folded."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from microglia.core.errors import MicrogliaError
from microglia.core.masks import MaskSet, fold, masks_of
from microglia.lab.target import open_target
from microglia.storage.changes import changes_of
from microglia.studies.images import image_data
from microglia.studies.space.curves import LINE, Curve, on_line
from microglia.studies.space.points import check_alike, point_of
from microglia.tasks.task import Task


@dataclass(frozen=True)
class Ends:
    """The two networks of a connection.

    Attributes:
        targets: As they were given.
        models: With their masks folded, to visit places with.
        points: Where they are in weight space.
        task: Task of the first.
        masks: Those that both have; None where they differ or there are none.
        notes: Remarks on them for a reader.
    """

    targets: tuple[str, str]

    models: tuple[nn.Module, nn.Module]
    points: tuple[dict[str, Tensor], dict[str, Tensor]]
    task: Task
    masks: MaskSet | None
    notes: tuple[str, ...]

    @property
    def line(self) -> Curve:
        """The straight line between them."""
        return on_line(LINE, *self.points)


def open_ends(targets: tuple[str, str], data: str | None = None) -> Ends:
    """Returns the two networks that targets stand for.

    Args:
        targets: See `microglia.lab.target.open_target`.
        data: Data set instead of the runs' own.

    Raises:
        MicrogliaError: A target is none or has gates, or they differ in architecture or data.
    """
    if Path(targets[0]).exists() and Path(targets[0]).resolve() == Path(targets[1]).resolve():
        raise MicrogliaError(f"Both ends are {targets[0]}; a connection needs two different networks.")
    (one, task), (other, its_task) = (open_target(target, data) for target in targets)
    for target, model in zip(targets, (one, other), strict=True):
        chooses = next((done.kind.chooses for done in changes_of(model).values() if done.kind.chooses), None)
        if chooses is not None:
            raise MicrogliaError(
                f"{target} has {chooses}, whose choices no path can pass smoothly; give networks without {chooses}."
            )
    _check_data(targets, task, its_task)
    masks = (masks_of(one), masks_of(other))
    models = (fold(deepcopy(one)), fold(deepcopy(other)))
    points = (point_of(models[0]), point_of(models[1]))
    check_alike(*points)
    same = masks[0] if masks[0] and masks[0].same(masks[1]) else None
    notes: tuple[str, ...] = ()
    if same is not None:
        notes = (
            f"Both networks have the same masks (density {same.density:.4g}), and every place of the paths keeps to them.",
        )
    elif masks[0] or masks[1]:
        notes = ("The networks have different masks, so between them the paths use weights that one or the other has pruned.",)
    return Ends(targets, models, points, task, same, notes)


def _check_data(targets: Sequence[str], task: Task, other: Task) -> None:
    one, two = image_data(task), image_data(other)
    same = one.test.images.shape == two.test.images.shape and torch.equal(one.test.images, two.test.images)
    if not same or one.normalization != two.normalization:
        raise MicrogliaError(
            f"{targets[0]} and {targets[1]} are on different data ({one.name} and {two.name}, or other normalization), so no "
            "loss is common to them; give runs on the same data, or --data."
        )
