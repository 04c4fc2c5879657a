"""The k largest of many tensors at once: exact, ties by position, without sorting or copying the scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 31 << 10  # elements of one operation: stays in the cache; from 2^15 on torch would call in its own threads
GPU_CHUNK = 1 << 24  # the same on a GPU, where few large operations are best
DEVIATIONS = 3  # half-width of the bracket; the sample misjudges about once in 400 times, which costs one more pass
GROUP = 8  # neighbours collected together, because eight flags read as one integer


class Largest(NamedTuple):
    """Masks that are true at the k largest elements, and the k-th largest value; no masks and NaN if any element is NaN."""

    masks: list[Tensor]
    value: float


class _Block(NamedTuple):
    """A piece of one tensor and of its mask, looked at in groups of ``width`` neighbours."""

    values: Tensor
    mask: Tensor
    width: int


class _Sides(NamedTuple):
    """How much of a block lies on each side of the bracket, and the groups with something inside: the open ones."""

    at_least: int  # elements >= the upper end
    at_most: int  # elements <= the lower end
    groups: Tensor  # numbers of the open groups
    values: Tensor  # their elements, flat
    at_least_in_groups: int


@torch.inference_mode(False)  # the masks are ordinary tensors, which any thread may write
def largest(tensors: Sequence[Tensor], k: int, group: int = GROUP) -> Largest:
    """Returns masks of the k largest elements of all tensors together; among equal ones the first are taken.

    Floyd and Rivest's SELECT (1975), streamed: order statistics of a strided sample bracket the answer, one pass decides what
    lies outside and collects what lies inside, and the rest of the work is on those few. Extra memory is the masks and a
    few percent of the input.

    Args:
        tensors: One-dimensional contiguous floating-point tensors of one dtype and device.
        k: Rank, 1 <= k <= total number of elements.
        group: Neighbours that are collected together, 8 or 1.
    """
    total = sum(len(t) for t in tensors)
    masks = [torch.empty_like(t, dtype=torch.bool) for t in tensors]
    blocks = [block for t, m in zip(tensors, masks, strict=True) for block in _blocks(t, m, group)]
    if total <= CHUNK:  # torch's own quickselect is the fastest
        low = high = torch.cat(list(tensors)).kthvalue(total - k + 1).values.item()
    else:
        low, high = _bracket(tensors, total, k)
    while not (math.isnan(low) or math.isnan(high)):  # once; again if the sample misjudged or the answer is an end
        found = _sides(blocks, low, high)
        at_least, larger = sum(f.at_least for f in found), total - sum(f.at_most for f in found)
        if low == high:
            if any(len(f.groups) for f in found):
                break  # what is neither >= nor <= is NaN
            if larger < k <= at_least:
                _drop_last_equal(blocks, low, at_least - k)
                return Largest(masks, low)
            low, high = (low, math.inf) if k <= larger else (-math.inf, low)
        elif at_least < k <= larger:
            k_inside = k - at_least + sum(f.at_least_in_groups for f in found)
            inside = largest([torch.cat([f.values for f in found])], k_inside, group=1)
            if not inside.masks:
                break
            parts = torch.split(inside.masks[0], [len(f.values) for f in found])
            for block, f, part in zip(blocks, found, parts, strict=True):
                block.mask.view(-1, block.width).index_copy_(0, f.groups, part.view(-1, block.width))
            return Largest(masks, inside.value)
        else:
            low = high = high if k <= at_least else low
    return Largest([], math.nan)


def _blocks(values: Tensor, mask: Tensor, group: int) -> list[_Block]:
    """Cuts a tensor into blocks of whole groups and, at its end, what does not fill a group."""
    size = group * (GPU_CHUNK if values.is_cuda else CHUNK)
    whole = len(values) // group * group
    pieces = [*zip(torch.split(values[:whole], size), torch.split(mask[:whole], size), strict=True)]
    blocks = [_Block(v, m, group) for v, m in pieces] + [_Block(values[whole:], mask[whole:], 1)]
    return [block for block in blocks if len(block.values)]


def _bracket(tensors: Sequence[Tensor], total: int, k: int) -> tuple[float, float]:
    """Returns (low, high), sample quantiles that enclose the k-th largest nearly always."""
    sample = torch.cat([t[:: math.ceil(total ** (1 / 3) / 2)] for t in tensors])
    count, share = len(sample), k / total
    margin = DEVIATIONS * math.sqrt(share * (1 - share) * count) + 2
    first, last = math.floor(share * count - margin), math.ceil(share * count + margin)
    high = largest([sample], first, group=1).value if first > 0 else math.inf
    low = largest([sample], last, group=1).value if last <= count else -math.inf
    return low, high


def _sides(blocks: Sequence[_Block], low: float, high: float) -> list[_Sides]:
    threads = min(torch.get_num_threads(), sum(len(block.values) for block in blocks) // CHUNK)
    if threads <= 1 or blocks[0].values.is_cuda:
        return [_sides_of(block, low, high) for block in blocks]
    with ThreadPoolExecutor(threads) as pool:  # torch's own threads wait for one another after every operation
        return list(pool.map(lambda block: _sides_of(block, low, high), blocks))


def _sides_of(block: _Block, low: float, high: float) -> _Sides:
    """Writes ``values >= high`` into the block's mask and finds the groups with an element neither >= high nor <= low."""
    values, width = block.values, block.width
    above = block.mask.view(torch.int8)  # torch compares into int8 twice as fast as into bool
    below = torch.empty_like(above)
    size = GPU_CHUNK if values.is_cuda else CHUNK
    low_, high_ = values.new_tensor(low), values.new_tensor(high)
    for part, a, b in zip(torch.split(values, size), torch.split(above, size), torch.split(below, size), strict=True):
        torch.ge(part, high_, out=a)
        torch.le(part, low_, out=b)
    at_least, at_most = _count(above), _count(below)
    flags, decided = (torch.int64, 0x0101010101010101) if width == GROUP else (torch.int8, 1)
    groups = below.view(flags).bitwise_or_(above.view(flags)).bitwise_xor_(decided).nonzero().squeeze(1)
    in_groups = above.view(flags).index_select(0, groups).view(torch.bool).count_nonzero()
    return _Sides(at_least, at_most, groups, values.view(-1, width).index_select(0, groups).view(-1), int(in_groups))


def _count(flags: Tensor) -> int:
    """Returns how many of the bytes are 1; most are added eight at a time (128 ones fit a byte)."""
    whole = len(flags) // 1024 * 1024
    words = flags[:whole].view(torch.int64).view(128, whole // 1024)
    return int(words.sum(0).view(torch.uint8).sum() + flags[whole:].sum())


def _drop_last_equal(blocks: Sequence[_Block], value: float, count: int) -> None:
    """Clears the masks at the last ``count`` elements equal to ``value``."""
    for block in reversed(blocks):
        if count == 0:
            return
        equal = block.values == value
        if (found := int(equal.count_nonzero())) > count:
            equal[equal.nonzero().squeeze(1)[:-count]] = False
        block.mask.masked_fill_(equal, False)
        count -= min(found, count)
