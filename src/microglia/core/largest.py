"""The k largest of many tensors at once: exact, ties by position, without sorting or copying the scores."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from microglia.core.native import compiled

CHUNK = 31 << 10  # elements of one operation: stays in the cache; from 2^15 on torch would use its own threads
GPU_CHUNK = 1 << 24  # the same on a GPU, where few large operations are best
SMALL = 1 << 20  # up to this many elements in all, the tensors are copied into one
DEVIATIONS = 3  # half-width of the bracket; the sample misjudges about once in 400 times, which costs one more pass


class Largest(NamedTuple):
    """Masks that are true at the k largest elements, and the k-th largest value; no masks and NaN if any element is NaN."""

    masks: list[Tensor]
    value: float


class _Block(NamedTuple):
    """A piece of one tensor and of its mask; its length is a multiple of eight, or below eight."""

    values: Tensor
    mask: Tensor


class _Sides(NamedTuple):
    """Positions of the elements of a block relative to the bracket (low, high)."""

    at_least: int  # how many are >= high
    larger: int  # how many are > low
    inside: Tensor  # positions of those neither >= high nor <= low


@torch.inference_mode(False)  # the masks are ordinary tensors, which any thread may write
def largest(tensors: Sequence[Tensor], k: int) -> Largest:
    """Returns masks of the k largest elements of all tensors together; among equal ones the first are taken.

    Floyd and Rivest's SELECT (1975), streamed. Order statistics of a strided sample bracket the answer. One pass decides the
    elements outside the bracket and collects those inside; the rest of the work is on these few. Extra memory is the masks and
    about a tenth of the input.

    Args:
        tensors: One-dimensional contiguous floating-point tensors of one dtype and device.
        k: Rank, 1 <= k <= total number of elements.
    """
    total = sum(len(t) for t in tensors)
    if len(tensors) > 1 and total <= SMALL:  # for small tensors the calls cost more than the elements
        whole = largest([torch.cat(list(tensors))], k)
        return Largest(list(torch.split(whole.masks[0], [len(t) for t in tensors])) if whole.masks else [], whole.value)
    masks = [torch.empty_like(t, dtype=torch.bool) for t in tensors]
    blocks = [block for t, m in zip(tensors, masks, strict=True) for block in _blocks(t, m)]
    low, high = _bracket(tensors, total, k)
    while not (math.isnan(low) or math.isnan(high)):  # once; again if the sample misjudged or the answer is an end
        sides = _look(blocks, low, high)
        at_least, larger = sum(s.at_least for s in sides), sum(s.larger for s in sides)
        if low == high:
            if any(len(s.inside) for s in sides):
                break  # an element neither >= nor <= is NaN
            if larger < k <= at_least:
                _drop_last_equal(blocks, low, at_least - k)
                return Largest(masks, low)
            low, high = (low, math.inf) if k <= larger else (-math.inf, low)
        elif at_least < k <= larger:
            inside = [block.values.index_select(0, s.inside) for block, s in zip(blocks, sides, strict=True)]
            found = largest([torch.cat(inside)], k - at_least)
            if not found.masks:
                break
            for block, s, part in zip(blocks, sides, torch.split(found.masks[0], [len(i) for i in inside]), strict=True):
                block.mask.index_copy_(0, s.inside, part)
            return Largest(masks, found.value)
        else:
            low = high = high if k <= at_least else low
    return Largest([], math.nan)


def _blocks(values: Tensor, mask: Tensor) -> list[_Block]:
    size = 8 * (GPU_CHUNK if values.is_cuda else CHUNK)
    whole = len(values) // 8 * 8
    pieces = [*zip(torch.split(values[:whole], size), torch.split(mask[:whole], size), strict=True)]
    return [_Block(v, m) for v, m in [*pieces, (values[whole:], mask[whole:])] if len(v)]


def _bracket(tensors: Sequence[Tensor], total: int, k: int) -> tuple[float, float]:
    """Returns (low, high): sample quantiles that nearly always enclose the k-th largest; for few elements, that value twice."""
    if total <= CHUNK:
        value = torch.cat(list(tensors)).kthvalue(total - k + 1).values.item()
        return value, value
    sample = torch.cat([t[:: _stride(total)] for t in tensors])
    count, share = len(sample), k / total
    margin = DEVIATIONS * math.sqrt(share * (1 - share) * count) + 2
    first, last = math.floor(share * count - margin), math.ceil(share * count + margin)
    high = largest([sample], first).value if first > 0 else math.inf
    low = largest([sample], last).value if last <= count else -math.inf
    return low, high


def _stride(total: int) -> int:
    """Returns a stride without small factors: a stride that divides a layer's sizes would sample only some channels."""
    stride: int = math.ceil(total ** (1 / 3) / 2)
    while stride > 10 and math.gcd(stride, 2 * 3 * 5 * 7) > 1:  # a short tensor needs a denser sample
        stride += 1
    return stride


def _look(blocks: Sequence[_Block], low: float, high: float) -> list[_Sides]:
    threads = min(torch.get_num_threads(), sum(len(block.values) for block in blocks) // CHUNK)
    if threads <= 1 or blocks[0].values.is_cuda:
        return [_sides(block, low, high) for block in blocks]
    with ThreadPoolExecutor(threads) as pool:  # torch's own threads wait for one another after every operation
        return list(pool.map(lambda block: _sides(block, low, high), blocks))


def _sides(block: _Block, low: float, high: float) -> _Sides:
    """Writes ``values >= high`` into the block's mask and finds what lies inside the bracket."""
    if block.values.is_cpu and block.values.dtype == torch.float32 and (compiled_pass := _compiled_pass()) is not None:
        return _compiled_sides(compiled_pass, block, low, high)
    values, above = block.values, block.mask.view(torch.int8)  # torch compares into int8 twice as fast as into bool
    below = torch.empty_like(above)
    low_, high_ = values.new_tensor(low), values.new_tensor(high)
    pieces = 1 if values.is_cuda else math.ceil(len(values) / CHUNK)
    for part, a, b in zip(values.chunk(pieces), above.chunk(pieces), below.chunk(pieces), strict=True):
        torch.ge(part, high_, out=a)
        torch.le(part, low_, out=b)
    at_least, at_most = _count(above), _count(below) if low == high else 0
    inside = zeros(below.bitwise_or_(above).view(torch.bool))
    return _Sides(at_least, len(values) - at_most if low == high else at_least + len(inside), inside)


@functools.cache
def _compiled_pass() -> Callable[..., int] | None:
    pointer, number = ctypes.c_void_p, ctypes.c_float
    return compiled("mg_select_pass", (pointer, ctypes.c_int64, number, number, pointer, pointer, pointer))


def _compiled_sides(compiled_pass: Callable[..., int], block: _Block, low: float, high: float) -> _Sides:
    values, inside, counts = block.values, torch.empty(len(block.values), dtype=torch.int32), (ctypes.c_int64 * 3)()
    compiled_pass(values.data_ptr(), len(values), low, high, block.mask.data_ptr(), inside.data_ptr(), counts)
    at_least, at_most, count = counts
    return _Sides(at_least, len(values) - at_most if low == high else at_least + count, inside[:count].long())


def _count(flags: Tensor) -> int:
    """Returns how many of the bytes are 1. Most are added eight at a time (128 ones fit a byte)."""
    whole = len(flags) // 1024 * 1024
    count = flags[:whole].view(torch.int64).view(128, whole // 1024).sum(0).view(torch.uint8).sum()
    return int(count) + (int(flags[whole:].sum()) if whole < len(flags) else 0)


def zeros(mask: Tensor) -> Tensor:
    """Returns the positions at which a boolean vector is false; faster than ``nonzero`` where few are."""
    whole = len(mask) // 8 * 8
    if not whole or mask.storage_offset() % 8:
        return mask.logical_not().nonzero().squeeze(1)
    words = mask[:whole].view(torch.int64).ne(0x0101010101010101)
    groups = words.nonzero().squeeze(1)
    hits = mask[:whole].view(-1, 8).index_select(0, groups).logical_not_().view(-1).nonzero().squeeze(1)
    found = groups.index_select(0, hits >> 3).mul_(8).add_(hits & 7)
    return torch.cat([found, mask[whole:].logical_not().nonzero().squeeze(1) + whole]) if whole < len(mask) else found


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
