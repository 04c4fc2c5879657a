"""Width vectors: how many channels each group of coupled channels keeps, and which vectors meet a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from microglia.core.budget import Budget
from microglia.core.errors import BudgetError
from microglia.graph.channels.coupled import CoupledChannels
from microglia.graph.channels.widths import granularity, highest

Widths = tuple[int, ...]
"""Channels that each group keeps, in the order of `microglia.graph.channels.coupled.CoupledChannels.names`."""

TRIES = 200
"""Draws that are rejected before the last one is shifted to the budget."""
HALVINGS = 40


class WidthSpace:
    """The width vectors of a model, and those near a budget.

    Args:
        units: The channels of the model.
        budget: ``density``, ``params`` and ``flops``, fractions kept; the tightest binds.
        kept: The least and the largest kept fraction of a group.
        below: How far the tightest fraction may be below its budget. A single channel may be worth more in a small network;
            then half of the smallest channel is allowed.
        above: How far it may be above, likewise.
        round_to: Widths are multiples of this; narrower groups stay whole; 1 for none.

    Attributes:
        rejected: Drawn vectors that missed the budget.

    Raises:
        BudgetError: No width vector meets the budget; the text says what the widest and the narrowest have.
    """

    def __init__(
        self,
        units: CoupledChannels,
        budget: Budget,
        *,
        kept: tuple[float, float] = (0.0, 1.0),
        below: float = 0.005,
        above: float = 0.005,
        round_to: int = 1,
    ) -> None:
        self.units, self.kept, self.rejected = units, kept, 0
        self._asked = {term: value for term, value in asdict(budget).items() if value is not None}
        self._steps = [granularity(replace(group, rows=1), round_to) for group in units.groups]
        smallest = self._smallest()
        self.below, self.above = max(below, smallest / 2), above if above == 0 else max(above, smallest / 2)
        narrow, wide = (self.excess(self.at([share] * len(self._steps))) for share in kept)
        if narrow > self.above or wide < -self.below:
            raise BudgetError(
                f"No width vector meets the budget ({budget}): groups may keep {kept[0]:g} to {kept[1]:g} of their channels, "
                f"which leaves {self._told(narrow)} to {self._told(wide)}."
            )

    def excess(self, widths: Sequence[int]) -> float:
        """Returns how far the tightest fraction is above its budget, negative below."""
        return float(max(self.units.fraction(term, widths) - value for term, value in self._asked.items()))

    def feasible(self, widths: Sequence[int]) -> bool:
        """Tells whether a vector is near the budget and empties no group."""
        return min(widths) >= 1 and -self.below - 1e-12 <= self.excess(widths) <= self.above + 1e-12

    def at(self, shares: Sequence[float]) -> Widths:
        """Returns the widths nearest to kept fractions of the groups, at least one step each."""
        low, high = self.kept
        parts = zip(shares, self.units.lengths, self._steps, strict=True)
        return tuple(_width(min(high, max(low, share)), size, step) for share, size, step in parts)

    def draw(self, generator: torch.Generator) -> Widths | None:
        """Returns a random vector near the budget, or None.

        Each group's fraction is uniform; vectors that miss the budget are rejected. After `TRIES` of these the fractions of the
        last are shifted together.
        """
        low, high = self.kept
        shares: list[float] = []
        for _ in range(TRIES):
            shares = (low + (high - low) * torch.rand(len(self._steps), generator=generator, dtype=torch.float64)).tolist()
            if self.feasible(widths := self.at(shares)):
                return widths
            self.rejected += 1
        return self._shifted(shares)

    def distinct(self, count: int, generator: torch.Generator) -> list[Widths]:
        """Returns different random vectors near the budget, at most ``count``: a small network may have fewer.

        Raises:
            BudgetError: None was found.
        """
        found: dict[Widths, None] = {}
        missed = 0
        while len(found) < count and missed < 10:
            widths = self.draw(generator)
            if widths is None or widths in found:
                missed += 1
            else:
                found[widths], missed = None, 0
        if not found:
            asked = ", ".join(f"{term} {value:g}" for term, value in self._asked.items())
            raise BudgetError(
                f"No width vector within {self.above:g} of the budget ({asked}) was found in {self.rejected} draws: give a "
                "larger tolerance."
            )
        return list(found)

    def channels(self, ranking: Tensor, widths: Sequence[int]) -> Tensor:
        """Returns the best channels of each group, as many as a vector says, boolean (count,)."""
        parts = torch.split(ranking, list(self.units.lengths))
        return torch.cat([highest(part, width) for part, width in zip(parts, widths, strict=True)])

    def _shifted(self, shares: Sequence[float]) -> Widths | None:
        """Returns the vector of fractions that are shifted together until the budget is met, or None."""
        low, high = -1.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            widths = self.at([share + middle for share in shares])
            if self.feasible(widths):
                return widths
            low, high = (low, middle) if self.excess(widths) > 0 else (middle, high)
        return None

    def _smallest(self) -> float:
        """Returns the smallest fraction that one step of one group is worth, from the whole network."""
        whole = list(self.units.lengths)
        worth = []
        for number, (size, step) in enumerate(zip(whole, self._steps, strict=True)):
            less = [*whole[:number], max(1, size - step), *whole[number + 1 :]]
            worth.append(max(self.units.fraction(term, whole) - self.units.fraction(term, less) for term in self._asked))
        return min((value for value in worth if value > 0), default=0.0)

    def _told(self, excess: float) -> str:
        if len(self._asked) > 1:
            return f"the tightest term plus {excess:.3g}"
        ((term, asked),) = self._asked.items()
        return f"{term} {excess + asked:.3g}"


def _width(share: float, size: int, step: int) -> int:
    """Returns the multiple of a step nearest to a fraction of a group, between one step and the whole."""
    return min(size, max(min(step, size), round(share * size / step) * step))
