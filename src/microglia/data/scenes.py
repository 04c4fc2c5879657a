"""Images with a class for every pixel: one split, a whole data set, and the form of its batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from microglia.core.errors import DataError
from microglia.data.normalization import Normalization

IGNORED = 255
"""Class of a pixel that counts neither in a loss nor in a metric."""
MULTIPLE = 32
"""Height and width of every batch are multiples of this."""

Scene = tuple[Tensor, Tensor]
"""Image, uint8 [3, H, W], and the class of every pixel, uint8 [H, W]."""
Vary = Callable[[Tensor, Tensor], Scene]
"""Random variation of (image, classes); it draws from the global generators, which are seeded for each sample."""


@dataclass(frozen=True, eq=False)
class SceneSet:
    """Images with a class for every pixel, a map-style dataset of `Scene`.

    Attributes:
        scenes: The scenes in memory, or any sequence that reads them on access.
        vary: Random variation of a scene, or None.
    """

    scenes: Sequence[Scene]
    vary: Vary | None = None

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.scenes)

    def __getitem__(self, index: int) -> Scene:
        """Returns one scene, varied if the set varies its scenes.

        Raises:
            DataError: The scene has another type or another shape.
        """
        image, classes = self.scenes[index]
        if image.dtype != torch.uint8 or image.ndim != 3 or classes.dtype != torch.uint8 or classes.shape != image.shape[1:]:
            raise DataError(
                f"Scene {index} is {image.dtype} {list(image.shape)} with classes {classes.dtype} {list(classes.shape)}; "
                "expected torch.uint8 [3, H, W] and [H, W]."
            )
        return (image, classes) if self.vary is None else self.vary(image, classes)


@dataclass(frozen=True, eq=False)
class SceneData:
    """A data set for segmentation.

    Attributes:
        name: The name under which it was loaded.
        classes: Class names; pixel value k means ``classes[k]``, and `IGNORED` means no class.
        train: Scenes to fit weights on.
        validation: Scenes to choose hyperparameters on; may be empty.
        test: Scenes to report numbers on.
        left_out: Number of images that were left out for a bad annotation.
    """

    name: str
    classes: tuple[str, ...]
    train: SceneSet
    validation: SceneSet
    test: SceneSet
    left_out: int = 0


def padded_side(side: int, multiple: int = MULTIPLE) -> int:
    """Returns the smallest multiple that is not below a side."""
    return -(-side // multiple) * multiple


@dataclass(frozen=True)
class SceneCollate:
    """Combines scenes to one batch: (inputs, targets), float32 [B, 3, H, W] in channels-last layout and int64 [B, H, W].

    H and W are the smallest multiples of ``multiple`` that hold every scene. Each image gets zeros to its right and below (the
    mean colour, after the normalization), which have the class `IGNORED`.

    Attributes:
        normalization: Turns bytes into network inputs.
        multiple: Divides the height and the width of the batch.
    """

    normalization: Normalization
    multiple: int = MULTIPLE

    def __call__(self, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
        """Returns the batch of scenes."""
        height, width = (padded_side(max(classes.shape[k] for _, classes in scenes), self.multiple) for k in (0, 1))
        inputs, targets = [], []
        for image, classes in scenes:
            room = (0, width - classes.shape[1], 0, height - classes.shape[0])
            inputs.append(F.pad(self.normalization.apply(image[None]), room))
            targets.append(F.pad(classes[None], room, value=IGNORED))
        return torch.cat(inputs).contiguous(memory_format=torch.channels_last), torch.cat(targets).long()
