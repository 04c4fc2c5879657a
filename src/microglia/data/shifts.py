"""Distribution shifts: corrupted images, as from a worse camera than that of the training images.

The idea is from Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations":
a few corruptions, each in five severities. The parameters are our own (see below), so results are not comparable with published
CIFAR-10-C results. Every shift works on bytes, before the normalization, and rounds to bytes, as a camera does.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor
from torch.nn import functional

from microglia.core.errors import DataError
from microglia.core.optional import needs
from microglia.core.registry import unknown_name

Shift = Callable[[Tensor, int, Generator], Tensor]
"""(uint8 images (N, C, H, W), severity 1 .. 5, CPU generator) -> uint8 images of the same shape."""

SEVERITIES = (1, 2, 3, 4, 5)
NOISE = (0.04, 0.08, 0.12, 0.18, 0.26)
"""Standard deviation, as a fraction of the full range of 255."""
BLUR = (0.4, 0.6, 0.8, 1.1, 1.5)
"""Standard deviation in pixels of an image 32 pixels wide or less; it grows with larger ones."""
QUALITY = (60, 40, 25, 15, 8)
"""Quality of JPEG on Pillow's scale."""
CONTRAST = (0.75, 0.5, 0.35, 0.25, 0.15)
"""Remaining fraction of each pixel's distance from its image's mean."""
CHUNK = 1024
"""Images widened to float at a time."""


def shifted(images: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Returns images under a shift; the same arguments give the same bytes.

    Args:
        images: uint8 (N, C, H, W), values 0..255; they stay unchanged.
        name: A name in `SHIFTS`.
        severity: 1 (mild) to 5 (strong).
        seed: Seed of the random shifts; the others ignore it.

    Returns:
        uint8 (N, C, H, W), on the images' device.

    Raises:
        UnknownNameError: There is no such shift.
        DataError: The images are not uint8, the severity is out of range, or JPEG gets images without 1 or 3 channels.
    """
    if name not in SHIFTS:
        raise unknown_name("shift", name, SHIFTS)
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise DataError(
            f"The images to shift are {images.dtype} of shape {list(images.shape)}; expected torch.uint8 of shape "
            "[N, C, H, W], before the normalization."
        )
    check_severity(severity)
    generator = Generator().manual_seed(seed)
    parts = [SHIFTS[name](images[i : i + CHUNK], severity, generator) for i in range(0, len(images), CHUNK)]
    return torch.cat(parts) if parts else images.clone()


def check_severity(severity: int) -> None:
    """Raises a `DataError` unless a severity is 1, 2, 3, 4 or 5."""
    if severity not in SEVERITIES:
        raise DataError(f"The severity of a shift is {severity}; expected a whole number from 1 (mild) to 5 (strong).")


def gaussian_noise(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Returns images with independent normal noise on every value, its standard deviation 255 x `NOISE`."""
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return _bytes(images + 255 * NOISE[severity - 1] * noise)


def gaussian_blur(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Returns images averaged with normal weights, cut off at three deviations, the border repeated outwards; see `BLUR`."""
    deviation = BLUR[severity - 1] * max(1.0, min(images.shape[2:]) / 32)
    reach = max(1, round(3 * deviation))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / deviation) ** 2)
    weights = weights / weights.sum()
    channels = images.shape[1]
    padded = functional.pad(images.float(), (reach,) * 4, mode="replicate")
    rows = functional.conv2d(padded, weights.reshape(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)
    return _bytes(functional.conv2d(rows, weights.reshape(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels))


def jpeg(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Returns images encoded as JPEG files of a `QUALITY` and decoded again, by Pillow; grey or RGB."""
    modes = {1: "L", 3: "RGB"}
    if images.shape[1] not in modes:
        raise DataError(f"JPEG holds images of 1 or 3 channels; these have {images.shape[1]}. Leave the shift 'jpeg' out.")
    quality, mode = QUALITY[severity - 1], modes[images.shape[1]]
    made = [_through_jpeg(image, mode, quality) for image in images.cpu().permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(made)).reshape(len(images), *images.shape[2:], -1).permute(0, 3, 1, 2).to(images.device)


def contrast(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Returns images with reduced contrast: values move towards the mean of each channel; see `CONTRAST`."""
    mean = images.float().mean((2, 3), keepdim=True)
    return _bytes(mean + CONTRAST[severity - 1] * (images - mean))


SHIFTS: dict[str, Shift] = {"noise": gaussian_noise, "blur": gaussian_blur, "jpeg": jpeg, "contrast": contrast}


def _bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def _through_jpeg(image: npt.NDArray[np.uint8], mode: str, quality: int) -> npt.NDArray[np.uint8]:
    """Returns one image, (H, W, C) in and (H, W) or (H, W, C) out, after encoding and decoding."""
    needs("data", "PIL", what="The shift 'jpeg'")
    from PIL import Image  # not before an image is compressed

    file = io.BytesIO()
    Image.fromarray(image[..., 0] if mode == "L" else image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))
