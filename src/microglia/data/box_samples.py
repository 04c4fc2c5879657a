"""Samples of detection: an image on the canvas of the network with its boxes, and their collation to batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from microglia.data.box_augmentation import BoxAugmentation, Scene, mirrored, mosaic, moved, recoloured, uniform
from microglia.data.boxes import BoxSet
from microglia.data.letterbox import Placement, fitted, letterbox

Size = tuple[int, int]
Sample = tuple[Tensor, dict[str, Tensor]]


class BoxSamples:
    """A map-style dataset of (image, target) from a split in memory.

    An image is uint8 [3, height, width]. A target has ``boxes``, float32 [n, 4]: centre x, centre y, width and height as shares
    of the canvas; ``labels`` and ``crowd``, [n]; and for the evaluation ``pixels``, float32 [n, 4]: corners in the original
    image, with its ``size`` (height, width) and ``index``. With augmentation the canvas itself is the original image.

    Args:
        boxes: The split.
        canvas: (height, width) of the network's inputs.
        augmentation: Random variation, drawn from torch's global generator; None letterboxes the image.
    """

    def __init__(self, boxes: BoxSet, canvas: Size, augmentation: BoxAugmentation | None = None) -> None:
        self.set, self.canvas = boxes, canvas
        self.augmentation = augmentation if augmentation != BoxAugmentation() else None

    def __len__(self) -> int:
        return len(self.set)

    def __getitem__(self, index: int) -> Sample:
        if self.augmentation is None:
            return self._plain(index)
        scene = self._varied(index, self.augmentation)
        size = torch.tensor(self.canvas)
        return scene.image, self._target(scene, scene.boxes, size, index)

    def _plain(self, index: int) -> Sample:
        scene, pixels = self._scene(index), self.set.boxes[index]
        place = Placement.of(self._size(index), self.canvas)
        boxed = Scene(letterbox(scene.image, self.canvas), place.apply(pixels), scene.labels, scene.crowd)
        return boxed.image, self._target(boxed, pixels, self.set.sizes[index], index)

    def _varied(self, index: int, augmentation: BoxAugmentation) -> Scene:
        if uniform(0, 1) < augmentation.mosaic:
            places = [index, *torch.randint(len(self.set), (3,)).tolist()]
            scenes = [self._scene(places[k], enlarge=True) for k in torch.randperm(4).tolist()]
            scene = moved(mosaic(scenes, self.canvas), self.canvas, augmentation)
        elif augmentation.scale or augmentation.translate:
            scene = moved(self._scene(index, enlarge=True), self.canvas, augmentation)
        else:
            own, place = self._scene(index), Placement.of(self._size(index), self.canvas)
            scene = Scene(letterbox(own.image, self.canvas), place.apply(self.set.boxes[index]), own.labels, own.crowd)
        scene = Scene(recoloured(scene.image, augmentation), scene.boxes, scene.labels, scene.crowd)
        return mirrored(scene) if uniform(0, 1) < augmentation.flip else scene

    def _scene(self, index: int, *, enlarge: bool = False) -> Scene:
        """Returns an image scaled to fit the canvas, with its boxes; a smaller one is enlarged only if asked for."""
        image, (height, width) = self.set.images[index], self._size(index)
        wanted = fitted((height, width), self.canvas)
        if enlarge and wanted == (height, width):
            ratio = min(self.canvas[0] / height, self.canvas[1] / width)
            wanted = (max(1, round(height * ratio)), max(1, round(width * ratio)))
        if tuple(image.shape[-2:]) != wanted:
            image = _resized(image, wanted)
        scale = self.set.boxes[index].new_tensor([wanted[1] / width, wanted[0] / height] * 2)
        return Scene(image, self.set.boxes[index] * scale, self.set.labels[index], self.set.crowd[index])

    def _size(self, index: int) -> Size:
        height, width = self.set.sizes[index].tolist()
        return height, width

    def _target(self, scene: Scene, pixels: Tensor, size: Tensor, index: int) -> dict[str, Tensor]:
        sides = scene.boxes.new_tensor([self.canvas[1], self.canvas[0]] * 2)
        shares = scene.boxes / sides
        first, last = shares[:, :2], shares[:, 2:]
        return {
            "boxes": torch.cat([(first + last) / 2, last - first], 1),
            "labels": scene.labels,
            "crowd": scene.crowd,
            "pixels": pixels,
            "size": size,
            "index": torch.tensor(index),
        }


def collate_boxes(samples: Sequence[Sample]) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns samples as one batch: float32 images in [0, 1], and all boxes in a row with the number of their image.

    Returns:
        ``(images [B, 3, height, width] in channels-last layout, targets)``. Targets have ``boxes``, ``pixels`` [n, 4],
        ``labels``, ``crowd``, ``image`` [n] (place of each box's image in the batch), ``size`` [B, 2] and ``index`` [B].
    """
    images = torch.stack([image for image, _ in samples]).float().div_(255).contiguous(memory_format=torch.channels_last)
    targets: dict[str, Tensor] = {
        key: torch.cat([target[key] for _, target in samples]) for key in ("boxes", "labels", "crowd", "pixels")
    }
    counts = torch.tensor([len(target["labels"]) for _, target in samples])
    targets["image"] = torch.repeat_interleave(torch.arange(len(samples)), counts)
    targets["size"] = torch.stack([target["size"] for _, target in samples])
    targets["index"] = torch.stack([target["index"] for _, target in samples])
    return images, targets


def _resized(image: Tensor, size: Size) -> Tensor:
    from PIL import Image

    from microglia.data.box_augmentation import pillow, tensor

    resized: Any = pillow(image).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return tensor(resized)
