"""Layout of a weight in 8 bits: quads of 16 outputs x 4 neighbouring inputs, to and from the dense weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from microglia.runtime.operators import level
from microglia.runtime.sparse_layers.layout import LINE, STRIPE, Places, check_taps, dense_of_blocks, pointer

QUAD = 4
"""Inputs of a block: what one instruction multiplies and adds for each output."""
LARGEST = 127
"""Largest magnitude of a rounded weight."""
TILE = 16
"""Quads of a stripe that one instruction of AMX multiplies."""
TILES = ("amx",)
"""Levels that multiply tiles of quads."""
PAIRS = {"avx2": 128, "avx512": 128}
"""Level -> maximum of |a| + |b| for neighbouring weights whose products with activations it adds in 16 bits: 255 * 128 fits."""


def largest() -> int:
    """Returns the largest magnitude to round weights to on this machine, so that no pair of neighbours exceeds its bound."""
    return min(LARGEST, PAIRS.get(level(), 2 * LARGEST) // 2)


def to_quads(weight: Tensor) -> Places:
    """Returns the minimum number of quads that hold every nonzero weight of each 16 outputs.

    A quad begins at any input, because the kernels read four neighbours at any place. Kept columns that lie apart are not
    brought together: the kernels would have to shuffle the activations of every pixel for each 16 outputs, which takes as many
    instructions as the multiplications that it saves. So 16x1 masks at density 0.3 store twice as many weights as 16x4 masks.

    On a machine that adds neighbouring products in 16 bits, blocks beyond its bound are stored as two whose weights add up.

    Args:
        weight: (outputs, inputs, *kernel) in int8, with one group.

    Returns:
        Places with values (blocks, 16, 4) in int8.
    """
    grid = _grid(weight, LINE)
    taps = grid.shape[2]
    row, line, tap, first = _begins((grid != 0).any(-1)).nonzero(as_tuple=True)
    start = first.clamp(max=LINE - QUAD)  # no quad spans two lines
    columns = start[:, None] + torch.arange(QUAD)
    values = grid[row[:, None], line[:, None], tap[:, None], columns]
    values = torch.where((columns >= first[:, None])[..., None], values, 0)  # the columns before are in the quad before
    places = Places(
        values.transpose(1, 2).contiguous(),
        pointer(row, len(grid)),
        (line * LINE + start).int(),
        tap.to(torch.uint8) if taps > 1 else None,
    )
    return _within(places, PAIRS.get(level()))


def to_tiles(weight: Tensor) -> Places:
    """Returns the quads that begin at multiples of four and hold every nonzero weight, in tiles as AMX multiplies them.

    The list of each 16 outputs is filled up to whole tiles by zeros at the place of its last quad.

    Args:
        weight: (outputs, inputs, *kernel) in int8, with one group.

    Returns:
        Places with values (tiles, 16 outputs, 16 quads, 4 inputs) in int8; the lists of channels and taps have a quad each.
    """
    grid = _grid(weight, QUAD)
    taps = grid.shape[2]
    row, quad, tap = grid.flatten(3).any(3).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(grid))
    whole = counts.add(TILE - 1).div(TILE, rounding_mode="floor") * TILE
    starts, before = whole.cumsum(0) - whole, counts.cumsum(0) - counts
    at = starts[row] + torch.arange(len(row)) - before[row]
    values = torch.zeros(int(whole.sum()), STRIPE, QUAD, dtype=torch.int8)
    values[at] = grid[row, quad, tap].transpose(1, 2)
    filled = torch.zeros(len(values), dtype=torch.long)  # position in the list -> number of its quad
    filled[at] = torch.arange(len(row))
    filled = filled.cummax(0).values
    tiles = values.view(-1, TILE, STRIPE, QUAD).transpose(1, 2).contiguous()
    channel = (quad[filled] * QUAD).int()
    return Places(
        tiles, functional.pad(whole.cumsum(0), (1, 0)).int(), channel, tap[filled].to(torch.uint8) if taps > 1 else None
    )


def _grid(weight: Tensor, across: int) -> Tensor:
    """Returns a weight by 16 outputs and ``across`` inputs, padded: (stripe, inputs / across, tap, input, output)."""
    check_taps(weight)
    outputs, inputs = weight.shape[:2]
    matrix = functional.pad(weight.detach().reshape(outputs, inputs, -1), (0, 0, 0, -inputs % across, 0, -outputs % STRIPE))
    return matrix.reshape(-1, STRIPE, matrix.shape[1] // across, across, matrix.shape[2]).permute(0, 2, 4, 3, 1)


def stored(weight: Tensor, pixels: int) -> Places:
    """Returns a weight in the layout that is fastest on this machine: tiles or quads; see `to_tiles` and `to_quads`.

    Args:
        weight: As there.
        pixels: Pixels or rows of the output; a tile multiplies 16 at once, and is a waste for a few.
    """
    return to_tiles(weight) if level() in TILES and pixels > TILE // 4 else to_quads(weight)


def _begins(kept: Tensor) -> Tensor:
    """Returns where quads begin: from the left, at each kept input that is not yet in a quad, which is minimal."""
    begins = torch.zeros_like(kept)
    for index in range(kept.shape[-1]):
        begins[..., index] = kept[..., index] & ~begins[..., max(0, index - QUAD + 1) : index].any(-1)
    return begins


def _within(places: Places, bound: int | None) -> Places:
    """Returns places in which neighbouring weights keep to a bound: a block beyond it becomes two."""
    values, row_pointer, channel, tap = places
    if bound is None or not len(values):
        return places
    pairs = values.int().abs().view(*values.shape[:2], 2, 2)
    beyond = pairs.sum(3).flatten(1).amax(1) > bound
    count = beyond.long() + 1
    half = torch.where(beyond[:, None, None], values.int().div(2, rounding_mode="trunc"), 0)
    last = count.cumsum(0) - 1
    more = (values - half).to(torch.int8).repeat_interleave(count, 0)
    more[last[beyond] - 1] = half[beyond].to(torch.int8)
    ends = functional.pad(count.cumsum(0), (1, 0))
    return Places(
        more,
        ends[row_pointer.long()].int(),
        channel.repeat_interleave(count),
        None if tap is None else tap.repeat_interleave(count),
    )


def dense_of_quads(places: Places, outputs: int, inputs: int, kernel: Sequence[int]) -> Tensor:
    """Returns the dense weight of quads or tiles, (outputs, inputs, *kernel), in float64, which holds it exactly."""
    values = places.values
    if values.ndim == 4:
        values = values.transpose(1, 2).flatten(0, 1)
    return dense_of_blocks(places._replace(values=values.transpose(1, 2).double()), outputs, inputs, kernel)
