"""The differentiable top-k: a soft mask of n scores whose sum is k (SMART, arXiv 2403.19969, section 2; spec 1).

    f_i = sigmoid((m_i - theta) / tau),   theta such that   sum_i c_i f_i = K

with costs c_i of 1 unless sizes are given. As tau falls the mask becomes the indicator of the k largest. theta is the
root of a monotone function: safeguarded Newton inside a bracket that always holds it. The gradient is closed, with
v_i = f_i (1 - f_i) and u the gradient that arrives,

    dL/dm_j = v_j (u_j - c_j (sum_i v_i u_i) / (sum_i c_i v_i)) / tau

so nothing is unrolled, and nothing of size n^2 is ever made.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from microglia.core.errors import BudgetError, ScoreError
from microglia.core.soft_one import gradient_of, solve
from microglia.core.soft_rows import gradient_of_rows, solve_rows


class SoftTopK(NamedTuple):
    """A soft mask and its threshold.

    Attributes:
        mask: In [0, 1], like the scores.
        threshold: theta, float64, () or (rows,); without gradient. The next solve may start from it.
    """

    mask: Tensor
    threshold: Tensor


def soft_topk(
    scores: Tensor,
    keep: float | Tensor,
    temperature: float,
    *,
    sizes: Tensor | None = None,
    start: Tensor | None = None,
) -> SoftTopK:
    """Returns the soft mask whose (weighted) sum is ``keep``; differentiable in the scores.

    Args:
        scores: (n,), or (rows, m) for one problem per row. -inf is never kept and +inf always, both without gradient.
            bfloat16 and float16 are computed in float32; their mask has their precision.
        keep: Sum of the mask, from 0 to n (to the sum of sizes); one number, or one per row.
        temperature: tau > 0, in units of the scores.
        sizes: What each unit counts for, above 0, shaped (n,); None means 1.
        start: Threshold of an earlier solve with nearly the same scores.

    Raises:
        BudgetError: ``keep`` or the temperature is out of range.
        ScoreError: A score is NaN.

    Example:
        >>> scores = torch.tensor([-4.5951, -2.1972, -3.1781, 0.0, -1.1527])
        >>> soft_topk(scores, 3, 1.0).mask.mul(1e4).round().int().tolist()
        [1462, 6531, 4139, 9443, 8426]
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise BudgetError(f"The temperature of a soft top-k is a number above 0; got {temperature}.")
    if scores.ndim not in (1, 2) or not scores.is_floating_point() or (sizes is not None and scores.ndim == 2):
        raise ScoreError(
            f"A soft top-k takes floating-point scores (n,), with sizes or without, or (rows, m); got {scores.dtype} "
            f"{tuple(scores.shape)}{' with sizes' if sizes is not None else ''}."
        )
    wanted = torch.as_tensor(keep, dtype=torch.float64)
    mask, threshold = _operator(scores, wanted, float(temperature), sizes, start)
    return SoftTopK(mask, threshold)


@torch.library.custom_op("microglia::soft_topk", mutates_args=())
def _operator(
    scores: Tensor, keep: Tensor, temperature: float, sizes: Tensor | None, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    values = scores.detach()
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    if values.ndim == 2:
        mask, threshold = solve_rows(values, keep, temperature, start)
    else:
        mask, threshold = solve(values.contiguous(), float(keep), temperature, sizes, start)
    return mask.to(scores.dtype), threshold


@_operator.register_fake
def _(scores: Tensor, keep: Tensor, temperature: float, sizes: Tensor | None, start: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(scores), scores.new_empty(scores.shape[:-1], dtype=torch.float64)


@torch.library.custom_op("microglia::soft_topk_backward", mutates_args=())
def _backward_operator(gradient: Tensor, scores: Tensor, threshold: Tensor, temperature: float, sizes: Tensor | None) -> Tensor:
    if scores.ndim == 2:
        return gradient_of_rows(gradient, scores, threshold, temperature)
    return gradient_of(gradient.contiguous(), scores.contiguous(), float(threshold), temperature, sizes)


@_backward_operator.register_fake
def _(gradient: Tensor, scores: Tensor, threshold: Tensor, temperature: float, sizes: Tensor | None) -> Tensor:
    return torch.empty_like(scores)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, _, temperature, sizes, _ = inputs
    ctx.save_for_backward(scores, output[1], sizes)
    ctx.temperature = temperature
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    scores, threshold, sizes = ctx.saved_tensors
    return _backward_operator(gradient, scores, threshold, ctx.temperature, sizes), None, None, None, None


_operator.register_autograd(_differentiate, setup_context=_setup)
