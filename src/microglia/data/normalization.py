"""Normalization of bytes to network inputs: subtracts a mean, divides by a standard deviation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from microglia.core.errors import DataError
from microglia.core.registry import unknown_name

_CHUNK = 4096
"""Images counted at a time, because ``bincount`` widens its input to int64."""


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation of images scaled to [0, 1].

    Attributes:
        mean: One number per channel, or a single one for every channel.
        std: The same number of positive numbers.

    Raises:
        DataError: When the lengths differ, or a number is not finite, or a ``std`` is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        fits = len(self.mean) == len(self.std) > 0
        if not fits or not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise DataError(
                f"A normalization with mean {self.mean} and std {self.std} cannot be applied; "
                "expected one finite mean and one positive std per channel."
            )

    def check(self, channels: int) -> None:
        """Raises a ``DataError`` unless images of this many channels can be normalized."""
        if len(self.mean) not in {1, channels}:
            raise DataError(
                f"The normalization has {len(self.mean)} channels and the images have {channels}; "
                "expected as many, or a single one. Choose another by name: " + ", ".join(_NAMED) + "."
            )

    def apply(self, images: Tensor) -> Tensor:
        """Returns ``(images / 255 - mean) / std`` as float32, same shape, memory format and device.

        Args:
            images: uint8 [B, C, H, W].

        Raises:
            DataError: When the images are not uint8 or their channels do not fit.
        """
        if images.dtype != torch.uint8:
            raise DataError(f"Images of type {images.dtype} cannot be normalized; expected torch.uint8 in 0..255.")
        self.check(images.shape[1])
        # One multiplication and one addition per value, their constants rounded once from double precision. They are separate
        # operations: a fused one may round differently at the edges of a vector. Then the rows of a batch would depend on its
        # split.
        scale = images.new_tensor([1 / (255 * s) for s in self.std], dtype=torch.float32)
        shift = images.new_tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)], dtype=torch.float32)
        return images.to(torch.float32).mul_(scale.view(1, -1, 1, 1)).add_(shift.view(1, -1, 1, 1))

    @classmethod
    def named(cls, name: str) -> Normalization:
        """Returns the statistics of a name: imagenet, cifar10, mnist, or half (to the range [-1, 1]).

        Raises:
            UnknownNameError: When the name is unknown.
        """
        if name not in _NAMED:
            raise unknown_name("normalization", name, _NAMED)
        return _NAMED[name]

    @classmethod
    def of(cls, images: Tensor) -> Normalization:
        """Returns the statistics of the pixels themselves, from exact counts of the 256 values.

        A channel that never changes has no spread to divide by; its std is set to 1.

        Args:
            images: uint8 [N, C, H, W] with N > 0.

        Returns:
            Mean and population standard deviation per channel, in [0, 1].

        Raises:
            DataError: When there are no images.
        """
        if not len(images):
            raise DataError("No images were given to compute a mean from; expected at least one.")
        moments = [_moments(images[:, channel]) for channel in range(images.shape[1])]
        return cls(tuple(mean for mean, _ in moments), tuple(std or 1.0 for _, std in moments))


def _moments(values: Tensor) -> tuple[float, float]:
    """Returns mean and population standard deviation, in [0, 1], of one channel, uint8 [N, H, W]."""
    counts = torch.zeros(256, dtype=torch.int64)
    for start in range(0, len(values), _CHUNK):
        counts += torch.bincount(values[start : start + _CHUNK].flatten(), minlength=256)
    total, first, second = (sum(n * value**power for value, n in enumerate(counts.tolist())) for power in (0, 1, 2))
    # Integers of any size: nothing is rounded before the last line.
    return first / (255 * total), math.sqrt(second * total - first * first) / (255 * total)


_NAMED = {
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "mnist": Normalization((0.1307,), (0.3081,)),
    "half": Normalization((0.5,), (0.5,)),
}
