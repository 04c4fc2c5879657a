"""Random scale, crop, flip and colour of an image together with its mask, through torchvision's transforms v2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from microglia.core.errors import DataError
from microglia.core.optional import needs
from microglia.core.vision import import_torchvision
from microglia.data.scenes import IGNORED, MULTIPLE, Scene

MEAN_COLOUR = (124, 116, 104)
"""Colour of the border where a scaled image is smaller than the crop: the mean of ImageNet."""


@dataclass(frozen=True)
class SceneAugmentation:
    """Scales a scene, takes a random crop, mirrors half of the scenes on average, and varies the colours.

    The mask follows the image and is scaled to the nearest pixel. The border of a scene smaller than the crop has the class
    `IGNORED`. All draws come from torch's global generator.

    Attributes:
        crop: Height and width of the crop, multiples of 32.
        scales: Smallest and largest scale, drawn uniformly.
        flip: Whether half of the scenes are mirrored left to right.
        colour: Largest relative change of brightness, contrast and saturation, in [0, 1); 0 for none.

    Raises:
        DataError: A number is out of range.
    """

    crop: tuple[int, int]
    scales: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    colour: float = 0.4

    def __post_init__(self) -> None:
        check_size(self.crop, "The crop")
        if not 0 < self.scales[0] <= self.scales[1] or not 0 <= self.colour < 1:
            raise DataError(
                "scales are two positive numbers in ascending order and colour is in [0, 1); got "
                f"{list(self.scales)} and {self.colour}."
            )
        needs("zoo", "torchvision", what="Varying images with masks")

    def __call__(self, image: Tensor, classes: Tensor) -> Scene:
        """Returns a varied scene, uint8 [3, *crop] and uint8 [*crop]."""
        import_torchvision()
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        low, high = self.scales
        scale = low + (high - low) * float(torch.rand(()))
        size = [max(1, round(side * scale)) for side in classes.shape]
        both = [v2.functional.resize(one, size) for one in (tv_tensors.Image(image), tv_tensors.Mask(classes))]
        border = {tv_tensors.Image: MEAN_COLOUR, tv_tensors.Mask: IGNORED}
        steps = [v2.RandomCrop(self.crop, pad_if_needed=True, fill=border)]
        steps += [v2.RandomHorizontalFlip()] if self.flip else []
        steps += [v2.ColorJitter(self.colour, self.colour, self.colour)] if self.colour else []
        image, classes = v2.Compose(steps)(*both)
        return image.as_subclass(Tensor), classes.as_subclass(Tensor)


def check_size(size: tuple[int, int], what: str) -> None:
    """Raises a `DataError` unless height and width are positive multiples of 32."""
    if min(size) < MULTIPLE or any(side % MULTIPLE for side in size):
        near = " x ".join(str(max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE)) for side in size)
        raise DataError(
            f"{what} is {size[0]} x {size[1]} pixels; height and width are multiples of {MULTIPLE}, such as {near}."
        )
