"""Images with boxes in memory: one split, a whole data set, and the count of what was left out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from microglia.core.errors import DataError
from microglia.data.pictures import Pictures


@dataclass(frozen=True)
class LeftOut:
    """The numbers of boxes and images that a reader left out, by reason.

    Attributes:
        boxes: Boxes in the files.
        no_area: Boxes without width or height.
        outside: Boxes outside their image.
        unknown_class: Boxes of a class that is not in the list of classes.
        no_image: Images that are named but have no file.
    """

    boxes: int = 0
    no_area: int = 0
    outside: int = 0
    unknown_class: int = 0
    no_image: int = 0

    def __add__(self, other: LeftOut) -> LeftOut:
        return LeftOut(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def sentence(self) -> str:
        """One sentence for a reader; empty if nothing was left out."""
        said = {
            "have no area": self.no_area,
            "lie outside their image": self.outside,
            "are of no known class": self.unknown_class,
        }
        parts = [f"{count:,} of {self.boxes:,} boxes {what}" for what, count in said.items() if count]
        parts += [f"{self.no_image:,} images have no file"] if self.no_image else []
        return f"{', '.join(parts)}; they are left out." if parts else ""


@dataclass(frozen=True, eq=False)
class BoxSet:
    """Images and their boxes; `n` boxes of an image may be 0.

    Attributes:
        images: uint8 [3, h, w] each, decoded when they are read; perhaps reduced (see `microglia.data.pictures.Pictures`).
        sizes: int64 [N, 2], (height, width) of each original image, in pixels.
        boxes: float32 [n, 4] of each image, (left, top, right, bottom) in pixels of the original image.
        labels: int64 [n] of each image, class indices.
        crowd: bool [n] of each image: regions that are not counted in an evaluation.
        names: Name of each image, for messages.

    Raises:
        DataError: When the lengths differ, or a tensor has another type or shape.
    """

    images: Sequence[Tensor]
    sizes: Tensor
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    crowd: tuple[Tensor, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        lengths = {len(self.images), len(self.sizes), *map(len, (self.boxes, self.labels, self.crowd, self.names))}
        if len(lengths) != 1:
            raise DataError(
                f"Images, sizes, boxes, labels, crowd and names have the lengths {sorted(lengths)}; expected the same for all."
            )
        for name, boxes, labels, crowd in zip(self.names, self.boxes, self.labels, self.crowd, strict=True):
            forms = (boxes.dtype, boxes.shape[1:], labels.dtype, crowd.dtype)
            if forms != (torch.float32, (4,), torch.int64, torch.bool) or not len(boxes) == len(labels) == len(crowd):
                raise DataError(
                    f"The image {name} has boxes {boxes.dtype} {list(boxes.shape)}, labels {labels.dtype} {list(labels.shape)} "
                    f"and crowd {crowd.dtype} {list(crowd.shape)}; expected float32 [n, 4], int64 [n] and bool [n]."
                )

    def __len__(self) -> int:
        return len(self.boxes)

    def subset(self, indices: Sequence[int]) -> BoxSet:
        """Returns the images at ``indices``, in that order."""
        chosen = [int(index) for index in indices]
        images = self.images.subset(chosen) if isinstance(self.images, Pictures) else [self.images[i] for i in chosen]
        parts = [tuple(part[i] for i in chosen) for part in (self.boxes, self.labels, self.crowd, self.names)]
        return BoxSet(images, self.sizes[chosen], *parts)  # type: ignore[arg-type]

    @property
    def count(self) -> int:
        """Number of boxes."""
        return sum(map(len, self.boxes))


@dataclass(frozen=True, eq=False)
class BoxData:
    """A data set for detection.

    Attributes:
        name: The name under which it was loaded.
        classes: Class names; label k means ``classes[k]``.
        train: Images to fit weights on.
        validation: Images to choose settings on; may be empty.
        test: Images to report numbers on.
        left_out: The boxes and images that were left out.
    """

    name: str
    classes: tuple[str, ...]
    train: BoxSet
    validation: BoxSet
    test: BoxSet
    left_out: LeftOut = LeftOut()
