"""Codebooks: a few values that all weights of a layer share, found by k-means in one dimension.

In one dimension every cluster is an interval of the sorted weights. One round of Lloyd's algorithm therefore needs the sorted
weights, their prefix sums, and a binary search for each border: O(k log n) for n weights and k clusters.

Source: Han et al. 2016, "Deep Compression", section 3. The optimum by dynamic programming is Wang and Song 2011,
"Ckmeans.1d.dp"; it evaluates only rows of a totally monotone matrix here, by divide and conquer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microglia.core.errors import MicrogliaError
from microglia.core.registry import unknown_name

Floats = npt.NDArray[np.float64]
Initial = Literal["linear", "density", "random"]
"""Initial centroids: equal steps of the value, equal steps of the number of weights, or a random sample of the weights."""
BITS = (1, 8)
"""Minimum and maximum number of bits of a code."""
TABLE = 2**27
"""Maximum number of entries in the table of the exact optimum."""


@dataclass(frozen=True)
class Clusters:
    """The result of k-means in one dimension.

    Attributes:
        centroids: Centroids, float64 (k,), ascending.
        errors: Sum of squared distances to the nearest centroid after each round; it never rises.
    """

    centroids: Floats
    errors: tuple[float, ...]


def check_bits(bits: object) -> int:
    """Returns the number of bits of a code.

    Raises:
        MicrogliaError: It is not a whole number from 1 to 8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not BITS[0] <= bits <= BITS[1]:
        raise MicrogliaError(f"A code has a whole number of {BITS[0]} to {BITS[1]} bits; got {bits!r}.")
    return bits


def kmeans(
    values: npt.ArrayLike, count: int, *, initial: Initial = "linear", exact: bool = False, seed: int = 0, rounds: int = 10_000
) -> Clusters:
    """Returns the centroids of values on a line.

    Args:
        values: Finite numbers, of any shape; at least one.
        count: Number of clusters k; fewer if there are fewer different values.
        initial: Initial centroids. ``linear`` keeps rare large weights, which matter most (section 3.2 of the paper).
        exact: Whether to return the global optimum instead, in O(k n log n). It ignores ``initial``.
        seed: Seed of ``random``.
        rounds: Maximum number of rounds of Lloyd's algorithm, which otherwise stops when no weight moves.

    Raises:
        MicrogliaError: The values are not finite or missing, the count is below 1, or the table of the optimum is too large.
    """
    if initial not in get_args(Initial):
        raise unknown_name("choice of initial centroids", initial, get_args(Initial))
    given = np.sort(np.asarray(values).reshape(-1)).astype(np.float64)
    if given.size == 0 or count < 1 or not np.isfinite(given[[0, -1]]).all():
        raise MicrogliaError(
            f"Clusters need finite numbers, at least one, and a count of at least 1; got {given.size} values and count {count}."
        )
    starts = np.concatenate([[True], given[1:] != given[:-1]])
    if starts.sum() <= count:
        return Clusters(given[starts], (0.0,))
    middle = float(given.mean())  # the sums of squares lose fewer digits around the mean
    given -= middle
    if exact:
        found = _optimum(given[starts], np.diff(np.append(np.flatnonzero(starts), given.size)), count)
    else:
        found = _lloyd(given, _first(given, starts, count, initial, seed), rounds)
    return Clusters(found.centroids + middle, found.errors)


def _first(given: Floats, starts: npt.NDArray[np.bool_], count: int, initial: Initial, seed: int) -> Floats:
    """Returns initial centroids for sorted values, of which ``starts`` marks the different ones."""
    if initial == "linear":
        return np.linspace(given[0], given[-1], count)
    if initial == "density":
        return given[((np.arange(count) + 0.5) * given.size / count).astype(np.int64)]
    return np.sort(np.random.default_rng(seed).choice(given[starts], count, replace=False))


class _Sums:
    """Prefix sums of sorted values: the sum of squared distances of any interval to its mean in constant time."""

    def __init__(self, given: Floats, weights: npt.NDArray[np.int64] | None = None) -> None:
        weighted = given if weights is None else given * weights
        self.counts = np.arange(given.size + 1) if weights is None else np.concatenate([[0], np.cumsum(weights)])
        self.values = np.concatenate([[0.0], np.cumsum(weighted)])
        self.squares = np.concatenate([[0.0], np.cumsum(weighted * given)])

    def cost(self, first: Any, end: Any) -> Floats:
        """Returns the cost of intervals [first, end) as one cluster."""
        count = np.maximum(self.counts[end] - self.counts[first], 1)
        total = self.values[end] - self.values[first]
        cost: Floats = np.maximum(self.squares[end] - self.squares[first] - total * total / count, 0.0)
        return cost


def _lloyd(given: Floats, centroids: Floats, rounds: int) -> Clusters:
    """Returns Lloyd's local optimum; an empty cluster keeps its centroid."""
    sums, errors = _Sums(given), list[float]()
    borders = np.zeros(0, dtype=np.int64)
    for _ in range(rounds):
        middles = (centroids[1:] + centroids[:-1]) / 2
        found = np.concatenate([[0], np.searchsorted(given, middles, side="right"), [given.size]])
        if np.array_equal(found, borders):
            break
        borders = found
        counts, totals = np.diff(borders), np.diff(sums.values[borders])
        centroids = np.where(counts > 0, totals / np.maximum(counts, 1), centroids)
        errors.append(float(sums.cost(borders[:-1], borders[1:]).sum()))
    return Clusters(centroids, tuple(errors))


def _optimum(given: Floats, weights: npt.NDArray[np.int64], count: int) -> Clusters:
    """Returns the global optimum for different sorted values with weights."""
    size = given.size
    if count * (size + 1) > TABLE:
        raise MicrogliaError(
            f"The exact optimum of {count} clusters of {size:,} different values needs a table of more than {TABLE:,} entries: "
            "take fewer, or exact=False."
        )
    sums = _Sums(given, weights)
    best = sums.cost(np.zeros(size + 1, dtype=np.int64), np.arange(size + 1))
    chosen = np.zeros((count, size + 1), dtype=np.int32)
    for cluster in range(1, count):
        best, chosen[cluster] = _extended(sums, best)
    borders = [size]
    for cluster in range(count - 1, 0, -1):
        borders.append(int(chosen[cluster, borders[-1]]))
    ends = np.unique(np.array([0, *borders]))  # an empty cluster has no centroid
    means = np.diff(sums.values[ends]) / np.diff(sums.counts[ends])
    return Clusters(means, (float(best[size]),))


def _extended(sums: _Sums, before: Floats) -> tuple[Floats, npt.NDArray[np.int32]]:
    """Returns the best costs of all prefixes with one cluster more, and where that cluster begins.

    The best beginning never decreases with the length of the prefix. So the middle prefixes are solved first, level by level,
    and each bounds the search of its neighbours.
    """
    size = before.size - 1
    best, chosen = np.zeros(size + 1), np.zeros(size + 1, dtype=np.int32)
    stride = 1 << (size.bit_length() - 1)
    while stride:
        ends = np.arange(stride, size + 1, 2 * stride)
        low = chosen[ends - stride].astype(np.int64)
        after = ends + stride
        high = np.where(after <= size, chosen[np.minimum(after, size)], size)
        high = np.minimum(high, ends)
        widths = high - low + 1
        offsets = np.concatenate([[0], np.cumsum(widths)[:-1]])
        first = np.arange(widths.sum()) + np.repeat(low - offsets, widths)
        costs = before[first] + sums.cost(first, np.repeat(ends, widths))
        best[ends] = np.minimum.reduceat(costs, offsets)
        hits = np.flatnonzero(costs == np.repeat(best[ends], widths))
        chosen[ends] = first[hits[np.searchsorted(hits, offsets)]]
        stride //= 2
    return best, chosen


def nearest(values: npt.ArrayLike, centroids: Floats) -> npt.NDArray[np.int64]:
    """Returns the index of the nearest of the ascending centroids for every value; the lower one at equal distance."""
    return np.searchsorted((centroids[1:] + centroids[:-1]) / 2, np.asarray(values), side="left")


def share(
    weight: Tensor, bits: int, *, initial: Initial = "linear", exact: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns the codes and the codebook of a weight; its zeros are pruned weights and stay zeros.

    Args:
        weight: Floating-point weight of any shape, masked weights as zeros.
        bits: Bits of a code, 1 to 8: at most 2^bits - 1 values are shared, because code 0 is the zero.
        initial: See `kmeans`.
        exact: See `kmeans`.
        seed: See `kmeans`.

    Returns:
        (codes, table): codes are uint8, shaped like the weight; the table has the weight's dtype, (at most 2^bits,), and its
        entry 0 is zero. The shared weight is ``table[codes.long()]``.

    Raises:
        MicrogliaError: The bits are out of range, or a weight is not finite.
    """
    plain = weight.detach().to("cpu", torch.float32 if weight.dtype != torch.float64 else torch.float64).contiguous()
    flat = plain.reshape(-1).numpy()
    kept = np.flatnonzero(flat)
    codes = np.zeros(flat.size, dtype=np.uint8)
    centroids: Floats = np.zeros(0)
    if kept.size:
        values = flat[kept]
        centroids = kmeans(values, 2 ** check_bits(bits) - 1, initial=initial, exact=exact, seed=seed).centroids
        codes[kept] = nearest(values, centroids) + 1
    table = torch.from_numpy(np.concatenate([[0.0], centroids])).to(weight.dtype)
    return torch.from_numpy(codes).reshape(weight.shape).to(weight.device), table.to(weight.device)


def share_groups(
    weight: Tensor, bits: int, groups: int = 1, *, initial: Initial = "linear", exact: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns the codes and the codebooks of a weight, one codebook for each group of its rows.

    Args:
        weight: As in `share`, with its output channels first.
        bits: As in `share`.
        groups: Groups of equal size along the first dimension; of other sizes their greatest common divisor is taken.
        initial: See `kmeans`.
        exact: See `kmeans`.
        seed: See `kmeans`.

    Returns:
        (codes, tables): with one group as `share`. With several, a code is an index into the codebook of its own group, and the
        tables are (groups, entries); a group with fewer values has unused entries of zero at its end.

    Raises:
        MicrogliaError: See `share`.
    """
    count = math.gcd(groups, weight.shape[0]) if weight.ndim else 1
    how: dict[str, Any] = {"initial": initial, "exact": exact, "seed": seed}
    if count <= 1:
        return share(weight, bits, **how)
    codes, tables = zip(*(share(chunk, bits, **how) for chunk in weight.chunk(count)), strict=True)
    entries = max(table.numel() for table in tables)
    padded = [torch.cat([table, table.new_zeros(entries - table.numel())]) for table in tables]
    return torch.cat(codes), torch.stack(padded)


def looked_up(codes: Tensor, tables: Tensor) -> Tensor:
    """Returns the weight of codes and codebooks as `share_groups` returns them, with the gradient of the codebooks."""
    index = codes.reshape(-1).int()
    if tables.ndim > 1:
        groups, entries = tables.shape
        first = entries * torch.arange(groups, dtype=torch.int32, device=index.device)
        index = (index.view(groups, -1) + first[:, None]).reshape(-1)
    return tables.reshape(-1).index_select(0, index).view(codes.shape)
