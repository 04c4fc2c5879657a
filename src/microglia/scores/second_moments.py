"""Second moments of what layers read: the mean of x x^T over calibration rows, or of x^2 alone; convolutions unfolded.

A weight is seen as a matrix (out, columns). The columns of a convolution are (kernel positions, input channels), the channels
innermost, so that a run of N:M and a block of channels are neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.errors import ScoreError
from microglia.core.layers import Layer

WIDE = 2048
"""From this number of columns on a layer's moments are in float32; below it they are in float64 on a CPU."""
PIECES = 8
"""Column blocks of a wide product X^T X, of which only those on and above the diagonal are computed."""


def matrix_of(weight: Tensor) -> Tensor:
    """Returns a weight (out, in, *kernel) as a matrix (out, kernel * in)."""
    return weight.flatten(2).transpose(1, 2).reshape(len(weight), -1) if weight.ndim > 2 else weight


def weight_of(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns a matrix of `matrix_of` in the shape of its weight, (out, in, *kernel)."""
    if len(shape) == 2:
        return matrix
    return matrix.reshape(shape[0], -1, shape[1]).transpose(1, 2).reshape(shape)


def rows_of(module: nn.Module, inputs: Tensor) -> Tensor:
    """Returns the rows that a layer multiplies its weight by, (groups, rows, columns), columns as in `matrix_of`.

    Args:
        module: A linear layer, or a convolution of any dimension.
        inputs: All that it read: (..., features), or (batch, channels, *size).
    """
    if not hasattr(module, "kernel_size"):
        return inputs.reshape(1, -1, inputs.shape[-1])
    conv = cast(Any, module)
    spatial = len(conv.kernel_size)
    x = inputs if inputs.ndim == spatial + 2 else inputs[None]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), 2):
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    channels = x.shape[1] // int(conv.groups)
    x = x.reshape(len(x), int(conv.groups), channels, *x.shape[2:]).movedim(1, 0)  # (groups, batch, channels, ...)
    return x.movedim(2, -1).reshape(len(x), -1, math.prod(conv.kernel_size) * channels)


class Moments:
    """The second moments of one layer's inputs, summed over batches.

    Args:
        layer: The layer; one of several holders of a shared weight is enough.
        whole: Whether to sum x x^T, (groups, columns, columns); otherwise x^2, (groups, columns).

    Attributes:
        total: The sum; None before the first rows.
        count: Number of rows of each group.
    """

    def __init__(self, layer: Layer, *, whole: bool) -> None:
        self.whole = whole
        _, in_, *kernel = layer.sides
        self.columns = in_ * math.prod(kernel)
        on_cpu = layer.raw.device.type == "cpu"
        self.dtype = torch.float64 if on_cpu and self.columns < WIDE else torch.float32
        self.total: Tensor | None = None
        self.count = 0

    def add(self, module: nn.Module, inputs: Tensor, counted: Tensor | None = None) -> None:
        """Adds what a layer read in one forward pass.

        Args:
            module: The layer's module.
            inputs: Its input.
            counted: Which positions of the batch count, boolean (batch, positions): tokens that are no padding. None for all.
        """
        if counted is not None and inputs.ndim == 3 and inputs.shape[:2] == counted.shape:
            inputs = inputs[counted]
        rows = rows_of(module, inputs.detach()).to(self.dtype)
        self.count += rows.shape[1]
        if not self.whole:
            added = rows.square().sum(1)
            self.total = added if self.total is None else self.total.add_(added)
            return
        if self.total is None:
            self.total = rows.new_zeros(len(rows), self.columns, self.columns)
        for group, part in zip(self.total, rows, strict=True):
            add_product(group, part)

    def mean(self) -> Tensor:
        """Returns the mean over all rows, of all ranks: (groups, columns, columns), or (groups, columns); once, in place.

        Raises:
            ScoreError: The layer read nothing.
        """
        if self.total is None or not self.count:
            raise ScoreError("A layer without inputs has no second moments.")
        total, count = self.total, torch.tensor(float(self.count), dtype=torch.float64)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            count = count.to(total.device)
            torch.distributed.all_reduce(total)
            torch.distributed.all_reduce(count)
        if self.whole:
            for group in total:
                group.copy_(group.triu() + group.triu(1).T)
        self.total = None
        return total.div_(float(count))


def add_product(total: Tensor, rows: Tensor) -> None:
    """Adds X^T X to a matrix, on and above the diagonal alone; below it the matrix may hold anything.

    Args:
        total: (columns, columns), in place.
        rows: X, (rows, columns).
    """
    columns = len(total)
    step = columns if columns < WIDE else -(-columns // PIECES)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def largest_moments(layers: Mapping[str, Layer]) -> int:
    """Returns the bytes of the whole moments of some layers, and of three further matrices of the widest one.

    Layers that read the same tensor share their moments, so that it is less for them.
    """
    made = [Moments(layer, whole=True) for layer in layers.values()]
    sizes = [moments.columns**2 * moments.dtype.itemsize for moments in made]
    return sum(sizes) + 3 * max(sizes, default=0)
