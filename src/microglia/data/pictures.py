"""Image files that are decoded when they are read and then kept in memory, perhaps reduced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from microglia.core.errors import DataError
from microglia.core.optional import needs
from microglia.data.decode import check_memory
from microglia.data.letterbox import fitted

Size = tuple[int, int]


class Pictures(Sequence[Tensor]):
    """Image files as uint8 [3, height, width], each decoded at its first use.

    Args:
        paths: The files.
        sizes: (height, width) of each, as `header_size` returns them.
        fit: (height, width) into which larger images are reduced, with their proportions; None keeps their size.

    Raises:
        DataError: All images together do not fit in memory.
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[Size], fit: Size | None = None) -> None:
        self.paths, self.sizes, self.fit = list(paths), [(int(h), int(w)) for h, w in sizes], fit
        self._kept: dict[int, Tensor] = {}
        check_memory(sum(3 * height * width for height, width in map(self._reduced, self.sizes)))

    def _reduced(self, size: Size) -> Size:
        return size if self.fit is None else fitted(size, self.fit)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        """Returns one image.

        Raises:
            DataError: The file cannot be decoded; the text names it.
        """
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if index not in self._kept:
            self._kept[index] = self._decoded(index)
        return self._kept[index]

    def subset(self, indices: Sequence[int]) -> Pictures:
        """Returns the files at ``indices``, in that order."""
        return Pictures([self.paths[i] for i in indices], [self.sizes[i] for i in indices], self.fit)

    def _decoded(self, index: int) -> Tensor:
        needs("data", "PIL", what="Reading images")
        from PIL import Image

        height, width = self._reduced(self.sizes[index])
        try:
            with Image.open(self.paths[index]) as opened:
                image = opened.convert("RGB")
        except Exception as error:  # Pillow raises many types for damaged bytes
            raise _unreadable(self.paths[index], error) from error
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def header_size(path: Path) -> Size:
    """Returns the (height, width) that an image file says.

    Raises:
        DataError: The file is no image.
    """
    needs("data", "PIL", what="Reading images")
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"The image {path} cannot be read ({str(error).rstrip('.')}); replace or remove it.")
