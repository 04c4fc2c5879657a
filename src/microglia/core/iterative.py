"""Iterative unstructured pruning: the cost of a round depends on the remaining weights, not on the original number."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from microglia.core.errors import BudgetError, ScoreError
from microglia.core.largest import Largest, largest, zeros
from microglia.core.masks import MaskSet

SPARSE = 0.7
"""Fraction of the examined positions; when fewer remain, they are collected anew. A higher value costs more than it saves."""


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
        self._places: dict[str, Tensor] = {}  # positions examined; all positions of a layer that is absent
        self._stays: dict[str, Tensor] = {}  # True for those that remain; all positions of a layer that is absent

    @torch.no_grad()
    def of(self, *factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the flat product of values, one per weight, where `keep` examines them; may overwrite the first."""
        return {name: self._product(name, [values[name] for values in factors]) for name in self.weights}

    def _product(self, name: str, factors: list[Tensor]) -> Tensor:
        places = self._places.get(name)
        first, *others = [f.reshape(-1) if places is None else f.reshape(-1).index_select(0, places) for f in factors]
        if not others:
            return first.clone() if places is None else first
        for other in others:
            first.mul_(other)
        return first

    @torch.no_grad()
    def keep(self, scores: Mapping[str, Tensor], count: int) -> None:
        """Keeps the best of the remaining weights, ties by position, and sets the others to 0.

        Args:
            scores: Scores of all layers, as `of` returns them, higher = keep; overwritten.
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
        kept, value = self._best(scores, names, max(1, count))
        if math.isnan(value):
            raise ScoreError("A score is NaN. Scores must be numbers: look for a non-finite weight or gradient.")
        for name, mask in zip(names, kept, strict=True):
            self._remove(name, mask if count else torch.zeros_like(mask))
        self.count = count
        if count < SPARSE * sum(map(len, scores.values())):
            for name in names:
                self._collect(name)

    def _best(self, scores: Mapping[str, Tensor], names: list[str], count: int) -> Largest:
        """Returns the best of the remaining weights."""
        for name, stays in self._stays.items():
            scores[name].mul_(stays.view(torch.int8))  # six times as fast as filling in -inf
        found = largest([scores[name] for name in names], count)
        if found.value > 0 or not self._stays:
            return found
        for name, stays in self._stays.items():  # zeros would be among the best, or a removed weight had an infinite score
            scores[name].masked_fill_(~stays, -torch.inf)
        return largest([scores[name] for name in names], count)

    def _remove(self, name: str, stays: Tensor) -> None:
        weight, before = self.weights[name], self._stays.get(name)
        removed = zeros(stays if before is None else stays == before)
        if name in self._places:
            removed = self._places[name].index_select(0, removed)
        flat = weight.view(-1) if weight.is_contiguous() else weight.reshape(-1)
        flat.index_fill_(0, removed, 0.0)
        if not weight.is_contiguous():  # in channels-last layout the flat weights are a copy
            weight.copy_(flat.view(weight.shape))
        self._stays[name] = stays

    def _collect(self, name: str) -> None:
        left = self._stays.pop(name).nonzero().squeeze(1)
        self._places[name] = self._places[name].index_select(0, left) if name in self._places else left

    def masks(self) -> MaskSet:
        """Returns the masks of the remaining weights."""
        made = {}
        for name, weight in self.weights.items():
            places, stays = self._places.get(name), self._stays.get(name)
            flat = torch.full((weight.numel(),), places is None, device=weight.device)
            if places is not None:
                flat[places if stays is None else places[stays]] = True
            elif stays is not None:
                flat = stays
            made[name] = flat.view(weight.shape)
        return MaskSet(made)
