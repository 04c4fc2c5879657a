"""Allocation: the number of weights that each layer may keep, with an exact total (survey 0.4, 9)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

from microglia.core.errors import BudgetError, SelectorError
from microglia.core.house import SCOPE_FILES
from microglia.core.registry import Registry, unknown_name

GLOBAL = "global"
ScopeName = Literal["global", "layer", "row", "erk"]
"""The library's own scopes; `scopes` holds these and registered ones."""


@runtime_checkable
class Allocation(Protocol):
    """A scope with its own rule, such as `microglia.core.sensitivity.Sensitivity`."""

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises `SelectorError` unless the rule knows these layers; ``sizes`` are their weights by name."""

    def counts(self, sizes: Mapping[str, int], keep: int, low: Mapping[str, int], high: Mapping[str, int]) -> dict[str, int]:
        """Returns the number of weights that each layer keeps: ``keep`` in all, each between its ``low`` and its ``high``."""


Scope = str | Mapping[str, float] | Allocation
"""Rule for the distribution of the budget over layers.

``global``: one ordering over all layers. A name of `scopes`: the same density in each ``layer`` or each ``row``,
Erdős-Rényi-kernel densities (``erk``). A name of `scope_files`, a colon and a file, such as ``sensitivity:FILE``. Densities by
layer name. Or any `Allocation`.
"""

Shares = Callable[[Mapping[str, Sequence[int]]], dict[str, float]]
"""Returns the wanted kept weights of each layer from the shapes of the weights; only their proportions matter."""
scopes: Registry[Shares] = Registry("scope")
scope_files: Registry[Callable[[str], Allocation]] = Registry("scope with a file")
"""Readers of the file after the colon; the library's own register in the modules of `microglia.core.house.SCOPE_FILES`."""


def check_scope(scope: Scope) -> Scope:
    """Returns the scope, or raises `UnknownNameError` for an unknown name; no file is read."""
    if isinstance(scope, str):
        kind, _, file = scope.partition(":")
        if not (scope == GLOBAL or scope in scopes or (file and _reads(kind))):
            files = (f"{name}:FILE" for name in dict.fromkeys((*SCOPE_FILES, *scope_files)))
            raise unknown_name("scope", scope, (GLOBAL, *scopes, *files))
    elif not isinstance(scope, Mapping | Allocation):
        raise unknown_name("scope", scope, (GLOBAL, *scopes))
    return scope


def read_scope(scope: Scope) -> Scope:
    """Returns the scope, with its file read if it names one.

    Raises:
        UnknownNameError: The scope is unknown.
        FileError: The file does not have the form that the scope expects.
    """
    check_scope(scope)
    if not isinstance(scope, str) or ":" not in scope:
        return scope
    kind, _, file = scope.partition(":")
    return scope_files[kind](file)


def _reads(kind: str) -> bool:
    """Tells whether a scope reads files; imports the module of one of the library's own."""
    if kind in SCOPE_FILES and kind not in scope_files:
        importlib.import_module(SCOPE_FILES[kind])
    return kind in scope_files


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
    by_remainder = sorted(range(len(counts)), key=lambda i: round(counts[i] - quotas[i], 9))  # stable: ties by position
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


@scopes.add("erk")
def erk_shares(shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Returns the unscaled Erdős-Rényi-kernel kept weights of each layer: the sum of the weight's dimensions.

    Density is proportional to sum(dims) / prod(dims) (Evci et al. 2020, RigL; Mocanu et al. 2018, SET), so the kept weights
    are proportional to sum(dims); `apportion` clips layers at density 1 and distributes the rest again.
    """
    return {name: float(sum(shape)) for name, shape in shapes.items()}


@scopes.add("layer")
@scopes.add("row")
def uniform_shares(shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Returns the weights of each layer: all keep the same density."""
    return {name: float(math.prod(shape)) for name, shape in shapes.items()}


def layer_counts(
    shapes: Mapping[str, Sequence[int]],
    keep: int,
    scope: Scope,
    *,
    low: Mapping[str, int],
    high: Mapping[str, int],
    protected: Sequence[str] = (),
) -> dict[str, int]:
    """Returns the number of weights that each layer keeps under a scope other than ``global``.

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
    scope = read_scope(scope)
    if isinstance(scope, Mapping):
        return _given_counts(sizes, scope, least, protected)
    if not isinstance(scope, str):
        fixed = {name: high[name] for name in shapes if name in protected}
        free = {name: size for name, size in sizes.items() if name not in fixed}
        return {**fixed, **_allocated(scope, free, keep - sum(fixed.values()), least, high)}
    wanted = scopes[scope](shapes)
    counts = apportion([wanted[n] for n in shapes], keep, [least[n] for n in shapes], [high[n] for n in shapes])
    return dict(zip(shapes, counts, strict=True))


def _allocated(
    scope: Allocation, sizes: Mapping[str, int], keep: int, low: Mapping[str, int], high: Mapping[str, int]
) -> dict[str, int]:
    """Returns the counts of a rule, after a check that they are possible."""
    scope.check(sizes)
    least, greatest = (sum(bound[name] for name in sizes) for bound in (low, high))
    if not least <= keep <= greatest:
        raise BudgetError(f"Cannot share out {keep:,} weights: the layers admit {least:,} to {greatest:,}.")
    return scope.counts(sizes, keep, low, high)


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
