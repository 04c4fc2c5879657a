"""A weight times one factor per block, without expanding the factors to the weight's size.

Expanded factors would be as large as the weight, and a network's weights do not fit in the cache. With them, and with
autograd's own products, the masks would take a tenth of the time of a training step. The compiled kernels read each weight
once forward and once backward; without them the same is done in pieces.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.native import compiled, torch_threads
from microglia.core.patterns import Block

CHUNK = 1 << 16
"""Elements of a weight per chunk, so that the product of weight and gradient stays in the cache."""


def scale_blocks(weight: Tensor, factors: Tensor, block: Block) -> Tensor:
    """Returns the weight with every block multiplied by its factor; differentiable in both.

    Args:
        weight: (out, in, *kernel), contiguous or channels-last; the result has the same layout.
        factors: One per block, flat, in the order of ``Block.reduce``.
        block: The pattern.
    """
    whole = weight.shape[0] // block.out * block.out
    if weight.shape[1] % block.in_ or not whole:  # few inputs (as in a stem), or fewer outputs than a block
        return weight * block.expand(factors, weight.shape).to(weight.dtype)
    grid = factors.to(weight.dtype).view(-(-weight.shape[0] // block.out), weight.shape[1] // block.in_, -1)
    if whole == weight.shape[0]:
        return _scaled(weight, grid, block)
    rows = _scaled(weight[:whole], grid[:-1], block)
    rest = _scaled(weight[whole:], grid[-1:], Block(weight.shape[0] - whole, block.in_))
    return torch.cat([rows, rest])


def _scaled(weight: Tensor, grid: Tensor, block: Block) -> Tensor:
    result: Tensor = _ScaledBlocks.apply(weight, grid, block)  # type: ignore[no-untyped-call]
    return result


class _ScaledBlocks(torch.autograd.Function):
    """dL/dw = f G and dL/df_b = <G_b, w_b> (spec: SMART 2.3)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Tensor, block: Block) -> Tensor:
        ctx.save_for_backward(weight, grid)
        ctx.block = block
        result = torch.empty_like(weight)
        if not _ran("mg_scale_blocks", block, weight, grid, result):
            torch.mul(_blocks(weight, block), _factors(weight, grid), out=_blocks(result, block))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, grid = ctx.saved_tensors
        block: Block = ctx.block
        gradient = torch.empty_like(weight).copy_(gradients[0]) if gradients[0].stride() != weight.stride() else gradients[0]
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[0] else None
        sums = grid.new_empty(grid.shape)
        if _ran("mg_scale_blocks_backward", block, weight, gradient, grid, of_weight, sums):
            return of_weight, sums, None
        step = max(1, CHUNK * max(1, torch.get_num_threads()) // max(1, weight[0].numel() * block.out))
        factors, w, g = _factors(weight, grid), _blocks(weight, block), _blocks(gradient, block)
        mine = _factors(weight, sums)
        result = _blocks(of_weight, block) if of_weight is not None else None
        for first in range(0, len(w), step):
            rows = slice(first, first + step)
            product = (g[rows] * w[rows]).sum(1, keepdim=True)
            inner = 4 if _channels_last(weight) else 3
            mine[rows] = product.sum(inner, keepdim=True)
            if result is not None:
                torch.mul(g[rows], factors[rows], out=result[rows])
        return of_weight, sums, None


class _Blocks(ctypes.Structure):
    """``mg_scaled`` of ``kernels.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "taps", "block_outputs", "block_inputs")),
        ("channels_last", ctypes.c_int32),
    )


@cache
def _kernel(name: str, tensors: int) -> Callable[..., int] | None:
    return compiled(name, (ctypes.POINTER(_Blocks), *[ctypes.c_void_p] * (tensors + 1)))


def _ran(name: str, block: Block, weight: Tensor, *others: Tensor | None) -> bool:
    """Runs a compiled kernel on the memory of tensors, and tells whether it could; nothing is written where it could not."""
    if torch.compiler.is_compiling() or (kernel := _kernel(name, 1 + len(others))) is None:
        return False
    tensors = [weight, *others]
    if any(t is not None and (type(t) not in (Tensor, nn.Parameter) or t.dtype != torch.float32) for t in tensors):
        return False
    if any(t is not None and (not t.is_cpu or not _dense(t)) for t in tensors):
        return False
    out, in_ = weight.shape[:2]
    shape = _Blocks(out, in_, weight[0, 0].numel(), block.out, block.in_, _channels_last(weight))
    return kernel(ctypes.byref(shape), *(None if t is None else t.data_ptr() for t in tensors), torch_threads()) == 0


def _dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _channels_last(weight: Tensor) -> bool:
    return weight.ndim > 2 and weight.shape[1] > 1 and weight.stride(1) == 1


def _blocks(weight: Tensor, block: Block) -> Tensor:
    """Returns a view with the block's sides as separate dimensions, ordered as in memory.

    Channels-last: (out / o, o, kernel, in / i, i); contiguous: (out / o, o, in / i, i, kernel).
    """
    out, in_ = weight.shape[0] // block.out, weight.shape[1] // block.in_
    if _channels_last(weight):
        return weight.movedim(1, -1).view(out, block.out, -1, in_, block.in_)
    return weight.view(out, block.out, in_, block.in_, -1)


def _factors(weight: Tensor, grid: Tensor) -> Tensor:
    """Returns a view of the factors, (out / o, in / i, kernel), that broadcasts against `_blocks`."""
    if _channels_last(weight):
        return grid.movedim(1, 2)[:, None, :, :, None]
    return grid[:, None, :, None, :]
