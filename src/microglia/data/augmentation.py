"""Random crops and flips of whole batches, on bytes, without a loop over the images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from microglia.core.errors import DataError


@dataclass(frozen=True, eq=False)
class Crops:
    """The random draws for each of B images; slicing selects images.

    Attributes:
        rows: int64 [B], first row of the crop in the padded image, 0..2 * pad.
        columns: int64 [B], first column, likewise.
        flips: bool [B], whether the crop is mirrored left to right.
    """

    rows: Tensor
    columns: Tensor
    flips: Tensor

    def __getitem__(self, part: slice) -> Crops:
        return Crops(self.rows[part], self.columns[part], self.flips[part])


@dataclass(frozen=True)
class Augmentation:
    """Pads with black, crops at a random position to the old size, then mirrors half of the images on average.

    It works on bytes, before the normalization, so the border is black and not the mean colour. This is the recipe of He et
    al., "Deep Residual Learning" (2016), section 4.2, in the order of torchvision's ``RandomCrop(size, padding=pad)`` and
    ``RandomHorizontalFlip()``. Drawing and applying are two steps, so that a rank can draw for the whole batch and move only
    its own pixels.

    Attributes:
        pad: Pixels of border on each side, 0 or more.
        flip: Whether half of the images are mirrored.

    Raises:
        DataError: When ``pad`` is negative.
    """

    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise DataError(f"The augmentation's pad is {self.pad}; expected 0 or more pixels.")

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Returns randomly varied images: ``draw``, then ``apply``.

        Args:
            images: uint8 [B, C, H, W].
            generator: The only source of randomness, a CPU generator.

        Returns:
            uint8 [B, C, H, W]; the input stays unchanged.
        """
        return self.apply(images, self.draw(len(images), generator))

    def draw(self, count: int, generator: Generator) -> Crops:
        """Returns crops for ``count`` images, every offset and both directions equally likely."""
        offsets = torch.randint(0, 2 * self.pad + 1, (2, count), generator=generator)
        mirrored = torch.randint(0, 2, (count,), generator=generator, dtype=torch.uint8).bool()
        return Crops(offsets[0], offsets[1], mirrored if self.flip else torch.zeros_like(mirrored))

    def apply(self, images: Tensor, crops: Crops) -> Tensor:
        """Returns the crops of the images, on the images' device.

        Args:
            images: uint8 [B, C, H, W].
            crops: One crop per image, as ``draw`` gives them.

        Returns:
            uint8 [B, C, H, W]; the input stays unchanged.
        """
        height, width = images.shape[-2:]
        padded = F.pad(images, (self.pad,) * 4)
        # Every possible crop as a view: [B, rows, columns, C, H, W] without a copy; the index copies one per image.
        windows = padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
        device = images.device
        cropped = windows[torch.arange(len(images), device=device), crops.rows.to(device), crops.columns.to(device)]
        mirrored = crops.flips.nonzero().squeeze(1).to(device)
        return cropped.index_copy_(0, mirrored, cropped.index_select(0, mirrored).flip(-1))
