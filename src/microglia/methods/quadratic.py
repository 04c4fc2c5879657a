"""Removal of weights under a quadratic model of the loss, delta^T F delta / 2: cost of a unit, compensation by the others.

F = alpha I + X^T X / count, in blocks of weights (spec: survey 3.2, 10.2, 10.3). For a unit Q of weights w_Q
    loss = w_Q^T ([F^-1]_QQ)^-1 w_Q / 2
and for all removed weights Q of a block at once the kept ones K change by
    delta_K = (F_KK)^-1 F_KQ w_Q
which is the exact minimum under the constraint delta_Q = -w_Q. With a gradient g (WoodTaylor) the model is
g^T delta + delta^T F delta / 2. The cost is then that of w - F^-1 g in place of w, and
    delta_K = (F_KK)^-1 (F_KQ w_Q - g_K)

All tensors here are float64 with a leading dimension of blocks; weights that are absent have w = 0 and X = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from microglia.core.errors import ScoreError
from microglia.core.patterns import NM, Pattern, Shape

FIRST = 1e-12
"""Share of the mean of a diagonal that is first added to it where a matrix has no Cholesky factor."""


def groups_of(pattern: Pattern, shape: Shape) -> Tensor:
    """Returns the flat positions of each group of a weight (out, in, *kernel), (groups, largest size), -1 where it is smaller.

    A group is a unit of the pattern; for N:M it is a run of M weights.
    """
    sizes = pattern.sizes(shape)
    numbers = torch.arange(sizes.numel()).view(sizes.shape)
    if isinstance(pattern, NM):
        numbers = torch.arange(len(sizes))[:, None].expand(sizes.shape)
    owner = pattern.expand(numbers.contiguous(), shape).flatten()
    order = owner.argsort(stable=True)
    held = owner.bincount(minlength=int(numbers.max()) + 1)
    starts = held.cumsum(0) - held
    found = torch.full((len(held), int(held.max())), -1)
    ranks = torch.arange(len(order)) - starts.repeat_interleave(held)
    found[owner[order], ranks] = order
    return found[held > 0]


def blocks_of(groups: Tensor, size: int) -> Tensor:
    """Returns groups joined to blocks of about ``size`` weights, (blocks, groups of a block, group size), -1 for padding."""
    count, width = groups.shape
    each = min(max(1, size // width), count)
    padded = torch.cat([groups, groups.new_full((-count % each, width), -1)])
    return padded.view(-1, each, width)


def taken(values: Tensor, positions: Tensor) -> Tensor:
    """Returns values at flat positions, zero at -1.

    Args:
        values: (..., weights).
        positions: Any shape.
    """
    found = values[..., positions.clamp_min(0).to(values.device)]
    return torch.where((positions < 0).to(values.device), torch.zeros((), dtype=values.dtype, device=values.device), found)


def factor(matrix: Tensor) -> Tensor:
    """Returns the lower Cholesky factor of symmetric matrices; where rounding made one indefinite, its diagonal is raised.

    Raises:
        ScoreError: A matrix holds numbers that are not finite.
    """
    if not bool(matrix.isfinite().all()):
        raise ScoreError(
            "The curvature of the loss has numbers that are not finite: look for a diverged training, or raise alpha."
        )
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(matrix)
    added, mean = FIRST, matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None]
    while bool(failed.any()):
        raised = matrix.clone()
        raised.diagonal(dim1=-2, dim2=-1).add_(added * mean)
        lower, failed = torch.linalg.cholesky_ex(raised)
        added *= 10
    return lower


@dataclass(frozen=True)
class Quadratic:
    """The curvature F of some blocks of equal size.

    Attributes:
        rows: X, (blocks, rows, weights).
        count: The number of examples that X^T X is divided by.
        alpha: Dampening, added to the diagonal.
    """

    rows: Tensor
    count: int
    alpha: float

    def inverse(self) -> Tensor:
        """Returns F^-1, (blocks, weights, weights)."""
        rows, size = self.rows, self.rows.shape[2]
        identity = torch.eye(size, dtype=rows.dtype, device=rows.device)
        if size <= rows.shape[1]:
            return torch.cholesky_inverse(factor(self._matrix(rows)))
        lower = factor(self._small(rows))
        half = torch.linalg.solve_triangular(lower, rows, upper=False)
        inverse: Tensor = (identity - half.transpose(1, 2) @ half) / self.alpha
        return inverse

    def solved(self, kept: Tensor, right: Tensor) -> Tensor:
        """Returns (F_KK)^-1 X_K^T right, zero outside of K, (blocks, weights).

        Args:
            kept: K, boolean (blocks, weights).
            right: (blocks, rows).
        """
        rows = self.rows * kept[:, None]
        if rows.shape[2] <= rows.shape[1]:
            made = (rows.transpose(1, 2) @ right[..., None]).contiguous()
            return torch.cholesky_solve(made, factor(self._matrix(rows)))[..., 0] * kept
        small = torch.cholesky_solve(right[..., None], factor(self._small(rows)))
        return self.count * (rows.transpose(1, 2) @ small)[..., 0]

    def compensated(self, weight: Tensor, kept: Tensor, *, gradient: bool = False) -> Tensor:
        """Returns the weights after the removal of all that are not kept, zero there, (blocks, weights).

        Args:
            weight: (blocks, weights).
            kept: Boolean (blocks, weights).
            gradient: Whether the model has the mean of the rows as its gradient.
        """
        right = (self.rows @ (weight * ~kept)[..., None])[..., 0] / self.count
        if gradient:
            right = right - 1 / self.count
        return (weight + self.solved(kept, right)) * kept

    def unconstrained(self, weight: Tensor) -> Tensor:
        """Returns the weights at the minimum of the model with the mean of the rows as its gradient, (blocks, weights)."""
        everything = torch.ones_like(weight, dtype=torch.bool)
        return weight + self.solved(everything, weight.new_full(self.rows.shape[:2], -1 / self.count))

    def _matrix(self, rows: Tensor) -> Tensor:
        identity = torch.eye(rows.shape[2], dtype=rows.dtype, device=rows.device)
        return rows.transpose(1, 2) @ rows / self.count + self.alpha * identity

    def _small(self, rows: Tensor) -> Tensor:
        identity = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        return rows @ rows.transpose(1, 2) + self.alpha * self.count * identity


def diagonal_blocks(inverse: Tensor, width: int) -> Tensor:
    """Returns the square blocks on the diagonals of matrices, (blocks, groups, width, width)."""
    blocks, size = inverse.shape[:2]
    cut = inverse.view(blocks, size // width, width, size // width, width)
    return cut.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def group_losses(weight: Tensor, inverse: Tensor) -> Tensor:
    """Returns w_Q^T ([F^-1]_QQ)^-1 w_Q / 2 of each group, (...).

    Args:
        weight: w_Q, (..., width).
        inverse: [F^-1]_QQ, (..., width, width).
    """
    if weight.shape[-1] == 1:
        return weight[..., 0].square() / (2 * inverse[..., 0, 0])
    costs: Tensor = (weight * torch.linalg.solve(inverse, weight)).sum(-1) / 2
    return costs


def run_values(weight: Tensor, inverse: Tensor, kept: int) -> Tensor:
    """Returns values by which the best ``kept`` weights of each run are the largest, (..., run).

    The best are those whose removed rest costs least as a group. The values are above 1 for these, and below for the rest; by
    its own cost each weight is ordered within both.

    Args:
        weight: (..., run).
        inverse: [F^-1] of the run, (..., run, run).
        kept: n of n:m.
    """
    run = weight.shape[-1]
    single = weight.square() / (2 * inverse.diagonal(dim1=-2, dim2=-1))
    values = single / (1 + single)
    if run <= kept:
        return values + 1
    choices = list(combinations(range(run), run - kept))
    losses = [group_losses(weight[..., list(gone)], inverse[..., list(gone), :][..., list(gone)]) for gone in choices]
    best = torch.stack(losses).argmin(0)
    stays = torch.ones(len(choices), run, dtype=weight.dtype, device=weight.device)
    for row, gone in zip(stays, choices, strict=True):
        row[list(gone)] = 0
    return values + stays[best]
