"""SparseGPT (Frantar, Alistarh 2023): masks of a layer chosen from left to right, the remaining weights compensate.

The algorithm (spec: survey 10.4, tasks 8.3), for a weight W (out, columns) and the second moments H of its inputs:
    H <- 2 E[x x^T] + lambda I;   U the upper factor of H^-1, H^-1 = U^T U
    for each block of columns, from the left:
        mask: the best of W^2 / diag(U)^2 in the block, as W is at this moment
        for each column j:  e_j = (W_j where removed, else 0) / U_jj;   W_k -= e_j U_jk for all k > j
    loss = sum e^2 / 2

Here the updates are joined: the columns are halved recursively, so that nearly all of the work is products of matrices. The
result is that of one column after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microglia.core.patterns import NM, Block, Pattern
from microglia.core.selection import keep_best

TRIANGLE = 256
"""Side from which on a triangular matrix is inverted by halves."""
LARGEST_DAMPENING = 1.0


@dataclass(frozen=True)
class Factor:
    """The inverse of a layer's Hessian.

    Attributes:
        upper: U with H^-1 = U^T U, (groups, columns, columns).
        dead: Columns whose input was always 0, boolean (groups, columns).
        dampening: Fraction of the mean of H's diagonal that was added to it; infinity where the identity replaced H.
    """

    upper: Tensor
    dead: Tensor
    dampening: float


@dataclass(frozen=True)
class Reconstruction:
    """A pruned layer.

    Attributes:
        weight: The compensated weight, (out, columns), 0 where it is removed.
        mask: True where a weight is kept.
        loss: Sum of e^2 / 2: the mean squared error of the outputs over the calibration rows, dampening included.
        dampening: See `Factor`.
    """

    weight: Tensor
    mask: Tensor
    loss: float
    dampening: float


def inverse_factor(moments: Tensor, dampening: float = 0.01) -> Factor:
    """Returns the upper factor of the inverse of H = 2 E[x x^T] + lambda I.

    Where H is not positive definite the dampening rises tenfold, up to 1. After that the identity replaces H.

    Args:
        moments: E[x x^T], (groups, columns, columns).
        dampening: lambda as a fraction of the mean of H's diagonal.
    """
    hessian = 2 * moments
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    diagonal[dead] = 1
    added = torch.where(dead, 0.0, diagonal).sum(1) / (~dead).sum(1).clamp_min(1)
    given = diagonal.clone()
    while dampening <= LARGEST_DAMPENING:
        diagonal.copy_(given + dampening * added[:, None])
        # The factor R of H = R R^T, R upper, is that of the reversed matrix: then U is the inverse of R.
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(-2, -1))
        if not failed.any() and bool(lower.isfinite().all()):
            upper = lower.flip(-2, -1)
            for group in upper:
                _invert(group)
            return Factor(upper, dead, dampening)
        dampening = max(10 * dampening, 1e-6)
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    return Factor(identity.expand_as(hessian), dead, float("inf"))


def _invert(upper: Tensor) -> None:
    """Inverts an upper triangular matrix in place, by halves."""
    size = len(upper)
    if size <= TRIANGLE:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, identity, upper=True))
        return
    half = size // 2
    first, second = upper[:half, :half], upper[half:, half:]
    _invert(first)
    _invert(second)
    upper[:half, half:] = -(first @ (upper[:half, half:] @ second))


def reconstruct(
    weight: Tensor,
    factor: Factor,
    pattern: Pattern,
    keep: int,
    *,
    width: int | None = None,
    mask_block: int = 128,
    update_block: int = 8,
    mask: Tensor | None = None,
) -> Reconstruction:
    """Prunes a layer, and changes its remaining weights so that its outputs change least.

    A column whose input was always 0 costs nothing: its weights go first.

    Args:
        weight: (out, columns).
        factor: The factor for the same columns; rows of the weight belong to its groups in order.
        pattern: Unstructured, blocks or N:M.
        keep: Weights to keep; ignored by N:M and by a given mask.
        width: Input channels, the innermost part of the columns, which a pattern does not cross; None for all columns.
        mask_block: Columns whose mask is chosen at once; N:M chooses within each run. The result depends on it.
        update_block: Columns that are updated one by one. It changes the speed alone.
        mask: The mask, instead of one of the pattern.
    """
    work = _Columns(weight, factor, pattern, keep=keep, update_block=update_block, mask=mask)
    work.prune(segments(weight.shape[1], width or weight.shape[1], pattern, mask_block))
    solved, kept = (found.transpose(1, 2).reshape(weight.shape).contiguous() for found in (work.weight, work.mask))
    return Reconstruction(solved.to(weight.dtype), kept, float(work.error.square().sum() / 2), factor.dampening)


def segments(columns: int, width: int, pattern: Pattern, mask_block: int) -> list[tuple[int, int]]:
    """Returns the (start, stop) of the columns whose mask is chosen at once, in order.

    Args:
        columns: All columns, a multiple of ``width``.
        width: Input channels.
        pattern: Units lie within one segment.
        mask_block: Largest length, rounded down to whole units.
    """
    if isinstance(pattern, NM):
        step, run = pattern.m, width
    elif isinstance(pattern, Block):
        step, run = max(pattern.in_, mask_block // pattern.in_ * pattern.in_), width
    else:
        step, run = mask_block, columns
    return [(at, min(at + step, end)) for end in range(run, columns + 1, run) for at in range(end - run, end, step)]


class _Columns:
    """The state while a layer is pruned; tensors are (groups, columns, rows), so that a column lies in one piece."""

    def __init__(
        self, weight: Tensor, factor: Factor, pattern: Pattern, *, keep: int, update_block: int, mask: Tensor | None
    ) -> None:
        groups, columns = factor.dead.shape
        self.weight = weight.detach().to(factor.upper.dtype).reshape(groups, -1, columns).transpose(1, 2).contiguous()
        self.error = torch.zeros_like(self.weight)
        self.upper, self.diagonal = factor.upper, factor.upper.diagonal(dim1=-2, dim2=-1)
        self.dead, self.pattern, self.keep, self.leaf = factor.dead, pattern, keep, update_block
        self.given, self.kept = mask is not None, 0
        self.mask = torch.ones_like(self.weight, dtype=torch.bool)
        if mask is not None:
            self.mask.copy_(mask.reshape(groups, -1, columns).transpose(1, 2))

    def prune(self, parts: Sequence[tuple[int, int]]) -> None:
        """Prunes consecutive segments, whose columns hold all updates of those before them."""
        if len(parts) == 1:
            if not self.given:
                self._choose(*parts[0])
            self._update(*parts[0])
            return
        first, second = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        self.prune(first)
        self._pass_on(first[0][0], first[-1][1], second[-1][1])
        self.prune(second)

    def _update(self, start: int, stop: int) -> None:
        """Removes the masked weights of columns, whose mask is known, and passes their errors on within them."""
        if stop - start > self.leaf:
            middle = (start + stop) // 2
            self._update(start, middle)
            self._pass_on(start, middle, stop)
            self._update(middle, stop)
            return
        kept = self.mask[:, start:stop]
        removed = ~kept & ~self.dead[:, start:stop, None]
        for at, j in enumerate(range(start, stop)):
            error = self.weight[:, j] * removed[:, at] / self.diagonal[:, j, None]
            self.error[:, j] = error
            if j + 1 < stop:
                self.weight[:, j + 1 : stop] -= self.upper[:, j, j + 1 : stop, None] * error[:, None]
        self.weight[:, start:stop] *= kept

    def _pass_on(self, start: int, middle: int, stop: int) -> None:
        """Updates the columns from middle to stop by the errors of those from start to middle."""
        factors = self.upper[:, start:middle, middle:stop].transpose(1, 2)
        self.weight[:, middle:stop].baddbmm_(factors, self.error[:, start:middle], alpha=-1)

    def _choose(self, start: int, stop: int) -> None:
        """Chooses the mask of one segment by what each weight would cost at this moment."""
        cost = (self.weight[:, start:stop] / self.diagonal[:, start:stop, None]).square_()
        cost.masked_fill_(self.dead[:, start:stop, None], 0.0)
        if isinstance(self.pattern, NM):
            self.mask[:, start:stop] = largest_of_run(cost, self.pattern.n)
            return
        columns, rows = self.weight.shape[1], len(self.weight) * self.weight.shape[2]
        flat = cost.transpose(1, 2).reshape(rows, stop - start)
        wanted = (2 * self.keep * stop + columns) // (2 * columns) - self.kept
        units, sizes = self.pattern.reduce(flat), self.pattern.sizes(flat.shape)
        chosen = keep_best({"": units}, min(max(wanted, 0), flat.numel()), {"": sizes})[""]
        mask = self.pattern.expand(chosen, flat.shape)
        self.mask[:, start:stop] = mask.reshape(len(self.weight), -1, stop - start).transpose(1, 2)
        self.kept += int(mask.count_nonzero())


def largest_of_run(values: Tensor, n: int) -> Tensor:
    """Returns which values are among the n largest of their run, boolean; among equal ones the first are taken.

    Args:
        values: (groups, run, rows): runs are compared along dimension 1.
        n: Values to keep in each run.
    """
    first, second = values[:, :, None], values[:, None]
    run = values.shape[1]
    earlier = torch.ones(run, run, dtype=torch.bool, device=values.device).tril(-1)[None, :, :, None]
    better = (second > first) | ((second == first) & earlier)
    return better.sum(2) < n
