"""Sums of a tensor over all its dimensions but one: every entry is read once, and all sums are in float64."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

BLOCK = 2**18
"""Entries that are converted at once: as float64 they stay in a processor's cache."""


def entry_sums(values: Tensor, dims: Collection[int], *, square: bool = False) -> dict[int, Tensor]:
    """Returns for each of some dimensions the sum of every entry over all other dimensions, float64 (entries,).

    A copy of the whole tensor in float64 takes more time than the sums, so blocks of rows are converted one after another.

    Example:
        >>> entry_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (0, 1), square=True)
        {0: tensor([ 5., 25.], dtype=torch.float64), 1: tensor([10., 20.], dtype=torch.float64)}

    Args:
        values: Any tensor with at least one dimension.
        dims: Indices of the dimensions, 0 or above.
        square: Whether to sum squares, which are in float64 too.
    """
    length, inner = values.shape[0], values.shape[1:].numel()
    step = max(1, BLOCK // max(1, inner))
    by_row = torch.empty(length, dtype=torch.float64, device=values.device)
    below = torch.zeros(inner, dtype=torch.float64, device=values.device)
    buffer = torch.empty((min(step, length), *values.shape[1:]), dtype=torch.float64, device=values.device)
    for start in range(0, length, step):
        part = values[start : start + step]
        block = buffer[: len(part)].copy_(part).view(len(part), inner)
        block = block.mul_(block) if square else block
        if 0 in dims:
            by_row[start : start + step] = block.sum(1)
        if any(dims):
            below += block.sum(0)
    inside = below.view(values.shape[1:])
    return {dim: _but(inside, dim - 1) if dim else by_row for dim in dims}


def _but(values: Tensor, dim: int) -> Tensor:
    """Returns the sums over all dimensions except one."""
    others = [k for k in range(values.ndim) if k != dim]
    return values.sum(others) if others else values
