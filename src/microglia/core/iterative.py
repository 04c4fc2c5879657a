"""Iterative unstructured pruning: the cost of a round depends on the remaining weights, not on the original number."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from microglia.core.errors import BudgetError, ScoreError
from microglia.core.largest import largest
from microglia.core.masks import MaskSet
from microglia.core.native import compiled

MOST = 2**31 - 1
"""Largest layer whose positions fit 32 bits, as the compiled passes take them."""


class Alive:
    """The remaining weights of some layers, which compete in one ordering.

    Removed weights are set to 0 in place; masks are made once, at the end. If a weight's score does not depend on the gradients
    of removed weights, the result equals `select` with masks in every round.

    Args:
        weights: Weights by layer, without masks: those of a network, or a copy that is scored in their place.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.count = sum(weight.numel() for weight in weights.values())
        self._places: dict[str, Tensor] = {}  # positions of the remaining weights; all positions of a layer that is absent

    @torch.no_grad()
    def of(self, *factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the flat product of one or two values for each remaining weight, by layer; may overwrite the first."""
        return {name: _product(self._places.get(name), *(values[name] for values in factors)) for name in self.weights}

    @torch.no_grad()
    def keep(self, scores: Mapping[str, Tensor], count: int) -> None:
        """Keeps the best of the remaining weights, ties by position, and sets the others to 0.

        Args:
            scores: Scores of the remaining weights of all layers, as `of` returns them, higher = keep.
            count: How many to keep, from 0 to `count`.

        Raises:
            BudgetError: The count exceeds the number of remaining weights.
            ScoreError: A score is NaN.
        """
        if not 0 <= count <= self.count:
            raise BudgetError(f"Cannot keep {count:,} weights: only {self.count:,} are still alive.")
        if count == self.count:
            return
        names = [name for name, value in scores.items() if len(value)]
        kept, value = largest([scores[name] for name in names], max(1, count))
        if math.isnan(value):
            raise ScoreError("A score is NaN. Scores must be numbers: look for a non-finite weight or gradient.")
        for name, stays in zip(names, kept, strict=True):
            self._places[name] = _kept(self.weights[name], self._places.get(name), stays if count else stays.zero_())
        self.count = count

    def masks(self) -> MaskSet:
        """Returns the masks of the remaining weights."""
        made = {}
        for name, weight in self.weights.items():
            places = self._places.get(name)
            flat = torch.full((weight.numel(),), places is None, device=weight.device)
            if places is not None:
                flat[places] = True
            made[name] = flat.view(weight.shape)
        return MaskSet(made)


def _product(places: Tensor | None, first: Tensor, second: Tensor | None = None) -> Tensor:
    """Returns the product of two values at some positions, or at all; a single value is copied there."""
    if second is None:
        return first.reshape(-1).clone() if places is None else first.reshape(-1).index_select(0, places)
    if places is None:
        return first.mul_(second).reshape(-1)
    if (function := _compiled("mg_alive_products", places, first, second)) is not None:
        result = torch.empty(len(places))
        function(first.data_ptr(), second.data_ptr(), places.data_ptr(), len(places), result.data_ptr())
        return result
    return first.reshape(-1).index_select(0, places).mul_(second.reshape(-1).index_select(0, places))


def _kept(weight: Tensor, places: Tensor | None, stays: Tensor) -> Tensor:
    """Returns the positions that stay, of some or of all, and sets the weights at the others to 0."""
    size = torch.int32 if weight.numel() <= MOST else torch.int64
    if (function := _compiled("mg_alive_keep", places, weight)) is not None:
        left = torch.empty(len(stays), dtype=size) if places is None else places
        found = ctypes.c_int64()
        function(
            None if places is None else places.data_ptr(),
            stays.data_ptr(),
            len(stays),
            weight.data_ptr(),
            left.data_ptr(),
            found,
        )
        return left[: found.value]
    left, removed = (flags.nonzero().squeeze(1) for flags in (stays, ~stays))
    if places is not None:
        left, removed = places.index_select(0, left), places.index_select(0, removed)
    flat = weight.view(-1) if weight.is_contiguous() else weight.reshape(-1)
    flat.index_fill_(0, removed.long(), 0.0)
    if not weight.is_contiguous():  # in channels-last layout the flat weights are a copy
        weight.copy_(flat.view(weight.shape))
    return left.to(size)


def _compiled(name: str, places: Tensor | None, *values: Tensor) -> Callable[..., int] | None:
    """Returns a compiled pass over values at positions; None if there is none, or they are not plain float32 in memory."""
    plain = all(v.is_cpu and v.dtype == torch.float32 and v.is_contiguous() and v.numel() <= MOST for v in values)
    return _passes()[name] if plain and (places is None or places.dtype == torch.int32) else None


@functools.cache
def _passes() -> dict[str, Callable[..., int] | None]:
    pointer, word = ctypes.c_void_p, ctypes.c_int64
    return {
        "mg_alive_products": compiled("mg_alive_products", (pointer, pointer, pointer, word, pointer)),
        "mg_alive_keep": compiled("mg_alive_keep", (pointer, pointer, word, pointer, pointer, ctypes.POINTER(word))),
    }
