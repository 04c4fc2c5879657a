"""Optimal Brain Compression (Frantar, Alistarh 2022): exact OBS of each row of a layer, weight after weight.

For each row w of a weight, with H = 2 E[x x^T] + lambda I of the layer's inputs:
    remove the weight q with the least w_q^2 / (2 [H^-1]_qq), the others compensate; down-date H^-1; repeat
The first removals of all rows that together cost least are taken. The kept weights are then the exact least squares.

It takes rows * columns^3 operations: for layers of a few hundred inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from microglia.core.errors import PatternError
from microglia.core.patterns import NM, Unstructured
from microglia.methods.layerwise_rules import PrunedLayer, Rule, Wish, rules
from microglia.scores.second_moments import matrix_of, weight_of

PIECE = 2**23
"""Numbers of the inverses of the rows that are down-dated at once."""


def removal_costs(rows: Tensor, inverse: Tensor, most: int, run: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Returns the order and the cost of the removals of each row by exact OBS, both (rows, most).

    Args:
        rows: (rows, columns).
        inverse: The inverse Hessian that all rows share, (columns, columns).
        most: Removals of each row.
        run: (n, m) of n:m: no run of m loses more than m - n; None for any.
    """
    weight, own = rows.clone(), inverse.expand(len(rows), *inverse.shape).clone()
    every = torch.arange(len(rows), device=rows.device)
    gone = torch.zeros_like(weight, dtype=torch.bool)
    order = torch.zeros((len(rows), most), dtype=torch.long, device=rows.device)
    costs = torch.zeros((len(rows), most), dtype=rows.dtype, device=rows.device)
    for turn in range(most):
        cost = weight.square() / (2 * own.diagonal(dim1=1, dim2=2)).clamp_min(torch.finfo(weight.dtype).tiny)
        closed = gone
        if run is not None:
            full = gone.view(len(rows), -1, run[1]).sum(2, keepdim=True) >= run[1] - run[0]
            closed = gone | full.expand(-1, -1, run[1]).reshape(gone.shape)
        cost = cost.masked_fill(closed, torch.inf)
        value, q = cost.min(1)
        column, pivot = own[every, :, q], own[every, q, q][:, None]
        weight = weight - column * (weight[every, q][:, None] / pivot)
        own = torch.baddbmm(own, column[:, :, None], (column / pivot)[:, None], alpha=-1)
        gone[every, q] = True
        weight[every, q] = 0
        order[:, turn], costs[:, turn] = q, value
    return order, costs


def exact_least_squares(rows: Tensor, kept: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows whose kept weights compensate exactly, and the error delta^T H delta / 2 of each."""
    keep = kept.to(rows)
    square = hessian * keep[:, :, None] * keep[:, None] + torch.diag_embed(1 - keep)
    right = ((rows * (1 - keep)) @ hessian) * keep
    weight = (rows + torch.linalg.solve(square, right[:, :, None])[..., 0]) * keep
    delta = weight - rows
    return weight, ((delta @ hessian) * delta).sum(1) / 2


def _prepare(moments: Tensor, wish: Wish) -> Tensor:
    """Returns H of each group, dampened, (groups, columns, columns)."""
    hessian = 2 * moments.double()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    diagonal += (wish.dampening * diagonal.mean(1, keepdim=True)).clamp_min(1e-12)
    return hessian


def _prune(weight: Tensor, hessian: Tensor, wish: Wish) -> PrunedLayer:
    """Keeps the weights that exact OBS leaves, row by row."""
    if not isinstance(wish.pattern, Unstructured | NM):
        raise PatternError(f"Exact OBS removes weight after weight, unstructured or N:M; got {wish.pattern}: take sparsegpt.")
    rows = matrix_of(weight).double()
    count, columns = rows.shape
    run = (wish.pattern.n, wish.pattern.m) if isinstance(wish.pattern, NM) else None
    most = columns if run is None else columns // run[1] * (run[1] - run[0])
    each = count // len(hessian)
    pieces = [
        (matrix, piece)
        for matrix, own in zip(hessian, torch.split(rows, each), strict=True)
        for piece in torch.split(own, max(1, PIECE // columns**2))
    ]
    removed, inverses = [], {id(matrix): torch.linalg.inv(matrix) for matrix, _ in pieces}
    for matrix, piece in pieces:
        removed.append(removal_costs(piece, inverses[id(matrix)], most, run))
    order, costs = (torch.cat([pair[i] for pair in removed]) for i in (0, 1))
    if run is None:  # the first removals of each row, those that cost least over all rows
        first = costs.cummax(1).values.flatten().argsort(stable=True)[: rows.numel() - wish.keep]
        taken = torch.zeros(costs.numel(), dtype=torch.bool, device=rows.device).index_fill_(0, first, True).view_as(costs)
    else:
        taken = torch.ones_like(costs, dtype=torch.bool)
    kept = torch.ones_like(rows, dtype=torch.bool).scatter_(1, order, ~taken)
    solved = [
        exact_least_squares(piece, own, matrix)
        for (matrix, piece), own in zip(pieces, torch.split(kept, [len(piece) for _, piece in pieces]), strict=True)
    ]
    shape = tuple(weight.shape)
    new = weight_of(torch.cat([w for w, _ in solved]), shape).to(weight.dtype)
    return PrunedLayer(new, weight_of(kept, shape), float(sum(loss.sum() for _, loss in solved)), wish.dampening)


rules.add("optimal-brain-compression")(Rule(_prune, "whole", _prepare))
