"""Findings of readers of annotations, and the checks that turn them into images with boxes in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from microglia.core.errors import DataError
from microglia.data.boxes import BoxSet, LeftOut
from microglia.data.pictures import Pictures, header_size

Size = tuple[int, int]
Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Object:
    """One annotated object.

    Attributes:
        name: Name of its class.
        corners: (left, top, right, bottom) in pixels.
        crowd: Whether an evaluation leaves it out: a group of objects, or one that is marked as difficult.
    """

    name: str
    corners: Corners
    crowd: bool = False


@dataclass(frozen=True)
class Annotated:
    """One image file with its objects.

    Attributes:
        path: The image file.
        name: Its name, for messages.
        objects: Its objects, none for an empty image.
    """

    path: Path
    name: str
    objects: tuple[Object, ...] = ()


@dataclass(frozen=True)
class Found:
    """The annotations of a data set.

    Attributes:
        splits: Images by split (``train`` is always there).
        classes: Class names, in the order of labels.
    """

    splits: dict[str, list[Annotated]]
    classes: tuple[str, ...]


@dataclass
class _Checks:
    """The checks of boxes; what does not pass is counted, or refused by name."""

    classes: dict[str, int]
    strict: bool
    left: LeftOut = field(default_factory=LeftOut)

    def passes(self, one: Object, size: Size, name: str) -> Corners | None:
        """Returns the corners inside the image of (height, width); None for a box that is left out."""
        self.left = replace(self.left, boxes=self.left.boxes + 1)
        if not all(map(math.isfinite, one.corners)):
            raise DataError(f"The image {name} has a box of {one.name!r} at {one.corners}; expected four finite numbers.")
        left, top, right, bottom = one.corners
        inside = (max(left, 0.0), max(top, 0.0), min(right, float(size[1])), min(bottom, float(size[0])))
        if one.name not in self.classes:
            return self._without(
                "unknown_class", f"a box of the class {one.name!r}, which is none of {list(self.classes)}", name
            )
        if right <= left or bottom <= top:
            return self._without("no_area", f"a box of {one.name!r} without area, {one.corners}", name)
        if inside[2] <= inside[0] or inside[3] <= inside[1]:
            return self._without(
                "outside", f"a box of {one.name!r} outside its {size[1]}x{size[0]} pixels, {one.corners}", name
            )
        return inside

    def no_image(self, one: Annotated) -> None:
        """Counts an image without a file."""
        self._without("no_image", f"no file {one.path}", one.name)

    def _without(self, reason: str, what: str, name: str) -> Corners | None:
        """Counts what is left out, and returns None."""
        if self.strict:
            raise DataError(f"The image {name} has {what}; mend it, or read the data with strict=False to leave it out.")
        self.left = replace(self.left, **{reason: getattr(self.left, reason) + 1})
        return None


def box_set(
    images: Sequence[Annotated], classes: Sequence[str], *, fit: Size | None = None, strict: bool = False
) -> tuple[BoxSet, LeftOut]:
    """Returns annotated images as one split in memory, and the numbers of what was left out.

    Boxes are clipped to their image. A box without area, outside its image or of another class is left out, and so is an image
    without a file.

    Args:
        images: The images of the split.
        classes: Names of the classes; a label is a place in this list.
        fit: See `microglia.data.pictures.Pictures`.
        strict: Whether such a box or image is refused by name instead.

    Raises:
        DataError: An image file cannot be read, a corner is no finite number, or ``strict`` refuses something.
    """
    checks = _Checks({name: label for label, name in enumerate(classes)}, strict)
    kept: list[Annotated] = []
    sizes: list[Size] = []
    corners: list[Tensor] = []
    labels: list[Tensor] = []
    crowd: list[Tensor] = []
    for one in images:
        if not one.path.is_file():
            checks.no_image(one)
            continue
        size = header_size(one.path)
        passed = [(inside, o) for o in one.objects if (inside := checks.passes(o, size, one.name)) is not None]
        kept.append(one)
        sizes.append(size)
        corners.append(torch.tensor([inside for inside, _ in passed], dtype=torch.float32).reshape(-1, 4))
        labels.append(torch.tensor([checks.classes[o.name] for _, o in passed], dtype=torch.int64))
        crowd.append(torch.tensor([o.crowd for _, o in passed], dtype=torch.bool))
    pictures = Pictures([one.path for one in kept], sizes, fit)
    shapes = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)
    names = tuple(one.name for one in kept)
    return BoxSet(pictures, shapes, tuple(corners), tuple(labels), tuple(crowd), names), checks.left


def inside(folder: Path, name: str, where: Path) -> Path:
    """Returns the path of a file that an annotation names, below a folder.

    Raises:
        DataError: The name is empty, absolute or leaves the folder.
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    if not parts.name or parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
        raise DataError(f"{where} names the image {name[:200]!r}; expected a file below {folder}.")
    return folder / parts
