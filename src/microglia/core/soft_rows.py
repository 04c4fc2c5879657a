"""The thresholds of many small soft top-k problems, such as every four weights of 2:4, solved together."""

from __future__ import annotations

import torch
from torch import Tensor

from microglia.core.errors import BudgetError, ScoreError
from microglia.core.order import CHUNK
from microglia.core.soft_one import FINE, TURNS


def solve_rows(values: Tensor, keep: Tensor, temperature: float, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (mask, thresholds) of scores (rows, m); see `microglia.core.soft_topk.soft_topk`."""
    if bool(values.isnan().any()):
        raise ScoreError(f"{int(values.isnan().sum()):,} of {values.numel():,} scores of a soft top-k are NaN.")
    wanted = keep.to(values.device).expand(len(values))
    mask = torch.empty_like(values)
    threshold = torch.empty(len(values), dtype=torch.float64, device=values.device)
    rows = len(values) if values.is_cuda else max(1, CHUNK // max(1, values.shape[1]))
    guesses = torch.split(start, rows) if start is not None else (None,) * -(-len(values) // rows)
    pieces = zip(*(torch.split(t, rows) for t in (values, wanted, mask, threshold)), guesses, strict=True)
    for own, count, own_mask, own_threshold, guess in pieces:
        own_threshold.copy_(_root_rows(own, count, temperature, guess))
        own_mask.copy_(torch.sigmoid(_logits_rows(own, own_threshold, temperature)))
    return mask, threshold


def _root_rows(values: Tensor, keep: Tensor, temperature: float, start: Tensor | None) -> Tensor:
    """Returns theta of each row; infinite where all or none of the finite scores are kept."""
    finite = values.isfinite()
    free, above = finite.sum(1).double(), (values == torch.inf).sum(1).double()
    wanted = keep - above
    if bool(((wanted < -1e-9) | (wanted > free + 1e-9)).any()):
        worst = int(((wanted < -1e-9) | (wanted > free + 1e-9)).nonzero()[0])
        raise BudgetError(
            f"A soft top-k cannot keep {float(keep[worst]):g} of a row: its scores admit {float(above[worst]):g} to "
            f"{float(above[worst] + free[worst]):g} (a score of +inf is always kept, of -inf never)."
        )
    ends = (wanted <= 1e-9) | (wanted >= free - 1e-9)
    share = torch.where(ends, 0.5, wanted / (free - wanted).clamp_min(1e-300))
    offset = temperature * torch.where(ends, 0.0, share.log())
    low = torch.where(finite, values, torch.inf).amin(1).double() - offset
    high = torch.where(finite, values, -torch.inf).amax(1).double() - offset
    low, high = low.masked_fill(ends, 0.0), high.masked_fill(ends, 0.0)
    theta = (low + high) / 2
    if start is not None:
        theta = torch.where((start >= low) & (start <= high), start, theta)
    tolerance = 2 * FINE[values.dtype] * keep
    last = torch.full_like(theta, torch.inf)
    for _ in range(TURNS):
        f = torch.sigmoid(_logits_rows(values, theta, temperature))
        error = f.sum(1, dtype=torch.float64) - keep
        done = ends | (error.abs() <= tolerance) | ~((low < (low + high) / 2) & ((low + high) / 2 < high))
        if bool(done.all()):
            break
        low, high = torch.where(error > 0, theta, low), torch.where(error > 0, high, theta)
        newton = theta + temperature * error / (f * (1 - f)).sum(1, dtype=torch.float64)
        use = (newton > low) & (newton < high) & ((error.abs() < 0.5 * last) | last.isinf())
        last = torch.where(use, error.abs(), torch.inf)
        theta = torch.where(done, theta, torch.where(use, newton, (low + high) / 2))
    return torch.where(ends, torch.where(wanted <= 1e-9, torch.inf, -torch.inf).double(), theta)


def _logits_rows(values: Tensor, theta: Tensor, temperature: float) -> Tensor:
    """Returns (m - theta) / tau, theta subtracted in two parts as in `_Problem`; hard rows are +-inf."""
    high = theta.to(values.dtype)
    rest = ((theta - high.double()) / temperature).nan_to_num(0.0).to(values.dtype)
    z = (values - high[:, None]).mul_(1 / temperature).sub_(rest[:, None])
    return z.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)  # -inf - -inf: never kept, whatever theta


def gradient_of_rows(gradient: Tensor, scores: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    """Returns dL/dm from dL/df, row by row."""
    result = torch.empty_like(scores)
    rows = len(scores) if scores.is_cuda else max(1, CHUNK // max(1, scores.shape[1]))
    for own, arrived, theta, out in zip(*(torch.split(t, rows) for t in (scores, gradient, threshold, result)), strict=True):
        values = own.float() if own.dtype in (torch.float16, torch.bfloat16) else own
        z = _logits_rows(values, theta, temperature)
        v = torch.sigmoid(z) * torch.sigmoid(-z)
        u = arrived.to(values.dtype)
        mean = (v * u).sum(1, keepdim=True) / v.sum(1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
        out.copy_(v * (u - mean) / temperature)
    return result
