"""Exact order statistics over many tensors at once, without a sort and without a copy of the scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 17  # elements; a chunk and its two flag buffers stay in the second-level cache
SMALL = 1 << 16  # below this many candidates a plain sort is the fastest


class Rank(NamedTuple):
    """The k-th largest value, how many elements are strictly larger, and how many are equal to it."""

    value: float
    larger: int
    equal: int


def kth_largest(tensors: Sequence[Tensor], k: int) -> Rank:
    """Returns the k-th largest value of all elements together, with its exact rank.

    Floyd and Rivest's SELECT (1975), streamed: order statistics of a strided sample bracket the answer, one pass counts what
    lies above the bracket and collects what lies inside, and the rest of the work is on those few. Extra memory is the
    bracket's content and two chunk-sized buffers, whatever the input.

    Args:
        tensors: One-dimensional contiguous tensors of one dtype and device, without NaN.
        k: Rank, 1 <= k <= total number of elements.
    """
    total = sum(t.numel() for t in tensors)
    if total <= SMALL:
        return _kth_by_sort(torch.cat(list(tensors)), k)
    low, high = _bracket(tensors, total, k)
    while True:
        above, inside, candidates = _split(tensors, low, high)
        if k <= above:  # the sample misjudged: nothing below the bracket can be the answer
            low, high = high, math.inf
        elif k > above + inside:
            low, high = -math.inf, low
        elif low == high:
            return Rank(low, above, inside)
        else:
            value, larger, equal = kth_largest([candidates], k - above)
            return Rank(value, above + larger, equal)


def _kth_by_sort(values: Tensor, k: int) -> Rank:
    value = values.sort(descending=True).values[k - 1]
    return Rank(value.item(), int((values > value).sum()), int((values == value).sum()))


def _bracket(tensors: Sequence[Tensor], total: int, k: int) -> tuple[float, float]:
    """Returns (low, high) that contain the k-th largest with near certainty: sample quantiles five deviations apart."""
    stride = max(1, total // SMALL)
    sample = torch.cat([t[::stride] for t in tensors]).sort(descending=True).values
    count, share = len(sample), k / total
    margin = 5 * math.sqrt(share * (1 - share) * count) + 2
    first, last = math.floor(share * count - margin), math.ceil(share * count + margin)
    high = sample[first].item() if first >= 0 else math.inf
    low = sample[last].item() if last < count else -math.inf
    return low, high


def _split(tensors: Sequence[Tensor], low: float, high: float) -> tuple[int, int, Tensor]:
    """Counts the elements > high and those in [low, high], and collects the latter unless low == high."""
    above = inside = 0
    found: list[Tensor] = []
    # Flags of the scores' own type: torch compares into that about twice as fast as into bool.
    over, band = tensors[0].new_empty(2, CHUNK)
    for chunk in _chunks(tensors):
        n = len(chunk)
        torch.gt(chunk, high, out=over[:n])
        torch.ge(chunk, low, out=band[:n])
        band[:n] -= over[:n]  # `> high` implies `>= low`
        above += int(over[:n].sum(dtype=torch.float32))  # exact: CHUNK < 2^24
        here = int(band[:n].sum(dtype=torch.float32))
        inside += here
        if here and low != high:
            found.append(_gather(chunk, band[:n], here))
    return above, inside, torch.cat(found) if found else tensors[0][:0]


def _gather(chunk: Tensor, band: Tensor, count: int) -> Tensor:
    """Returns the chunk's elements whose flag is not 0; where hits are rare, flags are looked at eight bytes at a time."""
    width = 8 // chunk.element_size()
    words = len(chunk) // width
    if width == 1 or count * 16 > len(chunk):
        return chunk[band != 0]
    hits = band[: words * width].view(torch.int64).nonzero().squeeze(1)
    near = chunk[: words * width].view(words, width)[hits]
    body = near[band[: words * width].view(words, width)[hits] != 0]
    return torch.cat([body, chunk[words * width :][band[words * width :] != 0]])


def _chunks(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        yield from torch.split(tensor, CHUNK)


def last_positions(tensors: Sequence[Tensor], value: float, count: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (tensor number, flat positions) of the last ``count`` elements equal to ``value``, found from the end."""
    for number in reversed(range(len(tensors))):
        start = len(tensors[number])
        for chunk in reversed(torch.split(tensors[number], CHUNK)):
            if count == 0:
                return
            start -= len(chunk)
            found = (chunk == value).nonzero().squeeze(1)[-count:]
            if len(found):
                count -= len(found)
                yield number, found + start
