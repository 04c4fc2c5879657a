"""Loads a data set for detection by its name or its folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from microglia.core.errors import DataError
from microglia.data.annotated import Annotated, Found, box_set
from microglia.data.boxes import BoxData, LeftOut
from microglia.data.coco import coco_files, read_coco
from microglia.data.splits import stratified_split
from microglia.data.voc import read_voc, voc_root

TEST = (0.2, 1)
VALIDATION_SEED = 2
FORMS = (
    "PASCAL VOC (Annotations/*.xml, JPEGImages, ImageSets/Main/*.txt) or COCO (annotations/instances_train.json and images, or "
    "train/_annotations.coco.json)"
)


def load_boxes(
    name: str | Path,
    *,
    classes: Sequence[str] | None = None,
    strict: bool = False,
    fit: tuple[int, int] | None = None,
    validation: float = 0.1,
    origin: int = 0,
) -> BoxData:
    """Loads images with boxes, a folder of PASCAL VOC or COCO annotations.

    Images are decoded when they are first used. Splits are the data set's own. A missing test split (20 %) and a missing
    validation split are carved from the training images, the same on every machine. Boxes without area, outside their image
    or of an unknown class, and images without a file, are left out with a warning that says how many.

    Args:
        name: Name of a folder under ``$MICROGLIA_DATA``, such as ``bccd``, or a path.
        classes: Names of the classes, in the order of labels; by default those of the data.
        strict: Whether a box or image that would be left out is refused by name instead.
        fit: (height, width) into which larger images are reduced in memory; None keeps their size.
        validation: Share of the training images to carve, in [0, 1).
        origin: Coordinate of the first pixel in VOC annotations; see `microglia.data.voc.read_voc`.

    Raises:
        DataError: There is no such folder, it has neither form, an annotation is missing or damaged, or there are no images.
    """
    root = _root(str(name))
    chosen = tuple(classes) if classes is not None else None
    found = _read(root, chosen, origin)
    if not found.classes:
        raise DataError(f"The data set {name} has no boxes; expected some objects in its annotations.")
    splits = _carved(found.splits, validation)
    read = {split: box_set(images, found.classes, fit=fit, strict=strict) for split, images in splits.items()}
    left = sum((left for _, left in read.values()), LeftOut())
    train, test = len(read["train"][0]), len(read["test"][0])
    if not train or not test:
        raise DataError(f"The data set {name} has {train} training images and {test} test images; expected some of both.")
    if left.sentence:
        warnings.warn(f"{name}: {left.sentence}", stacklevel=2)
    return BoxData(str(name), found.classes, **{split: boxes for split, (boxes, _) in read.items()}, left_out=left)


def _root(name: str) -> Path:
    shared = os.environ.get("MICROGLIA_DATA")
    local = Path(shared) / name if shared and name and not name.startswith((".", "~")) else None
    if local is not None and local.is_dir():
        return local
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    under = f", and {shared} has none of this name" if shared else "; the environment variable MICROGLIA_DATA is not set"
    raise DataError(f"There is no folder {path}{under}. Give the path of a folder with annotations of {FORMS}.")


def _read(root: Path, classes: tuple[str, ...] | None, origin: int) -> Found:
    voc = voc_root(root)
    if voc is not None:
        return read_voc(voc, classes, origin=origin)
    if coco_files(root):
        return read_coco(root, classes)
    raise DataError(f"The folder {root} holds no images with boxes; expected {FORMS}.")


def _carved(splits: dict[str, list[Annotated]], validation: float) -> dict[str, list[Annotated]]:
    """Returns all three splits; the missing ones are carved from the training images."""
    carved = dict(splits)
    for split, fraction, seed in (("test", *TEST), ("validation", validation, VALIDATION_SEED)):
        if split in carved:
            continue
        train = carved["train"]
        if len(train) < 2 or not fraction:
            carved[split] = []
            continue
        kept, taken = stratified_split(torch.zeros(len(train), dtype=torch.int64), fraction, seed)
        carved["train"], carved[split] = [train[i] for i in kept.tolist()], [train[i] for i in taken.tolist()]
    return carved
