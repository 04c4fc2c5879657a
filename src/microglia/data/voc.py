"""Annotations of PASCAL VOC: one XML file per image, lists of names per split."""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element

from microglia.core.errors import DataError
from microglia.data.annotated import Annotated, Found, Object, inside
from microglia.data.plain_xml import read_xml

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".JPG", ".JPEG", ".PNG")
LISTS = {"train": "train", "validation": "val", "test": "test"}
"""Split -> name of its list in ``ImageSets/Main``."""
NO_ANNOTATION = (
    "The image {name} has no annotation {path}; write one (without objects for an empty image), or remove the image."
)


def voc_root(root: Path) -> Path | None:
    """Returns the folder with ``Annotations`` of XML files: the folder itself, or the one below it; None without one."""
    below = sorted({*root.glob("*/Annotations"), *root.glob("*/*/Annotations")})
    for folder in [root / "Annotations", *(below if len(below) == 1 else [])]:
        if next(folder.glob("*.xml"), None) is not None:
            return folder.parent
    return None


def read_voc(root: Path, classes: tuple[str, ...] | None = None, *, origin: int = 0) -> Found:
    """Returns the annotations of a folder with ``Annotations/*.xml``, ``JPEGImages`` and perhaps ``ImageSets/Main/*.txt``.

    Args:
        root: The folder.
        classes: Names of the classes; None for all that occur, in alphabetical order.
        origin: Coordinate of the first pixel. In the original VOC data it is 1, in most sets that share its form it is 0.

    Raises:
        DataError: An image has no annotation, or an annotation cannot be read.
    """
    pictures = root / "JPEGImages" if (root / "JPEGImages").is_dir() else root / "images"
    if not pictures.is_dir():
        raise DataError(f"The folder {root} has Annotations but no JPEGImages; expected the images there.")
    lists = {split: root / "ImageSets" / "Main" / f"{name}.txt" for split, name in LISTS.items()}
    named = {split: _names(path) for split, path in lists.items() if path.is_file()}
    if "train" not in named:
        named = {"train": sorted({p.stem for p in pictures.iterdir() if p.suffix in SUFFIXES})}
    splits = {split: [_image(root, pictures, name, origin) for name in names] for split, names in named.items()}
    found = {o.name for images in splits.values() for image in images for o in image.objects}
    return Found(splits, classes or tuple(sorted(found)))


def _names(path: Path) -> list[str]:
    """Returns the names of a list; a second word of a line, which some lists have, says whether the object is there."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    names = [words[0] for words in lines]
    for name in names:
        if name != inside(path.parent, name, path).name:
            raise DataError(f"{path} names the image {name[:200]!r}; expected the name of a file without its folder.")
    return names


def _image(root: Path, pictures: Path, name: str, origin: int) -> Annotated:
    path = root / "Annotations" / f"{name}.xml"
    if not path.is_file():
        raise DataError(NO_ANNOTATION.format(name=name, path=path))
    files = (pictures / f"{name}{suffix}" for suffix in SUFFIXES)
    picture = next((file for file in files if file.is_file()), pictures / f"{name}{SUFFIXES[0]}")
    return Annotated(picture, name, tuple(_object(one, path, origin) for one in read_xml(path).iter("object")))


def _object(one: Element, path: Path, origin: int) -> Object:
    name, box = one.findtext("name"), one.find("bndbox")
    if not name or box is None:
        raise DataError(f"An object in {path} has no name or no bndbox; expected both.")
    try:
        left, top, right, bottom = (float(box.findtext(key, "")) for key in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        raise DataError(f"The box of {name!r} in {path} lacks a number; expected xmin, ymin, xmax and ymax.") from None
    difficult = (one.findtext("difficult") or "0").strip() == "1"
    return Object(name.strip(), (left - origin, top - origin, right, bottom), difficult)
