"""The threshold of one soft top-k over many scores: solved, applied and differentiated in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from microglia.core.errors import BudgetError, ScoreError
from microglia.core.order import CHUNK

SAMPLE = 1 << 16
"""Above this many scores, a cold start solves a strided sample of about so many first."""
FINE = {torch.float32: 1e-7, torch.float64: 1e-14}
"""Relative error of the sum that a solve stops at, near what its rounding allows."""
COARSE = 1e-3
"""The same where a sample only gives the first guess."""
TURNS = 200
"""More evaluations than bisection alone can need."""


class _Problem:
    """The scores of one problem in chunks, each with its buffer.

    float32 scores are near theta to within a few of their own spacings, and tau may be smaller than those: theta is
    subtracted in two parts, the first of which a score near it differs from exactly.
    """

    def __init__(self, scores: Tensor, temperature: float, sizes: Tensor | None) -> None:
        size = len(scores) if scores.is_cuda else CHUNK
        self.temperature, self.scores, self.weights = temperature, scores, sizes
        self.chunks = torch.split(scores, max(1, size))
        self.sizes = torch.split(sizes.to(scores), max(1, size)) if sizes is not None else (None,) * len(self.chunks)
        threads = 1 if scores.is_cuda else min(torch.get_num_threads(), max(1, len(self.chunks) // 4))
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self.share = -(-len(self.chunks) // threads)

    def over_chunks(self, work: Callable[[int, Tensor], tuple[float, float]]) -> list[tuple[float, float]]:
        """Returns what ``work`` gives for each chunk (its number, a buffer), in order whatever the threads."""
        with torch.inference_mode():
            if self.pool is None:
                return self._share(work, range(len(self.chunks)))
            starts = range(0, len(self.chunks), self.share)
            shares = [range(s, min(s + self.share, len(self.chunks))) for s in starts]
            return [pair for part in self.pool.map(lambda r: self._share(work, r), shares) for pair in part]

    def _share(self, work: Callable[[int, Tensor], tuple[float, float]], numbers: range) -> list[tuple[float, float]]:
        with torch.inference_mode():  # it holds for one thread
            buffer = torch.empty_like(self.chunks[0])
            return [work(i, buffer[: len(self.chunks[i])]) for i in numbers]

    def logits(self, i: int, theta: float, out: Tensor) -> Tensor:
        """Writes (m - theta) / tau of a chunk."""
        high = float(torch.tensor(theta, dtype=out.dtype)) if math.isfinite(theta) else theta
        torch.sub(self.chunks[i], high, out=out)
        rest = (theta - high) / self.temperature if math.isfinite(theta) else 0.0
        return out.mul_(1 / self.temperature).sub_(rest)

    def mask(self, theta: float) -> Tensor:
        """Returns the soft mask."""
        result = torch.empty_like(self.scores)
        parts = torch.split(result, len(self.chunks[0]))

        def write(i: int, buffer: Tensor) -> tuple[float, float]:
            self.logits(i, theta, parts[i]).sigmoid_()
            return 0.0, 0.0

        self.over_chunks(write)
        return result

    def sums(self, theta: float) -> tuple[float, float]:
        """Returns (sum c f, sum c f (1 - f)); the second steers Newton alone, so its cancellation does no harm."""

        def add(i: int, buffer: Tensor) -> tuple[float, float]:
            f = self.logits(i, theta, buffer).sigmoid_()
            c = self.sizes[i]
            if c is None:
                return f.sum().item(), -f.square_().sum().item()
            cf = f * c
            return cf.sum().item(), -f.mul_(cf).sum().item()

        pairs = self.over_chunks(add)
        total = math.fsum(a for a, _ in pairs)
        return total, total + math.fsum(b for _, b in pairs)


def solve(scores: Tensor, keep: float, temperature: float, sizes: Tensor | None, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (mask, threshold); see `microglia.core.soft_topk.soft_topk`."""
    low, high = (v.item() for v in scores.aminmax()) if len(scores) else (0.0, 0.0)
    if math.isnan(low) or math.isnan(high):
        raise ScoreError(f"{int(scores.isnan().sum()):,} of {len(scores):,} scores of a soft top-k are NaN.")
    whole = float(sizes.sum(dtype=torch.float64)) if sizes is not None else float(len(scores))
    above = below = 0.0  # what is always and what is never kept
    finite = scores
    if math.isinf(low) or math.isinf(high):
        c = sizes.double() if sizes is not None else torch.ones_like(scores, dtype=torch.float64)
        above, below = float(c[scores == torch.inf].sum()), float(c[scores == -torch.inf].sum())
        finite = scores[scores.isfinite()]
    slack = 1e-9 * max(1.0, whole)
    if not above - slack <= keep <= whole - below + slack:
        raise BudgetError(
            f"A soft top-k cannot keep {keep:g}: its scores admit {above:g} to {whole - below:g} (a score of +inf is always "
            "kept, of -inf never)."
        )
    problem = _Problem(scores, temperature, sizes)
    free, wanted = whole - above - below, keep - above
    if wanted <= slack or wanted >= free - slack or not len(finite):
        theta = torch.inf if wanted <= slack else -torch.inf
        hard = (scores == torch.inf) if wanted <= slack else (scores > -torch.inf)
        return hard.to(scores.dtype), torch.tensor(theta, dtype=torch.float64, device=scores.device)
    low, high = (v.item() for v in finite.aminmax()) if finite is not scores else (low, high)
    offset = temperature * math.log(wanted / (free - wanted))
    bracket = (low - offset, high - offset)
    if start is not None and bracket[0] <= float(start) <= bracket[1]:
        guess = float(start)
    else:
        guess = _sampled(problem, keep / whole, bracket)
    theta = _root(problem, keep, bracket, guess, FINE[scores.dtype])
    return problem.mask(theta), torch.tensor(theta, dtype=torch.float64, device=scores.device)


def _sampled(problem: _Problem, share: float, bracket: tuple[float, float]) -> float:
    """Returns about where theta is, from a strided sample where there are many scores."""
    middle = (bracket[0] + bracket[1]) / 2
    if len(problem.scores) <= SAMPLE:
        return middle
    step = len(problem.scores) // SAMPLE + 1
    few = problem.scores[::step].contiguous()
    sizes = problem.weights[::step].contiguous() if problem.weights is not None else None
    held = float(sizes.sum(dtype=torch.float64)) if sizes is not None else float(len(few))
    return _root(_Problem(few, problem.temperature, sizes), share * held, bracket, middle, COARSE)


def _root(problem: _Problem, keep: float, bracket: tuple[float, float], guess: float, tolerance: float) -> float:
    """Returns theta: by Newton where it stays inside the bracket and halves the error, else by bisection.

    It stops where the sum is right to the tolerance, relative, or only its rounding is left; a flat root is no trouble.
    """
    (low, high), theta = bracket, guess
    least, best, last = math.inf, theta, math.inf
    for _ in range(TURNS):
        total, slope = problem.sums(theta)
        error = total - keep
        if abs(error) < least:
            least, best = abs(error), theta
        if least <= tolerance * keep or abs(error) <= tolerance * slope:
            break
        low, high = (theta, high) if error > 0 else (low, theta)
        middle = (low + high) / 2
        if not low < middle < high:
            break
        newton = theta + problem.temperature * error / slope if slope > 0 else math.inf
        if low < newton < high and abs(error) < last / 2:
            theta, last = newton, abs(error)
        else:
            theta, last = middle, math.inf
    return best


def gradient_of(gradient: Tensor, scores: Tensor, theta: float, temperature: float, sizes: Tensor | None) -> Tensor:
    """Returns dL/dm from dL/df."""
    values = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    result = torch.zeros_like(values)
    if not math.isfinite(theta):
        return result.to(scores.dtype)
    problem = _Problem(values, temperature, sizes)
    arrived = torch.split(gradient.to(values.dtype), len(problem.chunks[0]))
    parts = torch.split(result, len(problem.chunks[0]))

    def slopes(i: int, buffer: Tensor) -> tuple[float, float]:
        """Writes v of a chunk; as sigmoid(z) sigmoid(-z), for f (1 - f) has no digits left where f is near 1."""
        z = problem.logits(i, theta, buffer)
        v = torch.sigmoid(z, out=parts[i]).mul_(z.neg_().sigmoid_())
        c = problem.sizes[i]
        of_gradient = torch.mul(v, arrived[i], out=buffer).sum().item()
        return of_gradient, (v if c is None else torch.mul(v, c, out=buffer)).sum().item()

    pairs = problem.over_chunks(slopes)
    held = math.fsum(b for _, b in pairs)
    mean = math.fsum(a for a, _ in pairs) / held if held > 0 else 0.0

    def finish(i: int, buffer: Tensor) -> tuple[float, float]:
        c = problem.sizes[i]
        torch.sub(arrived[i], mean, out=buffer) if c is None else torch.sub(arrived[i], c, alpha=mean, out=buffer)
        parts[i].mul_(buffer).mul_(1 / temperature)
        return 0.0, 0.0

    problem.over_chunks(finish)
    return result.to(scores.dtype)
