"""Curves in weight space: how much each control point counts at t, and the places between two solutions that this gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from microglia.core.errors import MicrogliaError
from microglia.studies.space.points import Point, check_alike, combine, difference, norm


class Kind(Protocol):
    """A family of curves phi(t) = sum_j c_j(t) p_j over control points p_0 ... p_n, a frozen value."""

    @property
    def last(self) -> int:
        """Number n of the last control point."""
        ...

    def coefficients(self, t: float) -> tuple[float, ...]:
        """Returns c_0(t) ... c_n(t) for t in [0, 1]: none negative, their sum 1 (to rounding), at the ends exactly 0 and 1."""
        ...


@dataclass(frozen=True)
class Bezier:
    """Bezier curves: c_j(t) = binom(n, j) t^j (1 - t)^(n - j).

    Source: Garipov et al. 2018, equation 4 (degree 2).

    Attributes:
        degree: n, at least 1; n - 1 bends.
    """

    degree: int = 2

    def __post_init__(self) -> None:
        if self.degree < 1:
            raise MicrogliaError(f"A Bezier curve has a degree of at least 1, its bends plus 1; got {self.degree}.")

    @property
    def last(self) -> int:
        """Number n of the last control point."""
        return self.degree

    def coefficients(self, t: float) -> tuple[float, ...]:
        """Returns c_0(t) ... c_n(t); see `Kind`.

        Raises:
            MicrogliaError: t is not in [0, 1].
        """
        check_parameter(t)
        n = self.degree
        return tuple(math.comb(n, j) * t**j * (1 - t) ** (n - j) for j in range(n + 1))


@dataclass(frozen=True)
class Chain:
    """Polygonal chains: c_j(t) = max(0, 1 - |n t - j|), so that segment j takes t from j/n to (j+1)/n.

    Source: Garipov et al. 2018, equation 3 (two segments).

    Attributes:
        segments: n, at least 1; n - 1 bends.
    """

    segments: int = 2

    def __post_init__(self) -> None:
        if self.segments < 1:
            raise MicrogliaError(f"A chain has at least 1 segment, its bends plus 1; got {self.segments}.")

    @property
    def last(self) -> int:
        """Number n of the last control point."""
        return self.segments

    def coefficients(self, t: float) -> tuple[float, ...]:
        """Returns c_0(t) ... c_n(t); see `Kind`.

        Raises:
            MicrogliaError: t is not in [0, 1].
        """
        check_parameter(t)
        n = self.segments
        return tuple(max(0.0, 1 - abs(n * t - j)) for j in range(n + 1))


LINE = Chain(1)
"""The straight line between two ends, which every curve is compared with."""


def check_parameter(t: float) -> None:
    """Raises unless t is in [0, 1] (NaN is not)."""
    if not 0 <= t <= 1:
        raise MicrogliaError(f"A path is followed from t = 0 to t = 1; got t = {t}. Give numbers in [0, 1].")


def equispaced(count: int) -> list[float]:
    """Returns ``count`` numbers from 0 to 1, both included, at equal distances.

    Raises:
        MicrogliaError: There are fewer than 2.
    """
    if count < 2:
        raise MicrogliaError(f"A path is looked at in at least 2 points, its ends; got {count}.")
    return [i / (count - 1) for i in range(count)]


@dataclass(frozen=True)
class Curve:
    """A curve between two solutions, an immutable value.

    Attributes:
        kind: Meaning of the control points.
        points: p_0 ... p_n; the first and the last are the ends, the inner ones are what training moves.

    Raises:
        MicrogliaError: There are not n + 1 points, or they are not of one architecture.
    """

    kind: Kind
    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        if len(self.points) != self.kind.last + 1:
            raise MicrogliaError(f"{self.kind} has {self.kind.last + 1} control points; got {len(self.points)}.")
        for point in self.points[1:]:
            check_alike(self.points[0], point)

    @property
    def inner(self) -> tuple[Point, ...]:
        """The control points between the ends."""
        return self.points[1:-1]

    def with_inner(self, inner: Sequence[Point]) -> Curve:
        """Returns the curve of the same ends and kind through other inner points."""
        return Curve(self.kind, (self.points[0], *inner, self.points[-1]))

    def point(self, t: float) -> dict[str, Tensor]:
        """Returns phi(t); at t = 0 and 1 a copy of that end, bit for bit.

        Raises:
            MicrogliaError: t is not in [0, 1].
        """
        return combine(self.points, self.kind.coefficients(t))

    def lengths(self, ts: Sequence[float]) -> list[float]:
        """Returns the Euclidean length walked along the curve from the first of ``ts`` to each; see `walked`."""
        return walked(self.point, ts)


def walked(path: Callable[[float], Point], ts: Sequence[float]) -> list[float]:
    """Returns the Euclidean length walked from the first of ``ts`` to each, by chords: it starts with 0."""
    total = [0.0]
    # One place after the other: sixty copies of a large network would not fit into memory.
    for here, there in pairwise(map(path, ts)):
        total.append(total[-1] + norm(difference(there, here)))
    return total[: len(ts)]


def on_line(kind: Kind, start: Point, end: Point) -> Curve:
    """Returns the curve whose control points lie at equal distances on the straight line between the ends.

    p_j = (1 - j/n) start + (j/n) end, with which every kind of curve is the straight line itself, at constant speed.

    Source: the reference code of Garipov et al. 2018.

    Raises:
        MicrogliaError: The ends are not of one architecture.
    """
    check_alike(start, end)
    n = kind.last
    return Curve(kind, tuple(combine((start, end), (1 - j / n, j / n)) for j in range(n + 1)))
