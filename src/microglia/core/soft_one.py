"""One soft top-k over many scores: solved, applied and differentiated in cache-sized pieces.

theta is the root of a monotone function, found by Newton's method and secants within a guaranteed bracket:

    min(m) - tau a <= theta <= max(m) - tau a,   a = ln(K / (sum c - K)),   d(sum c f) / d(theta) = -(sum c v) / tau
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from microglia.core.largest import CHUNK
from microglia.core.soft_sigmoid import (
    COMPUTE,
    FAR,
    FINE,
    TURNS,
    Shift,
    Units,
    can_keep,
    keeps_least,
    keeps_most,
    logits,
    refuse_keep,
    refuse_nan,
    share_out,
    shares,
    slopes,
)

SAMPLE = 1 << 14  # size of the sample that gives a first guess where there are many more scores
COARSE = 1e-3  # relative error of a sum where a sample gives the first guess


class _Problem:
    """One problem in pieces. The sums do not depend on the number of threads."""

    def __init__(self, units: Units) -> None:
        self.scores, sizes, self.temperature = units
        self.length = len(self.scores) if self.scores.is_cuda else CHUNK
        self.dtype, self.pieces = COMPUTE[self.scores.dtype], self.split(self.scores)
        self.costs = self.split(sizes) if sizes is not None else (None,) * len(self.pieces)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Returns views of the pieces of a tensor shaped like the scores."""
        return torch.split(values, self.length)

    def shift(self, theta: float) -> Shift:
        """Returns `shift_of`, shaped (1,) and not (), so that half-precision scores are promoted by it."""
        theta = min(max(theta, -FAR), FAR)
        high = self.scores.new_tensor([theta], dtype=self.dtype)
        return Shift(high, high.new_tensor([(theta - high.item()) / self.temperature]))

    def each(self, work: Callable[[int, Tensor, Tensor], tuple[float, float] | None]) -> tuple[float, float]:
        """Calls ``work`` with the number of each piece and two buffers for it; returns the sums of the results."""

        def part(numbers: range) -> list[tuple[float, float] | None]:
            buffers = self.scores.new_empty((2, len(self.pieces[0])), dtype=self.dtype)
            return [work(i, *buffers[:, : len(self.pieces[i])]) for i in numbers]

        found = [pair for pairs in share_out(part, len(self.pieces), 4) for pair in pairs if pair is not None]
        return math.fsum(a for a, _ in found), math.fsum(b for _, b in found)

    def sums(self, theta: float) -> tuple[float, float]:
        """Returns (sum c f, sum c v). The second only steers Newton's method, so cancellation in it is harmless."""
        shift = self.shift(theta)

        def add(i: int, f: Tensor, other: Tensor) -> tuple[float, float]:
            logits(self.pieces[i], shift, self.temperature, f).sigmoid_()
            costs = self.costs[i]
            held = f if costs is None else torch.mul(f, costs, out=other)
            total = _sum(held)
            return total, total - _sum(torch.mul(held, f, out=other))

        return self.each(add)


def solve(units: Units, keep: float, start: float, mask: Tensor) -> float:
    """Writes the mask and returns theta; see `microglia.core.soft_topk.soft_topk`. A start of NaN means no start."""
    problem, (scores, sizes, temperature) = _Problem(units), units
    low, high, least, most = _survey(scores, sizes)
    if not can_keep(keep, least, most):
        refuse_keep(keep, least, most)
    if keeps_least(keep, least):
        theta = math.inf
    elif keeps_most(keep, most):
        theta = -math.inf
    else:
        offset = temperature * math.log((keep - least) / (most - keep))
        bracket = (low - offset, high - offset)
        guess = start if bracket[0] <= start <= bracket[1] else _guess(units, (keep - least) / (most - least), bracket)
        theta = _root(problem, keep, bracket, guess, FINE[problem.dtype])
    if low == high and math.isfinite(theta):  # in two exact parts: one rounded logit for all would change the sum
        mask.copy_(scores > low).masked_fill_(scores == low, (keep - least) / (most - least))
        return theta
    shift, parts = problem.shift(theta), problem.split(mask)

    def write(i: int, f: Tensor, other: Tensor) -> None:
        parts[i].copy_(shares(problem.pieces[i], shift, temperature, f))

    problem.each(write)
    return theta


def _survey(scores: Tensor, sizes: Tensor | None) -> tuple[float, float, float, float]:
    """Returns the least and largest finite score, and the least and most a mask may hold."""
    low, high = (end.item() for end in scores.aminmax())
    if math.isnan(low):
        refuse_nan(scores)
    most = float(len(scores)) if sizes is None else sizes.sum(dtype=torch.float64).item()
    if math.isfinite(low) and math.isfinite(high):
        return low, high, 0.0, most
    finite = scores[scores.isfinite()]
    low, high = (end.item() for end in finite.aminmax()) if len(finite) else (0.0, 0.0)
    return low, high, _held(scores == torch.inf, sizes), most - _held(scores == -torch.inf, sizes)


def _held(chosen: Tensor, sizes: Tensor | None) -> float:
    return float(chosen.count_nonzero()) if sizes is None else sizes[chosen].sum(dtype=torch.float64).item()


def _guess(units: Units, share: float, bracket: tuple[float, float]) -> float:
    """Returns an approximate theta, from a strided sample of the finite scores where there are many."""
    middle, step = (bracket[0] + bracket[1]) / 2, len(units.scores) // SAMPLE
    few = units.at(slice(None, None, max(1, step)))
    few = few.at(few.scores.isfinite()) if step >= 4 else few
    if step < 4 or not len(few.scores):
        return middle
    held = float(len(few.scores)) if few.sizes is None else few.sizes.sum(dtype=torch.float64).item()
    return _root(_Problem(few), share * held, bracket, middle, COARSE)


def _root(problem: _Problem, keep: float, bracket: tuple[float, float], guess: float, tolerance: float) -> float:
    """Returns theta. The sum is the criterion, because theta itself is free within a gap much wider than tau."""
    (low, high), theta, best, least, last = bracket, guess, guess, math.inf, math.inf
    before, total = math.nan, math.nan
    for _ in range(TURNS):
        previous, (total, slope) = total, problem.sums(theta)
        error, moved = total - keep, theta - before
        if abs(error) < least:
            best, least = theta, abs(error)
        low, high = (theta, high) if error > 0 else (low, theta)
        middle = (low + high) / 2
        if least <= tolerance * keep or high - low <= tolerance * problem.temperature or not low < middle < high:
            break
        if abs(moved) > 4 * problem.temperature:  # over such a distance the slope here is not informative
            slope = problem.temperature * (previous - total) / moved
        newton = theta + problem.temperature * error / slope if slope > 0 else math.inf
        before = theta
        if low < newton < high and abs(error) < last / 2:
            theta, last = newton, abs(error)
        else:
            theta, last = middle, math.inf
    return best


def gradient_of(units: Units, arrived: Tensor, theta: float, result: Tensor) -> None:
    """Writes dL/dm, given dL/df."""
    problem, temperature = _Problem(units), units.temperature
    shift, gradients, parts = problem.shift(theta), problem.split(arrived), problem.split(result)
    stored = result.dtype == problem.dtype  # otherwise v is computed twice, because storing it would round it

    def weigh(i: int, buffer: Tensor, other: Tensor) -> tuple[float, float]:
        v = slopes(problem.pieces[i], shift, temperature, parts[i] if stored else buffer)
        costs, moment = problem.costs[i], _sum(torch.mul(v, gradients[i], out=other))
        return moment, _sum(v if costs is None else torch.mul(v, costs, out=other))

    def finish(i: int, buffer: Tensor, other: Tensor) -> None:
        v = parts[i] if stored else slopes(problem.pieces[i], shift, temperature, buffer)
        costs = problem.costs[i]
        other.copy_(gradients[i])
        other.sub_(mean) if costs is None else other.sub_(costs, alpha=mean)
        parts[i].copy_(v.mul_(other).mul_(1 / temperature))

    moment, held = problem.each(weigh)
    mean = moment / held if held > 0 else 0.0
    problem.each(finish)


def _sum(values: Tensor) -> float:
    """Returns the sum of a piece; in float64 on a GPU, where pieces are large."""
    return float(values.sum(dtype=torch.float64 if values.is_cuda else None).item())
