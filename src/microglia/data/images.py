"""Images in memory: one split, and a whole data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microglia.core.errors import DataError
from microglia.data.augmentation import Augmentation
from microglia.data.normalization import Normalization


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images and their labels.

    Attributes:
        images: uint8 [N, C, H, W], values 0..255.
        labels: int64 [N], class indices.

    Raises:
        DataError: When a tensor has another type or shape, or the two lengths differ.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(
                f"The images are {self.images.dtype} of shape {list(self.images.shape)}; "
                "expected torch.uint8 of shape [N, C, H, W]."
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"The labels are {self.labels.dtype} of shape {list(self.labels.shape)}; "
                f"expected torch.int64 of shape [{len(self.images)}], one per image."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """Returns a copy of the images at ``indices``, in that order; an index may repeat.

        Args:
            indices: Integers in [0, N).

        Raises:
            DataError: When an index is not an integer or is out of range.
        """
        # An empty list has no type of its own: torch would call it float32.
        chosen = torch.as_tensor(indices) if len(indices) else torch.zeros(0, dtype=torch.int64)
        if chosen.dtype == torch.bool or chosen.is_floating_point():
            raise DataError(f"Indices of type {chosen.dtype} do not choose images; expected integers.")
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(self):
            raise DataError(f"Indices run from {int(chosen.min())} to {int(chosen.max())}; expected 0 to {len(self) - 1}.")
        chosen = chosen.to(torch.int64)
        return ImageSet(self.images.index_select(0, chosen), self.labels.index_select(0, chosen))


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set for classification, ready to train on.

    Attributes:
        name: The name under which it was loaded.
        classes: Class names; label k means ``classes[k]``.
        train: Images to fit weights on.
        validation: Images to choose hyperparameters and checkpoints on; empty only if none were requested.
        test: Images to report numbers on.
        normalization: The normalization of the images.
        augmentation: Random variation of the training images, or None.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    normalization: Normalization
    augmentation: Augmentation | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width
