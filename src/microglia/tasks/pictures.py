"""Predictions on a few test images as small pictures in JSON, for reports."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.batch import call
from microglia.core.devices import device_of
from microglia.core.modes import evaluating
from microglia.data.normalization import Normalization
from microglia.data.scenes import SceneCollate, SceneSet
from microglia.tasks.maps import main_map

SIDE = 320
"""Longest side of a picture, in pixels."""


@torch.no_grad()
def show_maps(
    model: nn.Module, test: SceneSet, classes: Sequence[str], normalization: Normalization, count: int
) -> dict[str, Any]:
    """Returns a model's maps on test images spread over the split.

    Args:
        model: A segmenter.
        test: Test images.
        classes: Class names.
        normalization: Turns bytes into network inputs.
        count: Number of images.

    Returns:
        ``kind``, ``classes``, and ``examples``, each with ``image``, ``truth`` and ``predicted``: PNG images in base64. A pixel
        of the last two is the number of its class, or `microglia.data.scenes.IGNORED`.
    """
    chosen = sorted({index * len(test) // count for index in range(count)})
    examples = []
    for index in chosen:
        image, truth = test[index]
        inputs, targets = SceneCollate(normalization)([(image, truth)])
        with evaluating(model):
            logits = main_map(call(model, inputs.to(device_of(model))), targets.shape[1:])
        height, width = truth.shape
        predicted = logits[0, : len(classes), :height, :width].argmax(0).to("cpu", torch.uint8)
        examples.append({"image": written(image), "truth": written(truth), "predicted": written(predicted)})
    return {"kind": "segmentation", "classes": list(classes), "examples": examples}


def written(pixels: Tensor) -> str:
    """Returns pixels, uint8 [3, H, W] or [H, W], as a PNG image in base64; a large one is reduced to every k-th pixel."""
    from PIL import Image

    step = -(-max(pixels.shape[-2:]) // SIDE)
    if pixels.ndim == 3 and step > 1:
        pixels = functional.avg_pool2d(pixels.float(), step).round().to(torch.uint8)
    elif step > 1:
        height, width = (side // step * step for side in pixels.shape)
        pixels = pixels[:height:step, :width:step]
    array = pixels.permute(1, 2, 0).numpy() if pixels.ndim == 3 else pixels.numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def read_picture(text: str) -> npt.NDArray[np.uint8]:
    """Returns the pixels of `written`, uint8 [H, W, 3] or [H, W].

    Raises:
        ValueError: The text is no such picture.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as image:
            return np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    except Exception as error:  # Pillow raises many types for damaged bytes
        raise ValueError(f"a picture cannot be read ({error})") from error
