"""Selection: the exact set of units that stay, given their scores and a count.

Contract (spec: survey 0.4, design 3): order by score, higher first, ties by position; keep exactly the given count; never
compare with a threshold alone. ``-inf`` marks units that were pruned before and cannot return, ``+inf`` marks protected units,
NaN is an error. Units of unequal size count by their weights: the prefix of the order whose sum is nearest to the count is
kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from microglia.core.allocation import Scope, layer_counts, read_scope
from microglia.core.errors import BudgetError, ScoreError
from microglia.core.largest import largest
from microglia.core.masks import MaskSet
from microglia.core.patterns import Pattern, Reduction


def select(
    scores: Mapping[str, Tensor],
    *,
    pattern: Pattern,
    keep: int,
    scope: Scope = "global",
    reduction: Reduction = "mean",
    alive: Mapping[str, Tensor] | None = None,
    protect: Sequence[str] = (),
    allow_empty: bool = False,
) -> MaskSet:
    """Returns the masks that keep the best units.

    Args:
        scores: One value per weight, by layer, higher = keep.
        pattern: The unit. A pattern with its own density (N:M) chooses within its rows under every scope. It keeps more than n
            of m only while ``keep`` is above n / m, as early in a schedule.
        keep: Weights to keep over all layers; ignored where ``scope`` gives densities.
        scope: See `microglia.core.allocation.Scope`.
        reduction: Function that combines the scores of a unit's weights.
        alive: Earlier masks; weights that they removed stay removed.
        protect: Names of layers that stay as dense as ``alive`` has them and count as kept.
        allow_empty: Whether a layer may lose everything. Otherwise each keeps at least its best unit.

    Raises:
        BudgetError: The count cannot be met; the text names what binds.
        ScoreError: A score is NaN.
    """
    scope = read_scope(scope)
    units = {name: _unit_scores(s, pattern, reduction, (alive or {}).get(name), name in protect) for name, s in scores.items()}
    sizes = {name: pattern.sizes(s.shape) for name, s in scores.items()}
    if pattern.fixed_density is not None or scope != "global":
        refuse_nan(units)
    if pattern.fixed_density is not None or scope == "global":
        kept = keep_units(units, sizes, keep, density=pattern.fixed_density, allow_empty=allow_empty)
    else:
        low = {name: 0 if allow_empty else int(s.max()) for name, s in sizes.items()}
        high = {name: int(sizes[name].to(u.device)[u > -torch.inf].sum()) for name, u in units.items()}
        counts = layer_counts({name: s.shape for name, s in scores.items()}, keep, scope, low=low, high=high, protected=protect)
        kept = {n: _keep_in_layer(units[n], sizes[n], counts[n], by_row=scope == "row") for n in units}
    masks = {name: pattern.expand(kept[name], scores[name].shape) for name in scores}
    if alive is not None:  # a partly kept unit stays partly kept
        masks = {name: m & alive[name].bool() if name in alive else m for name, m in masks.items()}
    return MaskSet(masks)


def _unit_scores(score: Tensor, pattern: Pattern, how: Reduction, alive: Tensor | None, protected: bool) -> Tensor:
    units = pattern.reduce(score.detach(), how)
    if protected:
        units = torch.full_like(units, torch.inf)
    if alive is not None:
        units = units.masked_fill(pattern.reduce(alive.to(units), "max") == 0, -torch.inf)
    return units


def keep_units(
    units: Mapping[str, Tensor],
    sizes: Mapping[str, Tensor],
    keep: int,
    *,
    density: float | None = None,
    allow_empty: bool = False,
) -> dict[str, Tensor]:
    """Returns boolean masks of the best units of all layers together.

    Args:
        units: Unit scores by layer; (rows, columns) where ``density`` is given.
        sizes: Number of weights of each unit, shaped like the scores; 0 marks padding.
        keep: Sum of sizes to keep.
        density: Density of a pattern that chooses within its own rows (N:M); it overrides ``keep`` unless that is higher.
        allow_empty: Whether a layer may lose everything. Otherwise each keeps at least its best unit.

    Raises:
        BudgetError: The count cannot be met; the text names what binds.
        ScoreError: A score is NaN.
    """
    if density is None:
        return _keep_globally(units, sizes, keep, allow_empty)
    refuse_nan(units)
    return _keep_rows_of_pattern(units, sizes, keep, density)


def _keep_globally(units: Mapping[str, Tensor], sizes: Mapping[str, Tensor], keep: int, allow_empty: bool) -> dict[str, Tensor]:
    kept = keep_best(units, keep, sizes)
    empty = [name for name, mask in kept.items() if not mask.any() and (units[name] > -torch.inf).any()]
    if allow_empty or not empty:
        return kept
    if keep < (least := sum(int(sizes[name].max()) for name in units)):
        raise BudgetError(
            f"Keeping {keep:,} weights would empty {len(empty)} layers, {empty[0]!r} first: one unit in each of the "
            f"{len(units)} layers takes {least:,} weights. Ask for more, exclude layers, or allow empty layers."
        )
    raised = {name: u.flatten().clone() for name, u in units.items()}  # keeps the best of each layer
    for u in raised.values():
        u[u.argmax()] = torch.inf if u.max() > -torch.inf else -torch.inf
    kept = keep_best(raised, keep, {name: s.flatten() for name, s in sizes.items()})
    return {name: mask.view(units[name].shape) for name, mask in kept.items()}


def _keep_in_layer(units: Tensor, sizes: Tensor, keep: int, *, by_row: bool) -> Tensor:
    if not by_row:
        return keep_best({"": units}, keep, {"": sizes})[""]
    held = sizes.sum(1)
    exact = held.double() * keep / held.sum()
    counts = exact.floor().long()
    counts[(counts - exact).argsort(stable=True)[: keep - int(counts.sum())]] += 1
    return keep_best_rows(units, counts, sizes)


def _keep_rows_of_pattern(
    units: Mapping[str, Tensor], sizes: Mapping[str, Tensor], keep: int, density: float
) -> dict[str, Tensor]:
    share = max(density, keep / sum(int(s.sum()) for s in sizes.values()))
    kept = {}
    for name, rows in units.items():
        real = sizes[name].to(rows.device) > 0
        protected, alive = (real & (rows == torch.inf)).sum(1), (real & (rows > -torch.inf)).sum(1)
        count = torch.minimum(protected.clamp(min=math.ceil(share * rows.shape[1] - 1e-9)), alive)
        kept[name] = keep_best_rows(rows, count, sizes[name])
    return kept


def keep_best(scores: Mapping[str, Tensor], keep: int, sizes: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Returns boolean masks that keep the best units of all tensors together, with ``keep`` weights in all.

    Args:
        scores: Unit scores by layer, any shapes, one dtype.
        keep: Weights to keep, 0 <= keep <= all. With units of one weight the count is met exactly; with larger units
            the nearest prefix of the order is taken (the smaller one of two equally near).
        sizes: Weights each unit holds, shaped like the scores; None means one each. Units of size 0 are never kept.

    Raises:
        ScoreError: A score is NaN.
        BudgetError: ``keep`` exceeds the alive weights (not ``-inf``), or is below the protected ones (``+inf``).
    """
    unit = _common_size(scores, sizes)
    if unit is None:
        assert sizes is not None
        masks = _keep_by_order(scores, keep, sizes)
    else:
        total = unit * sum(s.numel() for s in scores.values())
        if not 0 <= keep <= total:
            raise BudgetError(f"Cannot keep {keep:,} of {total:,} weights: give a number from 0 to {total:,}.")
        masks = _keep_equal(scores, -(-(2 * keep - unit) // (2 * unit)))
    return masks


def keep_best_rows(scores: Tensor, keep: Tensor, sizes: Tensor) -> Tensor:
    """Returns a boolean mask that keeps the best units of each row.

    Args:
        scores: (rows, columns).
        keep: Weights to keep in each row, (rows,).
        sizes: Weights each unit holds, (rows, columns); units of size 0 are never kept.
    """
    if _common_size({"": scores}, {"": sizes}) == 1 and not bool(scores.isnan().any()):
        return _keep_equal_rows(scores, keep, sizes)
    held = sizes.to(scores.device)
    order = torch.where(held > 0, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
    cumulative = held.gather(1, order).cumsum(1)
    prefixes = torch.nn.functional.pad(cumulative, (1, 0))  # prefix p holds the first p units
    count = (prefixes - keep.to(held.device)[:, None]).abs().argmin(1)
    stays = torch.arange(scores.shape[1], device=scores.device) < count[:, None]
    stays &= held.gather(1, order) > 0
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, stays)
    _refuse_impossible(scores, mask, sizes)
    return mask


def _keep_equal_rows(scores: Tensor, keep: Tensor, sizes: Tensor) -> Tensor:
    """Keeps ``keep`` units of one weight each in each row, ties by position: by one selection a row, without sorting it."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    columns = scores.shape[1]
    counts = keep.to(scores.device).clamp(0, columns)
    for count in torch.unique(counts).tolist():
        rows = (counts == count).nonzero()[:, 0]
        every = len(rows) == len(scores)
        own = scores if every else scores[rows]
        if 0 < count < columns:
            least = own.kthvalue(columns - count + 1, dim=1, keepdim=True).values
            found = own > least
            equal = own == least
            missing = count - found.sum(1, keepdim=True)
            if bool((equal.sum(1, keepdim=True) > missing).any()):
                equal &= equal.cumsum(1) <= missing
            found |= equal
        else:
            found = torch.full_like(own, count == columns, dtype=torch.bool)
        mask = found if every else mask.index_copy_(0, rows, found)
    _refuse_impossible(scores, mask, sizes)
    return mask


def _keep_equal(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Keeps exactly ``count`` units of equal size."""
    flat = [s.detach().reshape(-1) for s in scores.values()]
    if count == 0:
        refuse_nan(scores)
        return {name: torch.zeros(s.shape, dtype=torch.bool, device=s.device) for name, s in scores.items()}
    masks, value = largest(flat, count)
    if math.isnan(value):
        refuse_nan(scores)
    if value == -torch.inf:
        alive = sum(int((s > value).sum()) for s in flat)
        raise BudgetError(f"Cannot keep {count:,} units: only {alive:,} are still alive, the others were pruned before.")
    if value == torch.inf and (protected := sum(int((s == value).sum()) for s in flat)) > count:
        raise BudgetError(f"{protected:,} units are protected, but only {count:,} may be kept: protect fewer, or keep more.")
    return {name: mask.view(scores[name].shape) for name, mask in zip(scores, masks, strict=True)}


def _keep_by_order(scores: Mapping[str, Tensor], keep: int, sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keeps the nearest prefix when units differ in size."""
    refuse_nan(scores)
    total = sum(int(s.sum()) for s in sizes.values())
    if not 0 <= keep <= total:
        raise BudgetError(f"Cannot keep {keep:,} of {total:,} weights: give a number from 0 to {total:,}.")
    values = torch.cat([s.detach().reshape(-1) for s in scores.values()])[None]
    held = torch.cat([sizes[name].reshape(-1) for name in scores])[None]
    mask = keep_best_rows(values, torch.tensor([keep]), held)[0]
    parts = torch.split(mask, [s.numel() for s in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def _common_size(scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor] | None) -> int | None:
    """Returns the common size of all units, or None."""
    if sizes is None:
        return 1
    bounds = [bound for name in scores for bound in _bounds(sizes[name])]
    return bounds[0] if bounds and bounds[0] > 0 and min(bounds) == max(bounds) else None


def _bounds(sizes: Tensor) -> tuple[int, int]:
    if all(stride == 0 for stride in sizes.stride()):  # a broadcast scalar
        return (int(sizes[(0,) * sizes.ndim]),) * 2
    return int(sizes.min()), int(sizes.max())


def refuse_nan(scores: Mapping[str, Tensor]) -> None:
    """Raises `ScoreError` for scores that are no numbers, by name of the layer."""
    for name, s in scores.items():
        if s.numel() and s.aminmax().min.isnan():
            raise ScoreError(
                f"The score of {name!r} has {int(s.isnan().sum()):,} NaN of {s.numel():,}. Scores must be numbers: "
                "look for a non-finite weight or gradient there."
            )


def _refuse_impossible(scores: Tensor, mask: Tensor, sizes: Tensor) -> None:
    if not scores.numel() or bool(torch.stack(scores.aminmax()).isfinite().all()):
        return
    if (mask & (scores == -torch.inf)).any():
        alive = int(sizes.to(scores.device)[scores > -torch.inf].sum())
        raise BudgetError(f"The masks would keep pruned weights: only {alive:,} are still alive; keep at most as many.")
    if (~mask & (scores == torch.inf) & (sizes.to(scores.device) > 0)).any():
        protected = int(sizes.to(scores.device)[scores == torch.inf].sum())
        raise BudgetError(f"{protected:,} weights are protected, more than may be kept: keep as many, or protect fewer.")
