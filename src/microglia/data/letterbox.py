"""Letterbox: an image reduced to fit a canvas with its proportions, in the middle of a grey border."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GREY = 114
"""Value of the border, of 255."""


def fitted(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Returns the (height, width) of an image reduced to fit a canvas; a smaller image keeps its size."""
    ratio = min(canvas[0] / size[0], canvas[1] / size[1], 1.0)
    return max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))


@dataclass(frozen=True)
class Placement:
    """The place of an image on a canvas: original (x, y) becomes (x * scale[0] + offset[0], y * scale[1] + offset[1]).

    Attributes:
        scale: Factors of x and y.
        offset: Left and upper border, in pixels of the canvas.
    """

    scale: tuple[float, float]
    offset: tuple[int, int]

    @classmethod
    def of(cls, size: tuple[int, int], canvas: tuple[int, int]) -> Placement:
        """Returns the place of an image of (height, width) on a canvas of (height, width)."""
        height, width = fitted(size, canvas)
        return cls((width / size[1], height / size[0]), ((canvas[1] - width) // 2, (canvas[0] - height) // 2))

    def apply(self, boxes: Tensor) -> Tensor:
        """Returns boxes (left, top, right, bottom) of the original image as boxes on the canvas, [n, 4]."""
        return boxes * boxes.new_tensor(self.scale * 2) + boxes.new_tensor(self.offset * 2)

    def undo(self, boxes: Tensor) -> Tensor:
        """Returns boxes on the canvas as boxes of the original image, [n, 4]."""
        return (boxes - boxes.new_tensor(self.offset * 2)) / boxes.new_tensor(self.scale * 2)


def letterbox(image: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Returns an image in the middle of a grey canvas.

    Args:
        image: uint8 [3, h, w], not larger than the canvas.
        canvas: (height, width).
    """
    height, width = image.shape[-2:]
    left, top = (canvas[1] - width) // 2, (canvas[0] - height) // 2
    placed = torch.full((3, *canvas), GREY, dtype=torch.uint8)
    placed[:, top : top + height, left : left + width] = image
    return placed
