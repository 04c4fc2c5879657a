"""Sensitivity: the growth of the loss while a single layer loses weights, and the densities with the lowest loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from microglia.core.allocation import apportion
from microglia.core.errors import SelectorError

Point = tuple[int, float]
"""(kept weights, loss)."""


@dataclass(frozen=True)
class LayerCurve:
    """The loss of the network while a single layer is pruned.

    Attributes:
        size: Weights of the layer.
        points: (kept weights, loss) at each measured density, in any order, all finite, without the dense layer.
    """

    size: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Sensitivity:
    """Measured curves as a scope: the curves decide each layer's share of a total density.

    The estimate: the network's loss grows by the sum of the growths of its layers, each read from its own curve. The curves are
    made monotone first: at a lower density the growth is at least that of every higher density, and at least 0. Then each is
    replaced by its lower convex envelope. The sum of convex curves under one total is minimal where all slopes are equal
    (Lagrange). A greedy rule finds the minimum exactly. It starts from the lowest measured densities and gives weights to the
    steepest piece of all envelopes until the total is reached. Pieces of equal slope share in proportion to their lengths. No
    layer goes below its smallest measured density, unless the total is too small for that. Then all of them shrink from there
    in the same proportion.

    Attributes:
        dense: Loss of the network before any layer is pruned.
        curves: By layer name.
    """

    dense: float
    curves: Mapping[str, LayerCurve]

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises `SelectorError` unless each of the layers was measured, with as many weights.

        Measured layers that are not pruned now are ignored.
        """
        unknown = [name for name in sizes if name not in self.curves]
        if unknown:
            raise SelectorError(
                f"The sensitivity was measured on other layers: {unknown[0]!r} is not among its {len(self.curves)} "
                f"({', '.join(list(self.curves)[:4])} ...). Measure this network, or exclude the layer."
            )
        for name, size in sizes.items():
            if self.curves[name].size != size:
                raise SelectorError(
                    f"The sensitivity was measured on another network: there {name!r} has {self.curves[name].size:,} weights, "
                    f"here {size:,}. Measure this network."
                )

    def counts(self, sizes: Mapping[str, int], keep: int, low: Mapping[str, int], high: Mapping[str, int]) -> dict[str, int]:
        """Returns the kept weights of each layer with the lowest estimated loss; see the class.

        Args:
            sizes: Weights by layer.
            keep: Weights to keep in all, between the sums of the bounds.
            low: Lower bound of the kept weights of each layer.
            high: Upper bound of the kept weights of each layer.
        """
        hulls = {name: envelope(self.curves[name], self.dense) for name in sizes}
        found = {name: min(max(hulls[name][0][0], low[name]), high[name]) for name in sizes}
        if keep <= sum(found.values()):
            counts = apportion(list(found.values()), keep, [low[n] for n in sizes], list(found.values()))
            return dict(zip(sizes, counts, strict=True))
        pieces = sorted(
            ((lower[1] - upper[1]) / (upper[0] - lower[0]), name, upper[0])
            for name in sizes
            for lower, upper in pairwise(hulls[name])
        )
        for _, level in groupby(reversed(pieces), key=lambda piece: piece[0]):
            ends = {name: min(end, high[name]) for _, name, end in level}
            room = {name: ends[name] - found[name] for name in sizes if name in ends and ends[name] > found[name]}
            spent = min(keep - sum(found.values()), sum(room.values()))
            for name, more in zip(room, _proportional(list(room.values()), spent), strict=True):
                found[name] += more
        return found


def _proportional(room: Sequence[int], total: int) -> list[int]:
    return apportion([float(r) for r in room], total, [0] * len(room), room) if room else []


def envelope(curve: LayerCurve, dense: float) -> list[Point]:
    """Returns the corners of a curve's lower convex envelope, kept weights ascending, losses falling to ``dense``.

    Args:
        curve: The measured curve; it is made monotone first (see `Sensitivity`).
        dense: Loss of the dense network: the last corner is (size, dense).
    """
    worst = dense
    monotone = {curve.size: dense}
    for kept, loss in sorted(curve.points, key=lambda point: (-point[0], point[1])):
        if kept < curve.size:
            worst = max(worst, loss)
            monotone[kept] = worst
    corners: list[Point] = []
    for point in sorted(monotone.items()):
        while len(corners) > 1 and not _below(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def _below(before: Point, middle: Point, after: Point) -> bool:
    """Tells whether the middle point lies below the straight line between the others."""
    across = (after[1] - before[1]) * (middle[0] - before[0])
    return (middle[1] - before[1]) * (after[0] - before[0]) < across
