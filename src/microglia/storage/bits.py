"""Boolean tensors in files as bits: a mask takes an eighth of the space of its bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Returns tensors with boolean ones packed as bits, and the shapes of these.

    Args:
        tensors: Contiguous tensors on the CPU.

    Returns:
        The tensors by the same names, and name -> shape of each boolean tensor. A boolean tensor of n entries becomes ceil(n /
        8) bytes (uint8): its entries in C order, the first in the highest bit of the first byte; unused bits are 0.
    """
    packed, shapes = dict(tensors), {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool:
            shapes[name] = list(tensor.shape)
            packed[name] = torch.from_numpy(np.packbits(tensor.numpy()))
    return packed, shapes


def unpack(tensors: Mapping[str, Tensor], shapes: Any) -> dict[str, Tensor]:
    """Returns the original tensors from the result of `pack`.

    Args:
        tensors: The stored tensors.
        shapes: The shapes in the file, of unchecked form.

    Raises:
        ValueError: The shapes are invalid or do not fit the bits; no memory of their size is allocated before this check.
    """
    if not isinstance(shapes, Mapping):
        raise ValueError("the shapes of its bits are no mapping")
    unpacked = dict(tensors)
    for name, shape in shapes.items():
        stored = tensors.get(name)
        sound = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        count = math.prod(shape) if sound else -1
        if stored is None or stored.dtype != torch.uint8 or not sound or stored.shape != (-(-count // 8),):
            raise ValueError(f"the bits of {str(name)[:80]!r} do not have the shape that is written beside them")
        bits = np.unpackbits(stored.numpy())
        if bits[count:].any():
            raise ValueError(f"the bits of {name!r} go on behind its last entry")
        unpacked[name] = torch.from_numpy(bits[:count].astype(np.bool_)).reshape(shape)
    return unpacked
