"""Layout of a sparse weight: blocks of 16 outputs, or groups of rows, to and from the dense weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from microglia.core.errors import MicrogliaError

STRIPE = 16
"""Outputs of a block: the lanes of one AVX-512 register, and the minimum of a tensor core's product on a GPU."""
STRIPES = (16, 32, 64, 128)
"""Possible outputs of a block on a GPU: so many outputs share the pixels that a program reads."""
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
"""Possible inputs of a block; more than 8 only on a GPU."""
TAPS = 256
"""Maximum number of kernel positions of a sparse weight: a tap is one byte."""
LINE = 64
"""Bytes of a pixel in one cache line: blocks are sorted so that all taps of a line follow each other while it is cached."""


class Places(NamedTuple):
    """The remaining weights and their positions.

    Attributes:
        values: (blocks, inputs of a block, outputs of a block) for blocks, or (blocks, inputs / 2, 16, 2) for pairs; (entries,
            rows of a group) for rows.
        row_pointer: int32; the blocks of stripe s, or entries of row group s, are those from row_pointer[s] to [s + 1].
        channel: int32, the first input channel of each block or entry.
        tap: uint8, its position in the kernel, row major; None for a 1x1 kernel or a linear layer.
    """

    values: Tensor
    row_pointer: Tensor
    channel: Tensor
    tap: Tensor | None

    @property
    def stored(self) -> int:
        """Number of stored weights, including zeros inside blocks."""
        return self.values.numel()


def to_blocks(weight: Tensor, width: int = 1, stripe: int = STRIPE, paired: bool | None = None) -> Places:
    """Returns the blocks of ``stripe`` outputs x ``width`` inputs of a weight that hold nonzero weights.

    On the CPU a weight in bfloat16 is stored in pairs of neighbouring inputs, the operands of one multiply-add instruction.
    Blocks of 1 or 2 inputs become the minimum number of pairs, which begin at any input: two kept columns share a pair if they
    are neighbours.

    Args:
        weight: (outputs, inputs, *kernel), with one group.
        width: 1, 2, 4 or 8; for a GPU also 16, 32 or 64.
        stripe: 16; for a GPU also 32, 64 or 128.
        paired: Whether to store pairs, in stripes of 16; None means pairs for a weight in bfloat16 on the CPU.
    """
    if width not in WIDTHS:
        raise MicrogliaError(f"A block has 1, 2, 4 or 8 inputs, on a GPU also 16, 32 or 64, not {width}.")
    if stripe not in STRIPES:
        raise MicrogliaError(f"A block has 16 outputs, on a GPU also 32, 64 or 128, not {stripe}.")
    check_taps(weight)
    if paired is None:
        paired = stripe == STRIPE and wants_pairs(weight)
    channels = max(LINE // weight.element_size(), width)
    outputs, inputs = weight.shape[:2]
    matrix = functional.pad(weight.detach().reshape(outputs, inputs, -1), (0, 0, 0, -inputs % channels, 0, -outputs % stripe))
    taps = matrix.shape[2]
    grid = matrix.reshape(-1, stripe, matrix.shape[1] // channels, channels, taps)
    grid = grid.permute(0, 2, 4, 3, 1)  # stripe, line, tap, input, output
    if paired and width <= 2:
        values, (row, line, tap, first) = _pairs(grid)
    else:
        grid = grid.reshape(*grid.shape[:3], channels // width, width, stripe)
        row, line, tap, block = (grid != 0).any(-1).any(-1).nonzero(as_tuple=True)
        values, first = grid[row, line, tap, block], block * width
    return Places(
        (values.reshape(len(values), (width + 1) // 2, 2, stripe).transpose(2, 3) if paired else values).contiguous(),
        pointer(row, len(grid)),
        (line * channels + first).int(),
        tap.to(torch.uint8) if taps > 1 else None,
    )


def wants_pairs(weight: Tensor) -> bool:
    """Tells whether the kernels take the blocks of a weight in pairs of inputs: in bfloat16 on the CPU."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


def _pairs(grid: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns the minimum set of pairs of neighbouring inputs of (stripe, line, tap, input, output), and their positions.

    From the left, a pair begins at each kept input that is not yet in a pair; this greedy choice is minimal. No pair spans two
    lines, so the last input of a line is paired with the input before it, with zero weights there.
    """
    kept = (grid != 0).any(-1)
    begins = torch.zeros_like(kept)
    for index in range(kept.shape[-1]):
        begins[..., index] = kept[..., index] & ~begins[..., index - 1] if index else kept[..., 0]
    last = begins[..., -1].clone()
    begins[..., -1] = False
    begins[..., -2] |= last
    where = begins.nonzero(as_tuple=True)
    values = torch.stack([grid[where], grid[*where[:3], where[3] + 1]], 1)
    taken = (where[3] == kept.shape[-1] - 2) & last[where[:3]]
    values[taken, 0] = 0
    return values, where


def every_block(weight: Tensor) -> Tensor:
    """Returns all blocks of 16 outputs x 1 input: (stripes, taps * inputs, 16), the taps outermost."""
    outputs, inputs = weight.shape[:2]
    matrix = functional.pad(weight.detach().reshape(outputs, inputs, -1), (0, 0, 0, 0, 0, -outputs % STRIPE))
    return matrix.reshape(-1, STRIPE, inputs, matrix.shape[2]).permute(0, 3, 2, 1).flatten(1, 2).contiguous()


def check_taps(weight: Tensor) -> None:
    """Raises for a kernel with too many positions."""
    if math.prod(weight.shape[2:]) > TAPS:
        raise MicrogliaError(f"A sparse kernel has at most {TAPS} positions, not {' x '.join(map(str, weight.shape[2:]))}.")


def to_rows(weight: Tensor, rows: int = 1) -> Places:
    """Returns the nonzero weights, in groups of outputs that share positions.

    Args:
        weight: (outputs, inputs, height, width), with one group of channels.
        rows: Outputs of a group: 1, 2 or 4.
    """
    if rows not in (1, 2, 4):
        raise MicrogliaError(f"Rows share their places by 1, 2 or 4, not {rows}.")
    check_taps(weight)
    outputs, inputs = weight.shape[:2]
    matrix = functional.pad(weight.detach().reshape(outputs, inputs, -1), (0, 0, 0, 0, 0, -outputs % rows))
    taps = matrix.shape[2]
    # Channels rise within a group, and taps within a channel: the kernel goes through the input a panel of channels at a time.
    grid = matrix.reshape(-1, rows, inputs, taps).permute(0, 2, 3, 1)  # group, channel, tap, row
    group, channel, tap = (grid != 0).any(-1).nonzero(as_tuple=True)
    return Places(
        grid[group, channel, tap].contiguous(),
        pointer(group, len(grid)),
        channel.int(),
        tap.to(torch.uint8) if taps > 1 else None,
    )


def one_group(weight: Tensor, groups: int) -> Tensor:
    """Returns the weight of a grouped convolution as an ungrouped weight, with zeros between the groups."""
    if groups == 1:
        return weight
    parts = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    full = weight.new_zeros(groups, parts.shape[1], groups, *weight.shape[1:])
    index = torch.arange(groups, device=weight.device)
    full[index, :, index] = parts
    return full.reshape(weight.shape[0], groups * weight.shape[1], *weight.shape[2:])


def dense_of_blocks(places: Places, outputs: int, inputs: int, kernel: Sequence[int]) -> Tensor:
    """Returns the dense weight, (outputs, inputs, *kernel), of blocks; ``kernel`` is empty for a linear layer."""
    values, row_pointer, channel, tap = places
    values = values.transpose(2, 3).flatten(1, 2) if values.ndim == 4 else values
    count, width, tall = values.shape
    taps = kernel[0] * kernel[1] if kernel else 1
    stripes = row_pointer.numel() - 1
    dense = values.new_zeros(stripes, taps, inputs + width, tall)
    stripe = torch.repeat_interleave(torch.arange(stripes, device=values.device), row_pointer.diff().long(), output_size=count)
    where = channel.new_zeros(count).long() if tap is None else tap.long()
    columns = channel.long()[:, None] + torch.arange(width, device=values.device)
    dense.index_put_((stripe[:, None], where[:, None], columns), values, accumulate=True)
    weight = dense[:, :, :inputs].permute(0, 3, 2, 1).reshape(stripes * tall, inputs, taps)[:outputs]
    return weight.reshape(outputs, inputs, *kernel)


def dense_of_every_block(values: Tensor, outputs: int, kernel: Sequence[int]) -> Tensor:
    """Returns the dense weight, (outputs, inputs, *kernel), from the result of `every_block`."""
    stripes, taps = len(values), math.prod(kernel)
    grid = values.reshape(stripes, taps, values.shape[1] // taps, STRIPE).permute(0, 3, 2, 1)
    return grid.reshape(stripes * STRIPE, values.shape[1] // taps, *kernel)[:outputs]


def dense_of_rows(places: Places, outputs: int, inputs: int, kernel: Sequence[int]) -> Tensor:
    """Returns the dense weight, (outputs, inputs, *kernel), of rows that share positions in groups."""
    values, row_pointer, channel, tap = places
    count, rows = values.shape
    taps, groups = kernel[0] * kernel[1], row_pointer.numel() - 1
    dense = values.new_zeros(groups, inputs, taps, rows)
    group = torch.repeat_interleave(torch.arange(groups, device=values.device), row_pointer.diff().long(), output_size=count)
    where = channel.new_zeros(count).long() if tap is None else tap.long()
    dense.index_put_((group, channel.long(), where), values, accumulate=True)
    return dense.permute(0, 3, 1, 2).reshape(groups * rows, inputs, taps)[:outputs].reshape(outputs, inputs, *kernel)


def pointer(rows: Tensor, count: int) -> Tensor:
    """Returns the start of each row in a list sorted by rows, int32 (count + 1)."""
    counts = torch.bincount(rows, minlength=count)
    return functional.pad(counts.cumsum(0), (1, 0)).int()
