"""The differentiable top-k: a soft mask of n scores whose sum is k, in time and memory proportional to n.

    f_i = sigmoid((m_i - theta) / tau),   theta such that   sum_i c_i f_i = K

with c_i = 1 unless units differ in size (the sigmoid top-k note; SMART, arXiv 2403.19969, adds tau). As tau falls the mask
becomes the indicator of the k largest; t tied scores that compete for q places get q/t each. Implicit differentiation, with v_i
= f_i (1 - f_i) and u the gradient at the mask, gives

    dL/dm_j = v_j (u_j - c_j (sum_i v_i u_i) / (sum_i c_i v_i)) / tau

so no iteration is unrolled, no tensor of size n^2 is made, and only the scores and theta are stored for the backward pass.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from microglia.core.errors import BudgetError, ScoreError
from microglia.core.soft_one import gradient_of, solve
from microglia.core.soft_rows import LONG, gradient_of_rows, solve_rows
from microglia.core.soft_sigmoid import COMPUTE, Units


class SoftTopK(NamedTuple):
    """A soft mask and its threshold.

    Attributes:
        mask: Values in [0, 1], shaped and typed like the scores, differentiable in them.
        threshold: theta in units of the scores, float64, () or (rows,), without gradient. At +inf only scores of +inf are kept,
            at -inf all but scores of -inf. The next solve may start from it.
    """

    mask: Tensor
    threshold: Tensor


def soft_topk(
    scores: Tensor,
    keep: float | Tensor,
    temperature: float | Tensor,
    *,
    sizes: Tensor | None = None,
    start: Tensor | None = None,
) -> SoftTopK:
    """Returns the soft mask whose sum, weighted with ``sizes`` where given, is ``keep``; differentiable only in the scores.

    Args:
        scores: (n,), or (rows, m) for one problem per row. -inf is never kept and +inf always, both without gradient.
            bfloat16 and float16 are computed in float32; the mask is rounded to their precision.
        keep: Sum of the mask, a real number from 0 to n (or the sum of sizes). For rows, one number for all, or (rows,).
        temperature: tau in units of the scores, from 1e-30 to 1e30.
        sizes: Size of each unit, above 0, shaped like the scores. None means 1.
        start: Threshold of an earlier solve of a similar problem. It saves evaluations and changes nothing else.

    Raises:
        BudgetError: ``keep`` cannot be met by the scores, or the temperature is out of range.
        ScoreError: A score is NaN, or the shapes do not fit together.

    Example:
        >>> scores = torch.tensor([-4.5951, -2.1972, -3.1781, 0.0, -1.1527])
        >>> soft_topk(scores, 3, temperature=1.0).mask.mul(1e4).round().int().tolist()
        [1462, 6531, 4139, 9443, 8426]
    """
    if scores.ndim not in (1, 2) or scores.dtype not in COMPUTE or scores.numel() == 0:
        raise ScoreError(
            "A soft top-k takes floating-point scores shaped (n,), or (rows, m) for one problem per row, at least one; got "
            f"{tuple(scores.shape)} of {scores.dtype}."
        )
    keeps, rows = keep if isinstance(keep, Tensor) and keep.ndim else None, scores.shape[:-1]
    for name, given, shape in (("keep", keeps, rows), ("sizes", sizes, scores.shape), ("start", start, rows)):
        if given is not None and given.shape != shape:
            raise ScoreError(f"For scores {tuple(scores.shape)}, {name} is shaped {tuple(shape)}; got {tuple(given.shape)}.")
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    # adding makes tensors of numbers in a way that torch.compile follows; it would compile again for each new number
    return SoftTopK(*_forward(scores, zero + keep, zero + temperature, sizes, start))


@torch.library.custom_op("microglia::soft_topk", mutates_args=())
def _forward(
    scores: Tensor, keep: Tensor, temperature: Tensor, sizes: Tensor | None, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    tau = temperature.item()
    if not 1e-30 <= tau <= 1e30:
        raise BudgetError(f"The temperature of a soft top-k is a number from 1e-30 to 1e30, hence above 0; got {tau:g}.")
    mask, threshold = _like(scores), scores.new_empty(scores.shape[:-1], dtype=torch.float64)
    wanted = keep.to(threshold).expand_as(threshold)
    guess = torch.full_like(threshold, math.nan) if start is None else start.to(threshold)
    units = Units(scores.detach(), sizes, tau)
    if _has_short_rows(scores):
        solve_rows(units, wanted, guess, mask, threshold)
    else:
        for row in _rows_of(scores):
            threshold[row] = solve(units.at(row), wanted[row].item(), guess[row].item(), mask[row])
    return mask, threshold


@_forward.register_fake
def _(scores: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(scores), scores.new_empty(scores.shape[:-1], dtype=torch.float64)


@torch.library.custom_op("microglia::soft_topk_backward", mutates_args=())
def _backward(arrived: Tensor, scores: Tensor, threshold: Tensor, temperature: Tensor, sizes: Tensor | None) -> Tensor:
    units, given, result = Units(scores.detach(), sizes, temperature.item()), arrived.detach(), _like(scores)
    if _has_short_rows(scores):
        gradient_of_rows(units, given, threshold, result)
    else:
        for row in _rows_of(scores):
            gradient_of(units.at(row), given[row], threshold[row].item(), result[row])
    return result


@_backward.register_fake
def _(arrived: Tensor, scores: Tensor, *_: Any) -> Tensor:
    return _like(scores)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, _, temperature, sizes, _ = inputs
    ctx.save_for_backward(scores, output[1], temperature, sizes)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, arrived: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _backward(arrived, *ctx.saved_tensors), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _like(scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape)


def _has_short_rows(scores: Tensor) -> bool:
    return scores.ndim == 2 and scores.shape[1] <= LONG


def _rows_of(scores: Tensor) -> list[tuple[int, ...]]:
    """Returns the index of each problem that is solved separately."""
    return [()] if scores.ndim == 1 else [(row,) for row in range(len(scores))]
