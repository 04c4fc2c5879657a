"""The sigmoid of a soft top-k, shared by one long problem and by many short ones: masks, slopes, limits, refusals.

f = sigmoid((m - theta) / tau),   v = f (1 - f)
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from microglia.core.errors import BudgetError, ScoreError

TURNS = 200  # more evaluations than bisection alone needs
COMPUTE = {torch.float64: torch.float64, **dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), torch.float32)}
FINE = {torch.float32: 2e-7, torch.float64: 1e-14}  # relative error of a sum at which only its rounding remains
LIMIT = {torch.float32: 43.0, torch.float64: 350.0}  # logits beyond are as good as infinite, and many times slower:
NOTHING = {torch.float32: 2.2e-19, torch.float64: 1e-152}  # f or 1 - f up to this is 0: its square is not normal
FAR = 2.0**127  # stands for an infinite theta
Found = TypeVar("Found")


class Units(NamedTuple):
    """The ranked units: scores, sizes (None for 1), and the temperature."""

    scores: Tensor
    sizes: Tensor | None
    temperature: float

    def at(self, index: Any) -> Units:
        """Returns the part at an index."""
        return Units(self.scores[index], None if self.sizes is None else self.sizes[index], self.temperature)


class Shift(NamedTuple):
    """theta in two parts: a nearby score minus the first part is exact, even if tau is below the float spacing."""

    high: Tensor
    rest: Tensor  # divided by tau


def shift_of(theta: Tensor, temperature: float, dtype: torch.dtype) -> Shift:
    """Returns theta (float64, any shape) in two parts of the dtype scores are computed in."""
    theta = theta.clamp(-FAR, FAR)
    high = theta.to(dtype)
    return Shift(high, ((theta - high) / temperature).to(dtype))


def logits(scores: Tensor, shift: Shift, temperature: float, out: Tensor) -> Tensor:
    """Writes (m - theta) / tau, cut where its sigmoid is 0 or 1."""
    torch.sub(scores, shift.high, out=out).mul_(1 / temperature).sub_(shift.rest)
    return out.clamp_(-LIMIT[out.dtype], LIMIT[out.dtype])


def shares(scores: Tensor, shift: Shift, temperature: float, out: Tensor) -> Tensor:
    """Writes f, exactly 0 where the logits were cut."""
    f = logits(scores, shift, temperature, out).sigmoid_()
    return torch.threshold_(f, NOTHING[f.dtype], 0.0)


def slopes(scores: Tensor, shift: Shift, temperature: float, out: Tensor) -> Tensor:
    """Writes v = f (1 - f), from the smaller of the two, which has full precision."""
    smaller = logits(scores, shift, temperature, out).abs_().neg_().sigmoid_()
    torch.threshold_(smaller, NOTHING[smaller.dtype], 0.0)
    return smaller.addcmul_(smaller, smaller, value=-1)


def share_out(work: Callable[[range], Found], count: int, least: int) -> list[Found]:
    """Returns the results of ``work`` on consecutive parts of range(count), each of ``least`` or more, in order; in threads."""
    threads = max(1, min(torch.get_num_threads(), count // least))

    def quiet(numbers: range) -> Found:
        with torch.inference_mode():  # each thread has its own switch
            return work(numbers)

    bounds = [count * t // threads for t in range(threads + 1)]
    parts = map(range, bounds, bounds[1:])
    if threads == 1:
        return [quiet(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:  # torch's own threads wait for one another after every operation
        return list(pool.map(quiet, parts))


def refuse_nan(scores: Tensor) -> NoReturn:
    """Raises `ScoreError` if a score is NaN."""
    raise ScoreError(
        f"{int(scores.isnan().sum()):,} of {scores.numel():,} scores of a soft top-k are NaN. Scores must be numbers: look "
        "for a non-finite weight or gradient."
    )


def can_keep(keep: Any, least: Any, most: Any) -> Any:
    """Tells whether scores admit a mask of this sum, up to rounding; takes numbers or tensors."""
    return (least * (1 - 1e-6) <= keep) & (keep <= most * (1 + 1e-6))


def keeps_least(keep: Any, least: Any) -> Any:
    """Tells whether only scores of +inf are kept, so that theta is +inf."""
    return keep <= least * (1 + 1e-12)


def keeps_most(keep: Any, most: Any) -> Any:
    """Tells whether all but scores of -inf are kept, so that theta is -inf."""
    return keep >= most * (1 - 1e-12)


def refuse_keep(keep: float, least: float, most: float, row: str = "") -> NoReturn:
    """Raises `BudgetError` if the scores do not admit the sum."""
    raise BudgetError(
        f"A soft top-k cannot keep {keep:g}{row}: its scores admit {least:g} to {most:g} (a score of +inf is always kept, one "
        "of -inf never)."
    )
