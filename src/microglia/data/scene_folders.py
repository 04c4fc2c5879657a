"""Folders of images and masks: the layout of CamVid and most others, and that of Cityscapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from microglia.core.errors import DataError
from microglia.data.sources import split_names

IMAGES = ("images", "image", "imgs", "JPEGImages")
MASKS = ("annotations", "masks", "labels", "SegmentationClass")
"""Names of the folders of images and of masks, in order of preference."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
"""Endings of images, and of masks, which are stored without loss."""
CLASSES = "classes.txt"
"""File beside the folders with one class name on each line, that of number 0 first."""

CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light", 20: "traffic sign",
    21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
    32: "motorcycle", 33: "bicycle",
}  # fmt: skip
"""The 19 classes of Cityscapes that are trained on, by their number in ``labelIds`` images; the other numbers are ignored."""
CITYSCAPES_IDS = 34
"""Numbers of ``labelIds`` images: 0 to 33."""

Pair = tuple[Path, Path]
"""Image, and its mask, which may be missing."""


@dataclass(frozen=True)
class SceneFolder:
    """A data set of scenes on disk.

    Attributes:
        splits: Pairs of files by split; train is one of them.
        classes: Class names, or None where only the masks show how many there are.
        numbers: Number in a mask -> class, or None for a class that is ignored; None for the numbers as they are.
    """

    splits: Mapping[str, list[Pair]]
    classes: tuple[str, ...] | None = None
    numbers: Mapping[int, int | None] | None = None


def scene_folder(root: Path) -> SceneFolder:
    """Returns the scenes under a folder.

    Args:
        root: Holds ``leftImg8bit`` and ``gtFine`` (Cityscapes); or ``images`` beside ``annotations``, ``masks`` or ``labels``,
            each with ``train`` and perhaps ``val`` and ``test``, or with the files directly. A mask has the name of its image.
            ``classes.txt`` names the classes.

    Raises:
        DataError: The folder has neither layout, or no training images.
    """
    if (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir():
        return _cityscapes(root)
    images = next((root / name for name in IMAGES if (root / name).is_dir()), None)
    masks = next((root / name for name in MASKS if (root / name).is_dir()), None)
    if images is None or masks is None:
        raise DataError(
            f"The folder {root} holds no images with masks; expected {IMAGES[0]}/ beside {', '.join(MASKS[:-1])} or "
            f"{MASKS[-1]}, or leftImg8bit/ beside gtFine/ as Cityscapes has them."
        )
    names = split_names((path.name for path in images.iterdir() if path.is_dir()), f"The folder {images}")
    places = {split: Path(name) for split, name in names.items()} or {"train": Path()}
    splits = {split: _pairs(images / place, masks / place) for split, place in places.items()}
    if not splits.get("train"):
        raise DataError(f"The folder {images / places.get('train', Path('train'))} holds no training images; expected some.")
    return SceneFolder(splits, _class_names(root))


def _pairs(images: Path, masks: Path) -> list[Pair]:
    """Returns the images below a folder in order, each with the mask of the same name below the other one."""
    pairs = []
    for image in sorted(path for path in images.rglob("*") if path.suffix.lower() in SUFFIXES):
        place = masks / image.relative_to(images).with_suffix("")
        candidates = [place.with_name(place.name + suffix) for suffix in MASK_SUFFIXES]
        pairs.append((image, next((path for path in candidates if path.is_file()), candidates[0])))
    return pairs


def _class_names(root: Path) -> tuple[str, ...] | None:
    path = root / CLASSES
    if not path.is_file():
        return None
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as lines of class names: {error}.") from error
    if len(names) < 2 or len(set(names)) < len(names):
        raise DataError(f"{path} has the lines {', '.join(names) or 'nothing'}; expected two or more different class names.")
    return names


def _cityscapes(root: Path) -> SceneFolder:
    """Returns Cityscapes: its ``val`` is the test split, because the labels of its ``test`` are not public."""
    splits = {"train": _city_pairs(root, "train"), "test": _city_pairs(root, "val")}
    for split, folder in (("train", "train"), ("test", "val")):
        if not splits[split]:
            raise DataError(f"The folder {root / 'leftImg8bit' / folder} holds no *_leftImg8bit.png; expected some.")
    place = {number: index for index, number in enumerate(CITYSCAPES)}
    return SceneFolder(splits, tuple(CITYSCAPES.values()), {number: place.get(number) for number in range(CITYSCAPES_IDS)})


def _city_pairs(root: Path, split: str) -> list[Pair]:
    images = root / "leftImg8bit" / split
    pairs = []
    for image in sorted(images.rglob("*_leftImg8bit.png")):
        name = image.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png")
        pairs.append((image, root / "gtFine" / split / image.parent.relative_to(images) / name))
    return pairs
