"""Decoding of image files to one uint8 tensor. The only file that imports Pillow."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microglia.core.errors import DataError
from microglia.core.optional import needs
from microglia.data.parallel import map_chunks
from microglia.data.sources import Encoded

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

_GREY = {"1", "L", "LA", "La", "I;16", "I;16L", "I;16B"}
_TOO_DEEP = {"I", "F"}


@dataclass(frozen=True)
class Layout:
    """The common layout of all images of a data set.

    Attributes:
        colour: Three channels, or a single grey one.
        height: Rows.
        width: Columns.
    """

    colour: bool
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return 3 if self.colour else 1, self.height, self.width


def survey(encoded: Encoded, image_size: int | None, label: str) -> Layout:
    """Reads every image's header and returns the layout that fits them.

    The layout has colour if at least half of the images have. Its size is ``image_size`` if given, else the common size of the
    images, else a square whose side is the median of the shorter sides.

    Raises:
        DataError: When an image cannot be read; it names the image.
    """
    headers = Counter[tuple[bool, int, int]]()
    for chunk in _each(encoded, lambda image, _: (image.mode not in _GREY, image.height, image.width), label):
        headers.update(chunk)
    coloured = sum(count for (colour, _, _), count in headers.items() if colour)
    sizes = {(height, width) for _, height, width in headers}
    if image_size is not None:
        height = width = image_size
    elif len(sizes) == 1:
        height, width = sizes.pop()
    else:
        height = width = median_low([min(height, width) for _, height, width in headers.elements()])
    return Layout(2 * coloured >= len(encoded), height, width)


def decode(encoded: Encoded, layout: Layout, label: str) -> Tensor:
    """Returns every image, in order.

    Images of another kind are converted (grey by ITU-R 601 luma, transparency dropped, 16-bit grey to its upper byte);
    images of another size are scaled bilinearly until they just cover the layout, then cut to its centre.

    Returns:
        uint8 [N, C, H, W].

    Raises:
        DataError: When an image cannot be read or has more than 8 bits in an unknown range; it names the image.
    """
    images = torch.empty((len(encoded), *layout.shape), dtype=torch.uint8)
    rows = images.numpy()

    def fill(image: Image, index: int) -> None:
        rows[index] = _pixels(image, layout)

    _each(encoded, fill, label)
    return images


def resized(images: Tensor, size: int) -> Tensor:
    """Returns decoded images, uint8 [N, C, H, W], at another size, as ``decode`` would: uint8 [N, C, size, size]."""
    needs("data", "PIL", what="Resizing images")
    from PIL import Image

    layout = Layout(images.shape[1] == 3, size, size)
    out = torch.empty((len(images), *layout.shape), dtype=torch.uint8)
    for index, image in enumerate(images.permute(0, 2, 3, 1).squeeze(-1).numpy()):
        out.numpy()[index] = _pixels(Image.fromarray(image), layout)
    return out


def check_memory(size: int) -> None:
    """Raises a ``DataError`` when images of this many bytes exceed ``MICROGLIA_MEMORY_GIB`` (8 when unset)."""
    given = os.environ.get("MICROGLIA_MEMORY_GIB", "8")
    try:
        limit = float(given)
    except ValueError:
        raise DataError(f"MICROGLIA_MEMORY_GIB is {given!r}; expected a number of GiB, such as 8.") from None
    if size > limit * 2**30:
        raise DataError(
            f"The decoded images would take {size / 2**30:.3g} GiB of memory and the limit is {limit:g} GiB. "
            "Pass a smaller image_size, or raise the limit with the environment variable MICROGLIA_MEMORY_GIB."
        )


def decoder() -> str:
    """Returns the decoder's name and version, because another version may decode JPEG to other bytes."""
    needs("data", "PIL", what="Reading images")
    import PIL

    return f"pillow {PIL.__version__}"


def _each(encoded: Encoded, work: Callable[[Image, int], T], label: str) -> list[list[T]]:
    """Returns ``work(opened image, index)`` for every image, in chunks, in order."""
    read = encoded.open()

    def chunk(indices: range) -> list[T]:
        results = []
        hint = None
        for index in indices:
            try:
                with _opened(read(index), hint) as image:
                    hint = image.format
                    results.append(work(image, index))
            except DataError:
                raise
            # Pillow raises many types for damaged bytes: OSError, SyntaxError, struct.error, ValueError ...
            except Exception as error:
                raise DataError(
                    f"The image {encoded.describe(index)} cannot be read ({error}); replace or remove it."
                ) from error
        return results

    return map_chunks(chunk, len(encoded), label)


def _opened(data: bytes | Path, hint: str | None) -> Image:
    """Opens an image and reads only its header; it tries the format of the previous image first.

    By default Pillow builds and discards a reader for each known format: two thirds of the time for a small image.
    """
    from PIL import Image, UnidentifiedImageError

    if hint in Image.OPEN:
        try:
            return Image.open(BytesIO(data) if isinstance(data, bytes) else data, formats=(hint,))
        except UnidentifiedImageError:
            pass
    return Image.open(BytesIO(data) if isinstance(data, bytes) else data)


def _pixels(image: Image, layout: Layout) -> npt.NDArray[np.uint8]:
    """Returns one image in the layout, uint8 [C, H, W]."""
    from PIL import Image as pillow

    if image.mode in _TOO_DEEP:
        raise ValueError(f"its pixels are of Pillow's mode {image.mode!r}, whose range is unknown; expected 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB" if layout.colour else "L")
    if image.size != (layout.width, layout.height):
        image = _covering(image, layout)
    pixels: npt.NDArray[np.uint8] = np.asarray(image)
    return pixels.transpose(2, 0, 1) if layout.colour else pixels[None]


def _covering(image: Image, layout: Layout) -> Image:
    """Returns the image scaled until it just covers the layout, cut to its centre."""
    from PIL.Image import Resampling

    scale = max(layout.width / image.width, layout.height / image.height)
    width = max(layout.width, round(image.width * scale))
    height = max(layout.height, round(image.height * scale))
    left, top = (width - layout.width) // 2, (height - layout.height) // 2
    scaled = image.resize((width, height), Resampling.BILINEAR)
    return scaled.crop((left, top, left + layout.width, top + layout.height))
