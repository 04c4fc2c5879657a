"""Annotations of COCO: one JSON file per split."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from microglia.core.errors import DataError
from microglia.data.annotated import Annotated, Found, Object, inside
from microglia.data.sources import split_names

ROBOFLOW = "_annotations.coco.json"
"""Name of the annotations beside the images of a split, in exports of that service."""
Json = dict[str, Any]


def coco_files(root: Path) -> dict[str, tuple[Path, list[Path]]]:
    """Returns, for each split, the annotations and the folders in which its images may be; empty for another folder.

    Known layouts: ``annotations/instances_{split}.json`` (such as ``instances_train2017.json``) with images in ``{split}``,
    ``images/{split}`` or ``images``; and ``{split}/_annotations.coco.json`` beside the images.
    """
    files = {path.stem.removeprefix("instances_"): path for path in sorted((root / "annotations").glob("*.json"))}
    files = {name: path for name, path in files.items() if not name.startswith(("person_keypoints", "captions", "panoptic"))}
    names = split_names({name.rstrip("0123456789") for name in files}, f"The folder {root / 'annotations'}")
    found: dict[str, tuple[Path, list[Path]]] = {}
    for split, plain in names.items():
        name = next(name for name in files if name.rstrip("0123456789") == plain)
        found[split] = (
            files[name],
            [root / name, root / "images" / name, root / plain, root / "images" / plain, root / "images"],
        )
    if found:
        return found
    beside = {path.parent.name: path for path in sorted(root.glob(f"*/{ROBOFLOW}"))}
    return {split: (beside[name], [root / name]) for split, name in split_names(beside, f"The folder {root}").items()}


def read_coco(root: Path, classes: tuple[str, ...] | None = None) -> Found:
    """Returns the annotations of a folder in one of the layouts of `coco_files`.

    Labels are the categories in the order of their ids. A data set with train and validation but without test annotations, as
    COCO itself has it, is judged on the validation images: they become the test split.

    Args:
        root: The folder.
        classes: Names of the classes; None for the categories of the training split.

    Raises:
        DataError: A file is not valid, or there is no training split.
    """
    files = coco_files(root)
    if "train" not in files:
        raise DataError(f"The folder {root} has annotations of {', '.join(files) or 'no split'}; expected train among them.")
    found = {split: _split(path, folders) for split, (path, folders) in files.items()}
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    return Found({split: images for split, (images, _) in found.items()}, classes or found["train"][1])


def _split(path: Path, folders: list[Path]) -> tuple[list[Annotated], tuple[str, ...]]:
    """Returns the images of one file, in the order of their ids, and its categories."""
    content = _content(path)
    try:
        names = {int(one["id"]): str(one["name"]) for one in content["categories"]}
        files = {int(one["id"]): str(one["file_name"]) for one in content["images"]}
        objects: dict[int, list[Object]] = {number: [] for number in files}
        for one in content["annotations"]:
            left, top, width, height = map(float, one["bbox"])
            named = names.get(int(one["category_id"]), f"category {one['category_id']}")
            corners = (left, top, left + width, top + height)
            objects[int(one["image_id"])].append(Object(named, corners, bool(one.get("iscrowd", 0))))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no COCO annotation of boxes: {type(error).__name__}, {str(error)[:200]}.") from error
    images = [Annotated(_place(folders, files[k], path), files[k], tuple(objects[k])) for k in sorted(files)]
    return images, tuple(names[k] for k in sorted(names))


def _content(path: Path) -> Json:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({str(error)[:200]}); mend or remove it.") from error
    if not isinstance(content, Mapping) or not {"images", "annotations", "categories"} <= content.keys():
        raise DataError(f"{path} is no COCO annotation; expected images, annotations and categories in it.")
    return dict(content)


def _place(folders: list[Path], name: str, where: Path) -> Path:
    places = [inside(folder, name, where) for folder in folders]
    return next((place for place in places if place.is_file()), places[0])
