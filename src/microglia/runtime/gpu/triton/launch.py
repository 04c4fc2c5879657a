"""The operators: what they are given is checked, laid out for the kernels, and launched.

The layout is that of the CPU's kernels: images in channels last in and out, blocks as
`microglia.runtime.sparse_layers.layout` stores them, of which `block_conv2d` also takes those of 32, 64 and 128 outputs and
of 16, 32 and 64 inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from microglia.core.errors import MicrogliaError
from microglia.runtime.gpu.triton.check import check_once
from microglia.runtime.gpu.triton.tiles import Tile, fastest_tile, tiles
from microglia.runtime.sparse_layers.layout import Places

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Of activations and weights alike; sums are float32."""
MASKED_TAPS = 32
"""Positions of a kernel of which one integer can tell which lie inside the image; above, the image gets its zeros."""
ALIGNMENT = 16
"""Elements to which the rows of a turned matrix are rounded up, so that loads are whole."""
SIDE = 64
"""Of the square that one program turns."""
INTEGER = 2**31
"""From so many elements on, offsets need 64 bits."""
LARGEST = 2**26
"""Stride, padding and dilation stay below, so that places outside the image are counted without overflow."""

Pair = Sequence[int]


class Problem(NamedTuple):
    """A convolution as the kernel takes it: a linear layer, and a 1x1 convolution, is one of images of one pixel."""

    x: Tensor  # (images, channels, height, width), channels last
    places: Places
    bias: Tensor | None
    residual: Tensor | None  # as y
    y: Tensor  # (images, outputs, height, width), channels last
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    activation: int


def block_conv2d(
    x: Tensor,
    values: Tensor,
    row_pointer: Tensor,
    channel: Tensor,
    tap: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    outputs: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: int,
    tile: Tile | None = None,
) -> Tensor:
    """Returns activation(convolution(x) + bias + residual), (batch, outputs, height, width) in channels last.

    Args:
        x: (batch, inputs, height, width), copied where it is not in channels last.
        values: (blocks, inputs of a block, outputs of a block), of the type of ``x``.
        row_pointer: As the two following, of `microglia.runtime.sparse_layers.layout.Places`.
        channel: First input of each block, a multiple of its inputs.
        tap: None of a 1x1 kernel.
        bias: (outputs,) of the type of ``x`` or in float32, or None.
        residual: Of the output's shape and type, or None.
        outputs: Output channels.
        kernel: Height and width, as the three following pairs.
        stride: Of the output's pixels.
        padding: Zeros on either side.
        dilation: Between the taps.
        activation: Number in `microglia.runtime.operators.ACTIVATIONS`.
        tile: How the work is cut; None for the fastest, found by timing when a problem is first met.

    Raises:
        MicrogliaError: Tensors, indices or a geometry that do not fit each other.
    """
    places = Places(values, row_pointer, channel, tap)
    if x.ndim != 4:
        raise MicrogliaError(f"x of block_conv2d must be (batch, inputs, height, width), not {tuple(x.shape)}.")
    sizes = (*stride, *dilation, *kernel, *padding)
    if min(sizes[:6]) < 1 or min(padding) < 0 or max(sizes) >= LARGEST or not 0 <= activation <= 3:
        raise MicrogliaError(
            f"A convolution has kernel, stride and dilation from 1, padding from 0, all below {LARGEST}, and an activation "
            f"from 0 to 3, not {list(kernel)}, {list(stride)}, {list(dilation)}, {list(padding)} and {activation}."
        )
    shape = (x.shape[0], outputs, *_sides(x, kernel, stride, padding, dilation))
    if min(shape[2:]) < 1 or x.shape[1] < 1:
        raise MicrogliaError(f"A kernel of {list(kernel)} does not fit into images of {tuple(x.shape)}.")
    _check(x, places, bias, residual, shape, 1, kernel)
    taps = math.prod(kernel)
    if taps > MASKED_TAPS and max(padding) > 0:
        x, padding = functional.pad(x, (padding[1], padding[1], padding[0], padding[0])), (0, 0)
    x = x.contiguous(memory_format=torch.channels_last)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if taps == 1 and max(stride) == 1 and max(padding) == 0:
        x, flat = _pixels(x), _pixels(y)
        residual = None if residual is None else _pixels(residual)
    else:
        flat = y
    _run(Problem(x, places, bias, residual, flat, kernel, stride, padding, dilation, activation), tile)
    return y


def block_linear(
    x: Tensor,
    values: Tensor,
    row_pointer: Tensor,
    channel: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    outputs: int,
    activation: int,
    tile: Tile | None = None,
) -> Tensor:
    """Returns activation(linear(x) + bias + residual), (..., outputs).

    Args:
        x: (..., inputs).
        values: As all others, of `block_conv2d`.
        row_pointer: See there.
        channel: See there.
        bias: See there.
        residual: See there.
        outputs: Features written.
        activation: See there.
        tile: See there.

    Raises:
        MicrogliaError: Tensors or indices that do not fit each other.
    """
    places, shape = Places(values, row_pointer, channel, None), (*x.shape[:-1], outputs)
    if x.ndim < 1 or x.shape[-1] < 1 or not 0 <= activation <= 3:
        raise MicrogliaError(f"x of block_linear must be (..., inputs) with an activation from 0 to 3, not {tuple(x.shape)}.")
    _check(x, places, bias, residual, shape, -1, (1, 1))
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    rows = [None if t is None else t.contiguous().reshape(-1, t.shape[-1], 1, 1) for t in (x, residual)]
    assert rows[0] is not None
    ones = (1, 1)
    _run(Problem(rows[0], places, bias, rows[1], y.view(-1, outputs, 1, 1), ones, ones, (0, 0), ones, activation), tile)
    return y


def _sides(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> list[int]:
    sides = zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in sides]


def _pixels(image: Tensor) -> Tensor:
    """Returns an image in channels last as a batch of images of one pixel, without a copy."""
    return image.permute(0, 2, 3, 1).view(-1, image.shape[1], 1, 1)


def _check(
    x: Tensor, places: Places, bias: Tensor | None, residual: Tensor | None, shape: tuple[int, ...], axis: int, kernel: Pair
) -> None:
    inputs, outputs = x.shape[axis], shape[axis]
    if x.dtype not in DTYPES:
        raise MicrogliaError(f"The block kernels take float16, bfloat16 and float32, not {x.dtype}.")
    for name, given, expected in (
        ("values", places.values, places.values.shape),
        ("bias", bias, (outputs,)),
        ("residual", residual, shape),
    ):
        exact = name == "bias" and given is not None and given.dtype == torch.float32
        if given is not None and ((given.dtype != x.dtype and not exact) or given.shape != expected):
            raise MicrogliaError(
                f"The {name} must be {x.dtype}, as x, of {tuple(expected)}, not {given.dtype} of {tuple(given.shape)}."
            )
    for given in (*places, bias, residual):
        if given is not None and given.device != x.device:
            raise MicrogliaError(f"All tensors of a layer must be where x is, on {x.device}, not on {given.device}.")
    if math.prod(shape) // outputs + ALIGNMENT**2 >= INTEGER or places.values.numel() >= INTEGER:
        raise MicrogliaError(f"A layer has fewer than {INTEGER} output pixels and stored weights, not {tuple(shape)}.")
    if not all(given is None or given.is_contiguous() for given in (*places, bias)):
        raise MicrogliaError("The weights of a block layer must be contiguous.")
    check_once(places, outputs, inputs, kernel)


def _run(problem: Problem, tile: Tile | None) -> None:
    """Writes y."""
    if problem.y.numel() == 0:
        return
    if tile is None:
        options = tiles(problem.places.values.shape[1], problem.x.element_size())
        tile = fastest_tile(_key(problem), options, partial(_launch, problem), problem.x.device)
    _launch(problem, tile)


def _key(problem: Problem) -> tuple[Any, ...]:
    """Returns what the time of a problem depends on."""
    x, places = problem.x, problem.places
    sizes = (tuple(x.shape), tuple(problem.y.shape), tuple(places.values.shape), problem.residual is None)
    return (*sizes, x.element_size(), x.device, *map(tuple, problem[5:9]))


def turned(x: Tensor) -> Tensor:
    """Returns an image batch with its images as neighbours: (height x width x channels, images, rounded up).

    What lies behind the last image is not written: it is read for outputs that do not exist.

    Args:
        x: (images, channels, height, width) in channels last.
    """
    from microglia.runtime.gpu.triton.kernel import turn_kernel

    rows, columns = x.shape[0], x[0].numel()
    y = torch.empty(columns, rows + -rows % ALIGNMENT, dtype=x.dtype, device=x.device)
    grid = (-(-columns // SIDE) * -(-rows // SIDE),)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        turn_kernel[grid](x, y, rows, columns, columns, y.shape[1], SIDE=SIDE, WIDE=y.numel() + SIDE * columns >= INTEGER)
    return y


def _launch(problem: Problem, tile: Tile) -> Tensor:
    from microglia.runtime.gpu.triton.kernel import block_kernel

    x, places, bias, residual, y, kernel, stride, padding, dilation, activation = problem
    images, channels, height, width = x.shape
    outputs, out_height, out_width = y.shape[1:]
    flat = height == width == out_height == out_width == 1
    source = turned(x) if tile.turned else x
    step = source.shape[1] if tile.turned else 1  # between neighbours that are not images
    x_strides = (1 if tile.turned else height * width * channels, step, width * channels * step, channels * step)
    y_strides = (out_height * out_width * outputs, 1, out_width * outputs, outputs)
    stripes, pixels = places.row_pointer.numel() - 1, images * out_height * out_width
    readable = step if flat and tile.turned else pixels
    grid = (-(-pixels // tile.pixels) * stripes,)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        block_kernel[grid](
            source, *places, bias, residual, y, places.values.shape[0], stripes, images, channels, height, width, outputs,
            out_height, out_width, readable, *x_strides, *y_strides, *stride, *padding, *dilation,
            KERNEL_H=kernel[0], KERNEL_W=kernel[1], STRIPE=places.values.shape[2], WIDTH=places.values.shape[1],
            PIXELS=tile.pixels, COLUMNS=tile.columns, ACTIVATION=activation, HAS_TAP=places.tap is not None,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, BORDER=max(padding) > 0, FLAT=flat,
            IMAGES_LAST=tile.turned, WIDE=max(source.numel(), y.numel()) + tile.pixels * outputs >= INTEGER,
            PRECISION=_precision(math.prod(kernel)), WIDEN=not x.is_cuda and x.dtype == torch.bfloat16,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def _precision(taps: int) -> str:
    """Returns how float32 is multiplied: as PyTorch is set to multiply it in convolutions and in matrix products."""
    rounded = torch.backends.cudnn.allow_tf32 if taps > 1 else torch.backends.cuda.matmul.allow_tf32
    return "tf32" if rounded else "ieee"
