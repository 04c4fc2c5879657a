"""What is left of single weights, as positions: a round of many costs what is left, not what there once was."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from microglia.core.errors import BudgetError, ScoreError
from microglia.core.layers import Layer
from microglia.core.masks import MaskSet
from microglia.core.order import largest


class Alive:
    """The weights of some layers that are left, competing in one ordering.

    Removed weights are set to 0 in the layers themselves; masks are made once, at the end. The result is that of `select` with
    masks in every round where a weight's score does not depend on the gradients of removed ones.

    Args:
        layers: By name, without masks.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = layers
        self.positions = {n: torch.arange(layer.raw.numel(), device=layer.raw.device) for n, layer in layers.items()}

    @property
    def count(self) -> int:
        """How many are left."""
        return sum(len(places) for places in self.positions.values())

    @torch.no_grad()
    def keep(self, scores: Mapping[str, Tensor], count: int) -> None:
        """Keeps the best of what is left, ties by position, and sets the others to 0.

        Args:
            scores: One value per weight, by layer, higher = keep.
            count: How many to keep, from 0 to `count`.

        Raises:
            BudgetError: More is asked for than is left.
            ScoreError: A score is NaN.
        """
        if not 0 <= count <= self.count:
            raise BudgetError(f"Cannot keep {count:,} weights: only {self.count:,} are still alive.")
        names = [name for name, places in self.positions.items() if len(places)]
        values = [scores[name].reshape(-1).index_select(0, self.positions[name]) for name in names]
        if count in (0, self.count):
            kept = [torch.full_like(value, count > 0, dtype=torch.bool) for value in values]
        else:
            kept, value = largest(values, count)
            if math.isnan(value):
                raise ScoreError("A score is NaN. Scores must be numbers: look for a non-finite weight or gradient.")
        for name, mask in zip(names, kept, strict=True):
            places, raw = self.positions[name], self.layers[name].raw
            flat = raw.view(-1) if raw.is_contiguous() else raw.reshape(-1)
            flat.index_fill_(0, places[~mask], 0.0)
            if not raw.is_contiguous():  # in channels-last layout the flat weights are a copy
                raw.copy_(flat.view(raw.shape))
            self.positions[name] = places[mask]

    def masks(self) -> MaskSet:
        """Returns the masks of what is left."""
        made = {}
        for name, layer in self.layers.items():
            flat = torch.zeros(layer.raw.numel(), dtype=torch.bool, device=layer.raw.device)
            made[name] = flat.index_fill_(0, self.positions[name], True).view(layer.shape)  # type: ignore[call-overload]
        return MaskSet(made)
