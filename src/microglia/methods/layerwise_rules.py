"""Rules by which the method ``layerwise`` prunes one layer: magnitude, Wanda, SparseGPT, Wanda's mask with SparseGPT's update.

A rule ranks the weights of a layer, and may change those that stay. A new rule registers itself here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from microglia.core.patterns import NM, Pattern
from microglia.core.registry import Registry
from microglia.core.selection import keep_best, keep_best_rows
from microglia.methods.reconstruction import Factor, inverse_factor, reconstruct
from microglia.scores.second_moments import matrix_of, weight_of
from microglia.scores.second_order import wanda_values


@dataclass(frozen=True)
class Wish:
    """The request for one layer.

    Attributes:
        pattern: The unit.
        keep: Weights to keep; N:M keeps its own number.
        mask_block: Columns whose mask SparseGPT chooses at once.
        update_block: Columns that SparseGPT updates one by one.
        dampening: Fraction of the mean of the Hessian's diagonal that is added to it.
    """

    pattern: Pattern
    keep: int
    mask_block: int = 128
    update_block: int = 8
    dampening: float = 0.01


@dataclass(frozen=True)
class PrunedLayer:
    """A pruned layer, (out, in, *kernel).

    Attributes:
        weight: The new weight.
        mask: True where it is kept.
        loss: Mean squared error of its outputs over the calibration rows by the rule's own model; None where it has none.
        dampening: The dampening that was needed; None without a Hessian.
    """

    weight: Tensor
    mask: Tensor
    loss: float | None = None
    dampening: float | None = None


@dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
        prune: (weight (out, in, *kernel), what ``prepare`` returned, wish) -> pruned layer.
        needs: Second moments of the inputs: ``none``, the ``diagonal`` E[x^2], or the ``whole`` E[x x^T].
        prepare: (moments, wish) -> what all layers with the same inputs share.
    """

    prune: Callable[[Tensor, Any, Wish], PrunedLayer]
    needs: Literal["none", "diagonal", "whole"] = "none"
    prepare: Callable[[Any, Wish], Any] = lambda moments, wish: moments


rules: Registry[Rule] = Registry("layerwise rule")


def _magnitude(weight: Tensor, prepared: Any, wish: Wish) -> PrunedLayer:
    """Keeps the largest weights of the layer."""
    units, sizes = wish.pattern.reduce(weight.abs()), wish.pattern.sizes(weight.shape)
    if isinstance(wish.pattern, NM):
        chosen = _best_of_runs(units, sizes, wish.pattern)
    else:
        chosen = keep_best({"": units}, wish.keep, {"": sizes})[""]
    return _zeroed(weight, wish.pattern.expand(chosen, weight.shape))


def _wanda(weight: Tensor, moments: Tensor, wish: Wish) -> PrunedLayer:
    """Keeps the weights of each row with the largest abs(W) times the norm of their input."""
    return _zeroed(weight, _wanda_mask(weight, moments, wish))


def _sparsegpt(weight: Tensor, factor: Factor, wish: Wish) -> PrunedLayer:
    """Chooses the mask from left to right, and changes the other weights to compensate."""
    return _compensated(weight, factor, wish, None)


def _wanda_update(weight: Tensor, prepared: tuple[Tensor, Factor], wish: Wish) -> PrunedLayer:
    """Takes Wanda's mask, and SparseGPT's change of the other weights."""
    moments, factor = prepared
    return _compensated(weight, factor, wish, _wanda_mask(weight, moments, wish))


def _factor(moments: Tensor, wish: Wish) -> Factor:
    return inverse_factor(moments, wish.dampening)


def _both(moments: Tensor, wish: Wish) -> tuple[Tensor, Factor]:
    return moments.diagonal(dim1=-2, dim2=-1).clone(), _factor(moments, wish)


rules.add("magnitude")(Rule(_magnitude))
rules.add("wanda")(Rule(_wanda, "diagonal"))
rules.add("sparsegpt")(Rule(_sparsegpt, "whole", _factor))
rules.add("wanda-update")(Rule(_wanda_update, "whole", _both))


def _wanda_mask(weight: Tensor, moments: Tensor, wish: Wish) -> Tensor:
    values = wanda_values(weight, moments)
    units, sizes = wish.pattern.reduce(values), wish.pattern.sizes(weight.shape)
    if isinstance(wish.pattern, NM):
        chosen = _best_of_runs(units, sizes, wish.pattern)
    else:
        chosen = keep_best_rows(units, _shared_out(wish.keep, sizes), sizes)
    return wish.pattern.expand(chosen, weight.shape)


def _shared_out(keep: int, sizes: Tensor) -> Tensor:
    """Returns how many weights each row keeps: the same fraction in whole units, ``keep`` in all as nearly as possible."""
    held, unit = sizes.sum(1), int(sizes.max())
    ends = (2 * held.cumsum(0) * keep // held.sum() + unit).div(2 * unit, rounding_mode="floor") * unit
    ends[-1] = keep if unit == 1 else ends[-1]
    return ends.diff(prepend=ends.new_zeros(1))


def _best_of_runs(units: Tensor, sizes: Tensor, pattern: NM) -> Tensor:
    return keep_best_rows(units, sizes.sum(1).clamp(max=pattern.n), sizes)


def _zeroed(weight: Tensor, mask: Tensor) -> PrunedLayer:
    return PrunedLayer(torch.where(mask, weight, 0.0), mask)


def _compensated(weight: Tensor, factor: Factor, wish: Wish, mask: Tensor | None) -> PrunedLayer:
    done = reconstruct(
        matrix_of(weight),
        factor,
        wish.pattern,
        wish.keep,
        width=weight.shape[1],
        mask_block=wish.mask_block,
        update_block=wish.update_block,
        mask=None if mask is None else matrix_of(mask),
    )
    shape = tuple(weight.shape)
    return PrunedLayer(weight_of(done.weight, shape), weight_of(done.mask, shape), done.loss, done.dampening)
