"""Checks indices of blocks on the host: once for unchanged tensors, not at every call."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from microglia.core.errors import MicrogliaError
from microglia.runtime.sparse_layers.layout import STRIPES, TAPS, WIDTHS, Places

_Seen = tuple[tuple[weakref.ref[Tensor], int], ...]
_sound: dict[tuple[int, ...], _Seen] = {}


def check_places(places: Places, outputs: int, inputs: int, kernel: Sequence[int]) -> None:
    """Checks that blocks fit a weight of this size.

    Args:
        places: The blocks, on any device.
        outputs: Outputs of the layer.
        inputs: Inputs of the layer, all groups together.
        kernel: Height and width; (1, 1) of a linear layer.

    Raises:
        MicrogliaError: A tensor has another type or shape; a row pointer falls or does not end at the number of blocks; a first
            channel is outside the input or not a multiple of the block's inputs; or a tap is outside the kernel.
    """
    values, row_pointer, channel, tap = places
    if values.ndim != 3 or values.shape[1] not in WIDTHS or values.shape[2] not in STRIPES:
        raise MicrogliaError(
            f"Blocks on a GPU are (blocks, inputs, outputs) with inputs of {WIDTHS} and outputs of {STRIPES}, not "
            f"{tuple(values.shape)}."
        )
    count, width, stripe = values.shape
    taps = math.prod(kernel)
    expected = {"row_pointer": (row_pointer, torch.int32, -(-outputs // stripe) + 1), "channel": (channel, torch.int32, count)}
    if tap is not None:
        expected["tap"] = (tap, torch.uint8, count)
    for name, (given, dtype, length) in expected.items():
        if given.dtype != dtype or given.shape != (length,):
            raise MicrogliaError(f"{name} must be {dtype} of shape ({length},), not {given.dtype} of {tuple(given.shape)}.")
    if taps > TAPS or (tap is None) != (taps == 1):
        raise MicrogliaError(
            f"A kernel of {taps} positions has {'no tap' if taps == 1 else 'a tap for each block'}, at most {TAPS} positions."
        )
    pointer = row_pointer.cpu()
    if pointer[0] != 0 or pointer[-1] != count or bool((pointer[1:] < pointer[:-1]).any()):
        raise MicrogliaError(f"row_pointer must rise from 0 to the number of blocks, {count}.")
    if count and not bool(((channel >= 0) & (channel < inputs) & (channel % width == 0)).all()):
        raise MicrogliaError(f"A block begins at a channel from 0 to {inputs - 1} that is a multiple of its {width} inputs.")
    if count and tap is not None and int(tap.max()) >= taps:
        raise MicrogliaError(f"A tap is a position from 0 to {taps - 1}, not {int(tap.max())}.")


def check_once(places: Places, outputs: int, inputs: int, kernel: Sequence[int]) -> None:
    """Checks blocks as `check_places` does, and the same tensors again only after they changed.

    A check waits for the GPU. Tensors made in inference mode do not record writes; for these only the first check counts. The
    kernels themselves never read outside their tensors, for all indices.
    """
    tensors = [tensor for tensor in places if tensor is not None]
    key = (*map(id, tensors), outputs, inputs, *kernel)
    seen = _sound.get(key)
    current = [(tensor, _version(tensor)) for tensor in tensors]
    if seen is not None and all(entry[0]() is t and entry[1] == v for entry, (t, v) in zip(seen, current, strict=True)):
        return
    check_places(places, outputs, inputs, kernel)
    for stale in [k for k, kept in _sound.items() if any(reference() is None for reference, _ in kept)]:
        del _sound[stale]
    _sound[key] = tuple((weakref.ref(tensor), _version(tensor)) for tensor in tensors)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
