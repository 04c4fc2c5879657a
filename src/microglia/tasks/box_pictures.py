"""A detector's boxes on a few test images, as JSON for reports."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from microglia.core.batch import call
from microglia.core.devices import device_of
from microglia.core.modes import evaluating
from microglia.data.box_augmentation import pillow
from microglia.data.boxes import BoxData
from microglia.tasks.task import Batches, Split

KIND = "detection"
SHOWN = 3
"""Number of test images."""
SIDE = 320
"""Longest side of a picture, in pixels."""
QUALITY = 85
"""JPEG quality of a picture."""


class Boxes(Protocol):
    """Data with boxes, see `microglia.tasks.detection.BoxSource`."""

    @property
    def boxes(self) -> BoxData:
        """The data set."""
        ...

    def batches(self, split: Split, batch_size: int) -> Batches:
        """Returns letterboxed images in their order."""
        ...


@torch.no_grad()
def show_boxes(model: nn.Module, data: Boxes, read: Callable[[Any], Sequence[Tensor]], count: int = SHOWN) -> dict[str, Any]:
    """Returns a model's boxes on the first test images that have true boxes.

    Args:
        model: A detector.
        data: Its data.
        read: Outputs -> detections of each image, [n, 6]: corners in pixels of the canvas, score, class.
        count: Number of images, at most.

    Returns:
        ``kind``, ``classes``, and ``examples``, each with ``image`` (JPEG in base64), ``truth`` (corners, class) and
        ``predicted`` (corners, class, score), in pixels of the picture.
    """
    examples: list[dict[str, Any]] = []
    for images, targets in data.batches("test", 1).epoch(0):
        if len(examples) == count:
            break
        if not len(targets["labels"]):
            continue
        with evaluating(model):
            found = read(call(model, images.to(device_of(model))))[0].cpu()
        height, width = images.shape[2:]
        scale = min(1.0, SIDE / max(height, width))
        sides = torch.tensor([width, height] * 2) * scale
        centre, half = targets["boxes"][:, :2], targets["boxes"][:, 2:] / 2
        truth = torch.cat((torch.cat((centre - half, centre + half), 1) * sides, targets["labels"][:, None].float()), 1)
        predicted = torch.cat((found[:, :4] * scale, found[:, 5:], found[:, 4:5]), 1)
        examples.append({"image": written(images[0], scale), "truth": rounded(truth), "predicted": rounded(predicted)})
    return {"kind": KIND, "classes": list(data.boxes.classes), "examples": examples}


def rounded(rows: Tensor) -> list[list[float]]:
    """Returns rows of numbers with three decimals."""
    return [[round(number, 3) for number in row] for row in rows.tolist()]


def written(image: Tensor, scale: float) -> str:
    """Returns an image, float [3, h, w] in [0, 1], scaled, as a JPEG in base64."""
    picture = pillow((image * 255).round().to("cpu", torch.uint8))
    if scale < 1:
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def drawn(image: str, boxes: Sequence[Sequence[float]], colours: Sequence[tuple[int, int, int]]) -> np.ndarray[Any, Any]:
    """Returns a picture with boxes (corners, class ...) drawn in the colour of their class, uint8 [h, w, 3].

    Raises:
        ValueError: The text is no JPEG in base64, or a box is not of this form.
    """
    from PIL import Image, ImageDraw

    try:
        with Image.open(io.BytesIO(base64.b64decode(image, validate=True)), formats=("JPEG",)) as opened:
            picture = opened.convert("RGB")
        pen = ImageDraw.Draw(picture)
        for left, top, right, bottom, label, *_ in boxes:
            corners = (left, top, max(left, right), max(top, bottom))
            pen.rectangle(corners, outline=colours[int(label) % len(colours)], width=2)
    except Exception as error:  # Pillow raises many types for damaged bytes
        raise ValueError(f"a picture with boxes cannot be drawn ({error})") from error
    return np.asarray(picture)
