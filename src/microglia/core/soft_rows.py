"""Many small soft top-k problems, such as one for every four weights of 2:4, solved together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from microglia.core.largest import CHUNK
from microglia.core.soft_sigmoid import (
    COMPUTE,
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
    shift_of,
    slopes,
)

LONG = CHUNK // 8
"""Maximum length of a row that is solved together with others."""


class _Columns(NamedTuple):
    """Some rows as columns, (m, rows): sums over them run along the memory."""

    scores: Tensor
    sizes: Tensor | None
    temperature: float

    @staticmethod
    def of(rows: Units) -> _Columns:
        """Returns the columns of rows, in the dtype of the computation."""
        values = rows.scores.t().to(COMPUTE[rows.scores.dtype]).contiguous()
        return _Columns(values, None if rows.sizes is None else rows.sizes.t().to(values.dtype).contiguous(), rows.temperature)

    def at(self, numbers: Tensor) -> _Columns:
        """Returns some of the columns."""
        return self._replace(scores=self.scores[:, numbers], sizes=None if self.sizes is None else self.sizes[:, numbers])

    def shift(self, theta: Tensor) -> Shift:
        """Returns theta in two parts."""
        return shift_of(theta, self.temperature, self.scores.dtype)

    def sums(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (sum c f, sum c v) of each column."""
        f = logits(self.scores, self.shift(theta), self.temperature, torch.empty_like(self.scores)).sigmoid_()
        held = self.weighted(f)
        total = held.sum(0).double()
        return total, total - (held * f).sum(0)

    def weighted(self, values: Tensor) -> Tensor:
        """Returns the values times the sizes."""
        return values if self.sizes is None else values * self.sizes


def solve_rows(units: Units, keep: Tensor, start: Tensor, mask: Tensor, threshold: Tensor) -> None:
    """Writes masks (rows, m) and thresholds (rows,); see `microglia.core.soft_topk.soft_topk`. NaN means no start."""
    if (scores := units.scores).aminmax().min.isnan():
        refuse_nan(scores)

    def piece(own: slice) -> None:
        columns = _Columns.of(units.at(own))
        threshold[own] = theta = _thetas(columns, keep[own], start[own], own.start)
        mask[own] = shares(columns.scores, columns.shift(theta), units.temperature, torch.empty_like(columns.scores)).t()

    _in_pieces(scores, piece)


def gradient_of_rows(units: Units, arrived: Tensor, threshold: Tensor, result: Tensor) -> None:
    """Writes dL/dm of each row, given dL/df."""

    def piece(own: slice) -> None:
        columns = _Columns.of(units.at(own))
        v = slopes(columns.scores, columns.shift(threshold[own]), units.temperature, torch.empty_like(columns.scores))
        gradient = arrived[own].t().to(v.dtype)
        mean = (v * gradient).sum(0) / columns.weighted(v).sum(0).clamp_min(torch.finfo(v.dtype).tiny)
        result[own] = v.mul_(gradient - columns.weighted(mean.expand_as(v))).mul_(1 / units.temperature).t()

    _in_pieces(units.scores, piece)


def _in_pieces(scores: Tensor, work: Callable[[slice], None]) -> None:
    """Calls ``work`` with consecutive rows, in cache-sized chunks."""
    rows = len(scores) if scores.is_cuda else CHUNK // scores.shape[1]

    def part(numbers: range) -> None:
        for i in numbers:
            work(slice(i * rows, min((i + 1) * rows, len(scores))))

    share_out(part, -(-len(scores) // rows), 4)


def _thetas(columns: _Columns, keep: Tensor, start: Tensor, first: int) -> Tensor:
    """Returns theta of each column; infinite where no or every finite score is kept. ``first`` is the row's number."""
    values, weights = columns.scores, columns.weighted(torch.ones_like(columns.scores))
    least = (weights * (values == torch.inf)).sum(0, dtype=torch.float64)
    most = (weights * (values > -torch.inf)).sum(0, dtype=torch.float64)
    _refuse_impossible(keep, least, most, first)
    none, every = keeps_least(keep, least), keeps_most(keep, most)
    offset = columns.temperature * ((keep - least) / (most - keep)).log().masked_fill(none | every, 0.0)
    finite = values.isfinite()
    low = torch.where(finite, values, torch.inf).amin(0) - offset
    high = torch.where(finite, values, -torch.inf).amax(0) - offset
    solved = (~(none | every)).nonzero().squeeze(1)
    theta = torch.where(none, torch.inf, -torch.inf).to(keep)
    if len(solved):
        known = start.isfinite() | none | every
        guess = start if known.all() else torch.where(known, start, _between(values, keep))
        guess = torch.where((guess >= low) & (guess <= high), guess, (low + high) / 2)
        own = columns if len(solved) == len(keep) else columns.at(solved)
        state = torch.stack((guess, low, high, keep))[:, solved]
        theta[solved] = _roots(own, state)
    return theta


def _between(values: Tensor, keep: Tensor) -> Tensor:
    """Returns the midpoint between the last kept score of each column and the next; near theta where tau is small."""
    ranked = values.sort(0, descending=True).values
    place = keep.round().long()[None]
    last, following = (ranked.gather(0, p.clamp(0, len(values) - 1)) for p in (place - 1, place))
    return (last + following)[0].double() / 2


def _refuse_impossible(keep: Tensor, least: Tensor, most: Tensor, first: int) -> None:
    wrong = ~can_keep(keep, least, most)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        wanted, low, high = (float(t[row]) for t in (keep, least, most))
        refuse_keep(wanted, low, high, f" of a row, number {first + row}")


def _roots(columns: _Columns, state: Tensor) -> Tensor:
    """Returns theta of each column from (guess, low, high, keep), by the method of `microglia.core.soft_one`.

    Finished columns are dropped once they are half of the remaining ones.
    """
    tolerance, temperature = FINE[columns.scores.dtype], columns.temperature
    theta, low, high, keep = state
    result, there = torch.empty_like(theta), torch.arange(len(theta), device=theta.device)
    best, least, last = theta, torch.full_like(theta, torch.inf), torch.full_like(theta, torch.inf)
    for _ in range(TURNS):
        total, slope = columns.sums(theta)
        error = total - keep
        better = error.abs() < least
        best, least = torch.where(better, theta, best), torch.where(better, error.abs(), least)
        low, high = torch.where(error > 0, theta, low), torch.where(error > 0, high, theta)
        middle = (low + high) / 2
        done = (least <= tolerance * keep) | (high - low <= tolerance * temperature) | (middle <= low) | (middle >= high)
        count = int(done.sum())
        if 2 * count >= len(done):
            result[there] = best
            if count == len(done):
                break
        newton = theta + temperature * error / slope
        use = (newton > low) & (newton < high) & (error.abs() < last / 2)  # a slope of 0 gives infinity, which is not inside
        theta, last = torch.where(use, newton, middle), torch.where(use, error.abs(), torch.inf)
        if 2 * count >= len(done):
            stay = (~done).nonzero().squeeze(1)
            columns, there = columns.at(stay), there[stay]
            theta, low, high, keep, best, least, last = (t[stay] for t in (theta, low, high, keep, best, least, last))
    else:
        result[there] = best
    return result
