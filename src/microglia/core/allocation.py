"""Allocation: how many weights each layer may keep, the total exact (survey 0.4, 9)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from microglia.core.errors import BudgetError, SelectorError
from microglia.core.registry import unknown_name

ScopeName = Literal["global", "layer", "row", "erk"]
Scope = ScopeName | Mapping[str, float]
"""One ordering over all layers, the same density in each layer or each row, Erdős-Rényi-kernel densities, or given ones."""


def check_scope(scope: Scope) -> Scope:
    """Returns the scope, or raises for an unknown name."""
    if isinstance(scope, str) and scope not in get_args(ScopeName):
        raise unknown_name("scope", scope, get_args(ScopeName))
    return scope


def apportion(shares: Sequence[float], total: int, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Returns integers that sum to ``total`` exactly, proportional to ``shares`` within bounds, by largest remainder.

    Args:
        shares: Wanted real values, not negative; only their proportions matter.
        total: The sum, sum(low) <= total <= sum(high).
        low: Lower bound of each value.
        high: Upper bound of each value.

    Raises:
        BudgetError: The bounds do not admit the total.
    """
    if not sum(low) <= total <= sum(high):
        raise BudgetError(f"Cannot share out {total:,} weights: the layers admit {sum(low):,} to {sum(high):,}.")
    quotas = _bounded_quotas(shares, total, low, high)
    counts = [min(max(math.floor(q + 1e-9), lo), hi) for q, lo, hi in zip(quotas, low, high, strict=True)]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - quotas[i])  # stable: ties by position
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        for i in by_remainder if missing > 0 else reversed(by_remainder):
            if low[i] <= counts[i] + step <= high[i] and missing:
                counts[i] += step
                missing -= step
    return counts


def _bounded_quotas(shares: Sequence[float], total: int, low: Sequence[int], high: Sequence[int]) -> list[float]:
    """Returns c * shares clipped to the bounds, with c such that the sum is the total (bisection on c)."""

    def quotas(scale: float) -> list[float]:
        return [min(max(scale * s, lo), hi) for s, lo, hi in zip(shares, low, high, strict=True)]

    lower, upper = 0.0, 1.0
    while sum(quotas(upper)) < total and upper < 1e18:
        upper *= 2
    for _ in range(200):
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if sum(quotas(middle)) < total else (lower, middle)
    return quotas(upper)


def erk_shares(shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Returns the unscaled Erdős-Rényi-kernel kept weights of each layer: the sum of the weight's dimensions.

    Density is proportional to sum(dims) / prod(dims) (Evci et al. 2020, RigL; Mocanu et al. 2018, SET), so the kept weights
    are proportional to sum(dims); `apportion` clips layers at density 1 and distributes the rest again.
    """
    return {name: float(sum(shape)) for name, shape in shapes.items()}


def layer_counts(
    shapes: Mapping[str, Sequence[int]],
    keep: int,
    scope: Scope,
    *,
    low: Mapping[str, int],
    high: Mapping[str, int],
    protected: Sequence[str] = (),
) -> dict[str, int]:
    """Returns how many weights each layer keeps under a scope other than ``global``.

    Args:
        shapes: Weight shape by layer.
        keep: Weights to keep in all; ignored where densities are given.
        scope: See `Scope`; ``row`` distributes like ``layer``.
        low: Lower bound of the kept weights of each layer, so that none is emptied.
        high: Upper bound of the kept weights of each layer: the weights not pruned before.
        protected: Layers that keep their greatest number.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    least = {name: high[name] if name in protected else min(low[name], high[name]) for name in shapes}
    if not isinstance(scope, str):
        return _given_counts(sizes, scope, least, protected)
    shares = erk_shares(shapes) if scope == "erk" else {name: float(n) for name, n in sizes.items()}
    counts = apportion([shares[n] for n in shapes], keep, [least[n] for n in shapes], [high[n] for n in shapes])
    return dict(zip(shapes, counts, strict=True))


def _given_counts(
    sizes: Mapping[str, int], densities: Mapping[str, float], least: Mapping[str, int], protected: Sequence[str]
) -> dict[str, int]:
    missing = [name for name in sizes if name not in densities and name not in protected]
    extra = [name for name in densities if name not in sizes]
    if missing or extra:
        raise SelectorError(
            f"Given densities name each layer that is pruned, once: missing {missing or 'none'}, unknown {extra or 'none'}."
        )
    for name, density in densities.items():
        if not 0 <= density <= 1:
            raise BudgetError(f"The density given for {name!r} is {density}; expected a fraction in [0, 1].")
    asked = {name: 0 if name in protected else math.floor(densities[name] * size + 0.5) for name, size in sizes.items()}
    return {name: max(least[name], count) for name, count in asked.items()}
