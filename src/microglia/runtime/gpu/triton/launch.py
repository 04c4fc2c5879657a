"""The operators: they check their arguments, lay them out for the kernels, and launch these.

The layout is that of the CPU's kernels: images in channels last, blocks as in `microglia.runtime.sparse_layers.layout`.
`block_conv2d` also takes blocks of 32, 64 and 128 outputs and of 16, 32 and 64 inputs.
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
"""Dtypes of activations and weights; sums are float32."""
MASKED_TAPS = 32
"""Up to this many kernel positions, one integer holds a bit per position; beyond, the image is padded."""
ALIGNMENT = 16
"""Rows of a transposed matrix are padded to a multiple of this many elements, so that loads are aligned."""
SIDE = 64
"""Side of the square that one program transposes."""
INTEGER = 2**31
"""From this many elements on, offsets need 64 bits."""
LARGEST = 2**26
"""Upper bound of stride, padding and dilation, so that positions outside the image do not overflow."""

Pair = Sequence[int]


class Problem(NamedTuple):
    """A convolution in the kernel's terms; a linear layer or 1x1 convolution works on images of one pixel."""

    x: Tensor  # (images, channels, height, width), channels last
    places: Places
    bias: Tensor | None
    residual: Tensor | None  # dtype and shape of y
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
        x: (batch, inputs, height, width), copied if it is not in channels last.
        values: (blocks, inputs of a block, outputs of a block), with the dtype of ``x``.
        row_pointer: See `microglia.runtime.sparse_layers.layout.Places`, as for the two following arguments.
        channel: First input of each block, a multiple of its inputs.
        tap: Position in the kernel of each block; None for a 1x1 kernel.
        bias: (outputs,) with the dtype of ``x`` or in float32, or None.
        residual: A tensor with the output's shape and dtype, or None.
        outputs: Output channels.
        kernel: Height and width, the order also of the three following pairs.
        stride: Stride of the output's pixels.
        padding: Zeros on each side.
        dilation: Distance between the taps.
        activation: Number in `microglia.runtime.operators.ACTIVATIONS`.
        tile: Partition of the work; None for the fastest, found by timing at the first call with a problem.

    Raises:
        MicrogliaError: Tensors, indices or geometry do not fit each other.
    """
    places = Places(values, row_pointer, channel, tap)
    if x.ndim != 4:
        raise MicrogliaError(f"x of block_conv2d must be (batch, inputs, height, width), not {tuple(x.shape)}.")
    _check_geometry(kernel, stride, padding, dilation, activation)
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
        values: See `block_conv2d`, as for all following arguments.
        row_pointer: See there.
        channel: See there.
        bias: See there.
        residual: See there.
        outputs: Features written.
        activation: See there.
        tile: See there.

    Raises:
        MicrogliaError: Tensors or indices do not fit each other.
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


def _check_geometry(kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, activation: int) -> None:
    sizes = (*stride, *dilation, *kernel, *padding)
    if min(sizes[:6]) < 1 or min(padding) < 0 or max(sizes) >= LARGEST or not 0 <= activation <= 3:
        raise MicrogliaError(
            f"A convolution has kernel, stride and dilation from 1, padding from 0, all below {LARGEST}, and an activation "
            f"from 0 to 3, not {list(kernel)}, {list(stride)}, {list(dilation)}, {list(padding)} and {activation}."
        )


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
    """Returns the key of a problem: all that its time depends on."""
    x, places = problem.x, problem.places
    sizes = (tuple(x.shape), tuple(problem.y.shape), tuple(places.values.shape), problem.residual is None)
    return (*sizes, x.element_size(), x.device, *map(tuple, problem[5:9]))


def turned(x: Tensor) -> Tensor:
    """Returns an image batch with the images in the last dimension: (height x width x channels, images, rounded up).

    The padding after the last image is not initialized: only outputs that do not exist read it.

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
    step = source.shape[1] if tile.turned else 1  # between neighbours that are pixels, not images
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
    """Returns the precision of float32 products, from PyTorch's settings for convolutions and matrix products."""
    rounded = torch.backends.cudnn.allow_tf32 if taps > 1 else torch.backends.cuda.matmul.allow_tf32
    return "tf32" if rounded else "ieee"
