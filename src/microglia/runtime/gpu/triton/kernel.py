"""The Triton kernels: an implicit convolution that multiplies blocks of a weight by the pixels that they read.

This is the only file that imports triton; it is imported just before a kernel runs. With ``TRITON_INTERPRET=1`` set before, the
same kernels run in Triton's interpreter, on the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """Returns an activation by its number in `microglia.runtime.operators.ACTIVATIONS`; NaN stays NaN."""
    if ACTIVATION == 1 or ACTIVATION == 2:
        x = tl.where(x < 0, 0.0, x)
    if ACTIVATION == 2:
        x = tl.where(x > 6, 6.0, x)
    if ACTIVATION == 3:
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def taps_inside(top, left, height, width, dilation_h, dilation_w, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr):
    """Returns one bit per tap for each output pixel: whether it reads inside the image. At most 32 taps."""
    bits = tl.zeros_like(top)
    for tap in tl.static_range(KERNEL_H * KERNEL_W):
        row = top + (tap // KERNEL_W) * dilation_h
        column = left + (tap % KERNEL_W) * dilation_w
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        bits = bits | (inside.to(tl.int32) << tap)
    return bits


# Sizes that need no specialized code: otherwise each layer of a network would be compiled again.
PLAIN = ("blocks", "stripes", "height", "width", "out_height", "out_width", "stride_h", "stride_w", "padding_h", "padding_w")
PLAIN += ("dilation_h", "dilation_w")


@triton.jit(do_not_specialize=PLAIN)
def block_kernel(
    x,
    values,  # (blocks, WIDTH, STRIPE): the columns of a stripe lie below each other, the layout of the product
    row_pointer,
    channel,
    tap,
    bias,
    residual,
    y,
    blocks,
    stripes,
    images,
    channels,
    height,
    width,
    outputs,
    out_height,
    out_width,
    readable,  # pixels that may be read, including those that only fill a tile
    x_image,  # strides, in elements: of x, then of y and the residual
    x_channel,
    x_row,
    x_column,
    y_image,
    y_output,
    y_row,
    y_column,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIPE: tl.constexpr,  # outputs of a block
    WIDTH: tl.constexpr,  # inputs of a block
    PIXELS: tl.constexpr,  # output pixels of a program
    COLUMNS: tl.constexpr,  # columns of the weight in one step
    ACTIVATION: tl.constexpr,
    HAS_TAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BORDER: tl.constexpr,  # whether a tap can read outside the image
    FLAT: tl.constexpr,  # whether an image is one pixel, as for a linear layer
    IMAGES_LAST: tl.constexpr,  # whether the images are neighbours in memory: the order in which pixels are taken
    WIDE: tl.constexpr,  # whether an offset needs 64 bits
    PRECISION: tl.constexpr,  # precision of a float32 product: ieee or tf32
    WIDEN: tl.constexpr,  # for Triton's interpreter, whose product does not know bfloat16
):
    """Computes one stripe of outputs for one tile of pixels.

    Programs of one tile follow each other, so that its pixels are in the L2 cache when the next stripe reads them. A position
    outside the weight (a damaged index) counts as zero: nothing outside x is read.
    """
    stripe = tl.program_id(0) % stripes
    pixel = (tl.program_id(0) // stripes) * PIXELS + tl.arange(0, PIXELS)
    alive = pixel < readable
    if FLAT:
        image = pixel
        row = tl.zeros_like(pixel)
        column = tl.zeros_like(pixel)
    elif IMAGES_LAST:
        image = pixel % images
        column = (pixel // images) % out_width
        row = pixel // (images * out_width)
    else:
        column = pixel % out_width
        row = (pixel // out_width) % out_height
        image = pixel // (out_height * out_width)
    top = row * stride_h - padding_h
    left = column * stride_w - padding_w
    bits = tl.zeros_like(top)
    if BORDER:
        bits = taps_inside(top, left, height, width, dilation_h, dilation_w, KERNEL_H, KERNEL_W)
    if WIDE:
        source = image.to(tl.int64) * x_image + top.to(tl.int64) * x_row + left.to(tl.int64) * x_column
        target = image.to(tl.int64) * y_image + row.to(tl.int64) * y_row + column.to(tl.int64) * y_column
    else:
        source = image * x_image + top * x_row + left * x_column
        target = image * y_image + row * y_row + column * y_column

    lane = tl.arange(0, STRIPE)
    total = tl.zeros((PIXELS, STRIPE), dtype=tl.float32)
    begin = tl.maximum(tl.load(row_pointer + stripe), 0) * WIDTH
    end = tl.minimum(tl.load(row_pointer + stripe + 1), blocks) * WIDTH
    for step in range(begin, end, COLUMNS):
        entry = step + tl.arange(0, COLUMNS)
        live = entry < end
        block = entry // WIDTH
        # The first input of a wide block is a multiple of the block's width, so its inputs are read at once.
        first = (tl.load(channel + block, mask=live, other=0) // WIDTH) * WIDTH
        read = first + entry % WIDTH
        if WIDTH > 1:
            read = tl.max_contiguous(read, min(WIDTH, COLUMNS))
        there = live & (read >= 0) & (read < channels)
        offset = read * x_channel
        if WIDE:
            offset = read.to(tl.int64) * x_channel
        at = tl.zeros_like(read)
        if HAS_TAP:
            at = tl.load(tap + block, mask=live, other=0).to(tl.int32)
            there = there & (at < KERNEL_H * KERNEL_W)
            offset += (at // KERNEL_W) * dilation_h * x_row + (at % KERNEL_W) * dilation_w * x_column
        known = alive[:, None] & there[None, :]
        if BORDER:
            known = known & (((bits[:, None] >> at[None, :]) & 1) != 0)
        left_side = tl.load(x + source[:, None] + offset[None, :], mask=known, other=0.0)
        right_side = tl.load(values + entry[:, None] * STRIPE + lane[None, :], mask=live[:, None], other=0.0)
        if WIDEN:
            left_side, right_side = left_side.to(tl.float32), right_side.to(tl.float32)
        total = tl.dot(left_side, right_side, total, input_precision=PRECISION)

    output = stripe * STRIPE + lane
    exists = output < outputs
    if HAS_BIAS:
        total += tl.load(bias + output, mask=exists, other=0.0).to(tl.float32)[None, :]
    place = target[:, None] + output[None, :] * y_output
    wanted = (pixel < images * out_height * out_width)[:, None] & exists[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + place, mask=wanted, other=0.0).to(tl.float32)
    total = activated(total, ACTIVATION)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=wanted)


@triton.jit
def turn_kernel(x, y, rows, columns, x_row, y_column, SIDE: tl.constexpr, WIDE: tl.constexpr):
    """Writes the transposed matrix: y[column, row] = x[row, column]."""
    across = tl.cdiv(columns, SIDE)
    row = (tl.program_id(0) // across) * SIDE + tl.arange(0, SIDE)
    column = (tl.program_id(0) % across) * SIDE + tl.arange(0, SIDE)
    from_row, to_column = row, column
    if WIDE:
        from_row, to_column = row.to(tl.int64), column.to(tl.int64)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(x + from_row[:, None] * x_row + column[None, :], mask=inside)
    outside = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(y + to_column[:, None] * y_column + row[None, :], tl.trans(tile), mask=outside)
