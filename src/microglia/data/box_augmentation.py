"""Random variation of images with boxes: mosaic of four, scale and translation, colours, mirror.

All draws come from torch's global generator, which `microglia.data.samples.SampleBatches` seeds for each sample.
Source: the published recipe of YOLOv5 (2020), after YOLOv4 (Bochkovskiy et al. 2020, mosaic).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microglia.core.errors import DataError
from microglia.data.letterbox import GREY

LEAST_SIDE = 2.0
"""A box whose width or height is not above this, in pixels, is left out."""
LEAST_AREA = 0.1
"""A box of less than this share of its scaled area is left out."""
MOST_ASPECT = 100.0
"""A box whose sides have a larger ratio is left out."""
Size = tuple[int, int]


@dataclass(frozen=True)
class BoxAugmentation:
    """The strengths of the variation.

    Attributes:
        mosaic: Probability of a mosaic of four images, in [0, 1].
        scale: The image is scaled by 1 - scale to 1 + scale, in [0, 1).
        translate: Its centre moves by at most this share of the canvas, in [0, 1].
        hue: Hue is multiplied by 1 - hue to 1 + hue, in [0, 1].
        saturation: The same for saturation.
        value: The same for brightness.
        flip: Probability of a mirrored image, in [0, 1].
    """

    mosaic: float = 0.0
    scale: float = 0.0
    translate: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    value: float = 0.0
    flip: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1 or (name == "scale" and value == 1):
                raise DataError(
                    f"The augmentation's {name} is {value}; expected a number in [0, 1{')' if name == 'scale' else ']'}."
                )


_USUAL = {"scale": 0.5, "translate": 0.1, "hue": 0.015, "saturation": 0.7, "value": 0.4, "flip": 0.5}
AUGMENTATIONS = {
    "none": BoxAugmentation(),
    "flip": BoxAugmentation(flip=0.5),
    "affine": BoxAugmentation(**_USUAL),
    "mosaic": BoxAugmentation(mosaic=1.0, **_USUAL),
}
"""The usual strengths by name."""


def uniform(low: float, high: float) -> float:
    """Returns one number from [low, high), drawn from torch's global generator."""
    return low + (high - low) * float(torch.rand(()))


@dataclass(frozen=True, eq=False)
class Scene:
    """One image with boxes while it is varied.

    Attributes:
        image: uint8 [3, h, w].
        boxes: float32 [n, 4], (left, top, right, bottom) in pixels of the image.
        labels: int64 [n].
        crowd: bool [n].
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    crowd: Tensor

    def take(self, boxes: Tensor, kept: Tensor, image: Tensor | None = None) -> Scene:
        """Returns the scene with other boxes, of which only some are kept."""
        return Scene(self.image if image is None else image, boxes[kept], self.labels[kept], self.crowd[kept])


def mosaic(scenes: list[Scene], canvas: Size) -> Scene:
    """Returns four scenes around a random point of a canvas of twice the size, in both directions.

    Args:
        scenes: Top left, top right, bottom left, bottom right.
        canvas: (height, width) of the final image.
    """
    height, width = 2 * canvas[0], 2 * canvas[1]
    image = torch.full((3, height, width), GREY, dtype=torch.uint8)
    x, y = round(uniform(0.25, 0.75) * width), round(uniform(0.25, 0.75) * height)
    parts = []
    for place, scene in enumerate(scenes):
        h, w = scene.image.shape[-2:]
        left, top = x - w if place % 2 == 0 else x, y - h if place < 2 else y
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + w, width), min(top + h, height)
        image[:, y0:y1, x0:x1] = scene.image[:, y0 - top : y1 - top, x0 - left : x1 - left]
        shifted = scene.boxes + scene.boxes.new_tensor([left, top, left, top])
        parts.append((clipped(shifted, (height, width)), scene.labels, scene.crowd))
    boxes, labels, crowd = (torch.cat(part) for part in zip(*parts, strict=True))
    return Scene(image, boxes, labels, crowd)


def moved(scene: Scene, canvas: Size, augmentation: BoxAugmentation) -> Scene:
    """Returns the middle of a scene, scaled and moved at random, on a canvas; boxes that nearly vanish are left out."""
    height, width = scene.image.shape[-2:]
    scale = uniform(1 - augmentation.scale, 1 + augmentation.scale)
    x = uniform(0.5 - augmentation.translate, 0.5 + augmentation.translate) * canvas[1] - scale * width / 2
    y = uniform(0.5 - augmentation.translate, 0.5 + augmentation.translate) * canvas[0] - scale * height / 2
    return placed(scene, canvas, scale, (x, y))


def placed(scene: Scene, canvas: Size, scale: float, offset: tuple[float, float]) -> Scene:
    """Returns a scene scaled and then shifted by (x, y) on a canvas; boxes that nearly vanish are left out."""
    from PIL import Image

    inverse = (1 / scale, 0.0, -offset[0] / scale, 0.0, 1 / scale, -offset[1] / scale)
    image = pillow(scene.image).transform(
        (canvas[1], canvas[0]),
        Image.Transform.AFFINE,
        inverse,
        resample=Image.Resampling.BILINEAR,
        fillcolor=(GREY, GREY, GREY),
    )
    whole = scene.boxes * scale + scene.boxes.new_tensor([*offset, *offset])
    cut = clipped(whole, canvas)
    sides, before = cut[:, 2:] - cut[:, :2], whole[:, 2:] - whole[:, :2]
    aspect = sides.max(1).values / sides.min(1).values.clamp(min=1e-9) if len(sides) else sides.new_zeros(0)
    kept = (sides > LEAST_SIDE).all(1) & (sides.prod(1) > LEAST_AREA * before.prod(1)) & (aspect < MOST_ASPECT)
    return scene.take(cut, kept, tensor(image))


def recoloured(image: Tensor, augmentation: BoxAugmentation) -> Tensor:
    """Returns an image, uint8 [3, h, w], with hue, saturation and value each multiplied by a random factor."""
    gains = (augmentation.hue, augmentation.saturation, augmentation.value)
    if not any(gains):
        return image
    from PIL import Image

    factors = [uniform(1 - gain, 1 + gain) for gain in gains]
    steps = np.arange(256)
    tables = [steps * factors[0] % 256, *(np.clip(steps * factor, 0, 255) for factor in factors[1:])]
    bands = pillow(image).convert("HSV").split()
    changed = [band.point(table.astype(np.uint8).tolist()) for band, table in zip(bands, tables, strict=True)]
    return tensor(Image.merge("HSV", changed).convert("RGB"))


def mirrored(scene: Scene) -> Scene:
    """Returns a scene mirrored left to right."""
    width = scene.image.shape[-1]
    boxes = torch.stack([width - scene.boxes[:, 2], scene.boxes[:, 1], width - scene.boxes[:, 0], scene.boxes[:, 3]], 1)
    return Scene(scene.image.flip(-1), boxes, scene.labels, scene.crowd)


def clipped(boxes: Tensor, canvas: Size) -> Tensor:
    """Returns boxes cut to a canvas of (height, width)."""
    high = boxes.new_tensor([canvas[1], canvas[0], canvas[1], canvas[0]])
    return boxes.clamp(min=0).minimum(high)


def pillow(image: Tensor) -> Any:
    """Returns uint8 [3, h, w] as an image of Pillow."""
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def tensor(image: Any) -> Tensor:
    """Returns an image of Pillow as uint8 [3, h, w]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
