"""Limits: which units an exact choice keeps for a budget.

A weight's unit has a cost of its own, so that costs add up: `OwnCosts`. A channel has none: the multiply-accumulates of a layer
are those of its kept inputs times its kept outputs, so that they are counted for the whole choice: `Operations`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from microglia.core.errors import BudgetError
from microglia.core.patterns import Channel, Pattern
from microglia.core.selection import refuse_nan
from microglia.graph.channels.coupled import CoupledChannels
from microglia.graph.channels.widths import TOLERANCE
from microglia.methods.units import LayerUnits, Units, choose, keep_count, raised, split

if TYPE_CHECKING:
    from microglia.methods.config import UnitConfig
    from microglia.methods.pruner import Pruner

WHOLE = 64
"""Maximum number of groups for which exchanges of two channels are tried; in more groups a channel is less."""


class Limit(Protocol):
    """The common interface of all kinds."""

    @property
    def keep(self) -> int:
        """Cost to keep; 0 if the pattern chooses within its own rows."""
        ...

    def choose(self, scores: Tensor, done: float = 1.0) -> Tensor:
        """Returns the units that stay, boolean (count,).

        Args:
            scores: (count,), higher = keep; -inf cannot stay, +inf must stay.
            done: Part of the way from everything to the budget.

        Raises:
            BudgetError: The budget cannot be met.
            ScoreError: A score is NaN.
        """
        ...

    def soft(self, scores: Tensor) -> tuple[float, Tensor | None]:
        """Returns the weighted sum of a soft mask and the weight of each unit, (count,); None where all weights are 1.

        The mask of the exact choice has this sum, so that a soft mask of falling temperature ends in it.
        """
        ...

    def ratio(self, factors: Tensor) -> Tensor:
        """Returns the remaining cost divided by the budget, for soft masks or gates (count,); differentiable."""
        ...

    def told(self, chosen: Tensor) -> dict[str, float]:
        """Returns what a report says about an exact choice beside its densities."""
        ...


@dataclass(frozen=True)
class OwnCosts:
    """A limit on a sum of costs, one for each unit.

    Attributes:
        units: All units.
        keep: Cost to keep.
        pattern: The unit; N:M chooses within its own rows.
        allow_empty: Whether a layer or group may lose everything.
        least: Minimum kept fraction of each layer's units.
    """

    units: Units
    keep: int
    pattern: Pattern
    allow_empty: bool = False
    least: float = 0.0

    def choose(self, scores: Tensor, done: float = 1.0) -> Tensor:
        """See `Limit`."""
        keep = self.keep if done == 1 else self._on_the_way(done)
        return choose(self.units, scores, keep, allow_empty=self.allow_empty, least=self.least, pattern=self.pattern)

    def soft(self, scores: Tensor) -> tuple[float, Tensor | None]:
        """See `Limit`."""
        costs = self.units.costs
        if int(costs.min()) == int(costs.max()):
            return self.keep / int(costs[0]), None
        return self.keep, costs.to(scores.dtype)

    def ratio(self, factors: Tensor) -> Tensor:
        """See `Limit`."""
        return (factors * self.units.costs).sum() / self.keep

    def told(self, chosen: Tensor) -> dict[str, float]:
        """Returns nothing: the densities tell it."""
        return {}

    def _on_the_way(self, done: float) -> int:
        whole, fixed = int(self.units.costs.sum()), self.pattern.fixed_density
        final = self.keep if fixed is None else round(fixed * whole)
        return whole - round((whole - final) * done)


class Operations:
    """A limit on the multiply-accumulates of a model whose channels are coupled.

    The channels are put in one order, those that must stay first. Every prefix of the order is counted exactly: the count grows
    along it, and the prefix nearest to the budget is found by bisection. If one channel is so much that this prefix is more
    than 1 % off, the lowest channels of other groups are exchanged for it.

    Args:
        units: All coupled channels.
        kept: Kept fraction of the multiply-accumulates of the whole model.
        allow_empty: Whether a group may lose everything.
        least: Minimum kept fraction of each group's channels.

    Attributes:
        keep: Multiply-accumulates to keep, of one batch of the example inputs.

    Raises:
        BudgetError: Even the narrowest model is above the budget.
    """

    def __init__(self, units: CoupledChannels, kept: float, *, allow_empty: bool = False, least: float = 0.0) -> None:
        self.units, self.kept = units, kept
        self._lengths = torch.tensor(list(units.lengths))
        self._groups = torch.repeat_interleave(torch.arange(len(self._lengths)), self._lengths)
        lowest = 0 if allow_empty else 1
        self._low = torch.tensor([max(lowest, math.ceil(least * size - 1e-9)) for size in units.lengths])
        self._dense = int(units.macs_at(self._lengths))
        self.keep = math.floor(kept * self._dense + 0.5)
        narrowest = int(units.macs_at(self._low)) / self._dense
        if narrowest > kept * (1 + TOLERANCE):
            bound = f"at least {least:.4g} of the channels of each group" if least > 0 else "one channel in each group"
            raise BudgetError(
                f"flops={kept:g} cannot be met: with {bound}, in {len(self._lengths)} groups, the model still has "
                f"{narrowest:.4g} of its multiply-accumulates; ask for more, or exclude less."
            )

    def choose(self, scores: Tensor, done: float = 1.0) -> Tensor:
        """See `Limit`."""
        return self._choose(scores, done).to(scores.device)

    def told(self, chosen: Tensor) -> dict[str, float]:
        """Returns the kept fraction of the multiply-accumulates."""
        return {"flops": int(self.units.macs_at(self._widths(chosen))) / self._dense}

    def soft(self, scores: Tensor) -> tuple[float, Tensor | None]:
        """See `Limit`; the weight of a channel is what the exact choice would save without one of its group."""
        chosen = self._choose(scores, 1.0)
        widths = self._widths(chosen)
        one = torch.eye(len(widths), dtype=torch.int64)
        fewer = torch.where(widths > 0, widths - one, widths)
        more = torch.where(widths > 0, widths, widths + one)
        each = (self.units.macs_at(more) - self.units.macs_at(fewer)).clamp(min=1).double()
        weights = (each / each.mean())[self._groups].to(scores.dtype)
        return float(weights[chosen].double().sum()), weights.to(scores.device)

    def ratio(self, factors: Tensor) -> Tensor:
        """See `Limit`: the product of widths."""
        return self.units.macs(factors) / self.kept

    def _widths(self, chosen: Tensor) -> Tensor:
        return torch.bincount(self._groups[chosen.cpu()], minlength=len(self._lengths))

    def _choose(self, scores: Tensor, done: float) -> Tensor:
        values = scores.detach().double().cpu()
        refuse_nan({"the channels": values})
        parts = split(self.units, values)
        low = dict(zip(self.units.names, self._low.tolist(), strict=True))
        values = torch.cat([raised(part, low[name]) for name, part in parts.items()])
        order = values.argsort(descending=True, stable=True)
        first, last = int((values == torch.inf).sum()), int((values > -torch.inf).sum())
        target = (1 - (1 - self.kept) * done) * self._dense
        places = torch.nn.functional.one_hot(self._groups[order], len(low)).cumsum(0)
        prefixes = torch.cat([torch.zeros_like(places[:1]), places])[first : last + 1]
        widths = self._nearest(prefixes, self._widths(values == torch.inf), self._widths(values > -torch.inf), target)
        groups = self._groups[order]
        stays = places.gather(1, groups[:, None])[:, 0] <= widths[groups]
        return torch.zeros(len(order), dtype=torch.bool).index_fill_(0, order[stays], value=True)

    def _nearest(self, prefixes: Tensor, low: Tensor, high: Tensor, target: float) -> Tensor:
        """Returns the widths for a target: of the nearest prefix, or of exchanges from both prefixes around the target.

        Args:
            prefixes: Width vectors whose counts rise, (prefixes, groups).
            low: Lowest width of each group.
            high: Highest width.
            target: Multiply-accumulates.
        """
        counts = self.units.macs_at(prefixes).double()
        at = min(int(torch.searchsorted(counts, target)), len(counts) - 1)
        below, above = prefixes[max(0, at - 1)], prefixes[at]
        first = below if target - float(counts[max(0, at - 1)]) <= float(counts[at]) - target else above
        if self._off(first, target) <= TOLERANCE * target:
            return first
        held = torch.where(above > below, above, low)  # the channel that goes past the target stays, and others go
        return min(
            self._exchanged(below, low, high, target),
            self._exchanged(above, held, high, target),
            key=partial(self._off, target=target),
        )

    def _off(self, widths: Tensor, target: float) -> float:
        return abs(int(self.units.macs_at(widths)) - target)

    def _exchanged(self, widths: Tensor, low: Tensor, high: Tensor, target: float) -> Tensor:
        """Returns widths nearer to the target: again and again one channel more, one fewer, or both, while that helps."""
        one = torch.eye(len(widths), dtype=torch.int64)
        moves = torch.cat([one, -one] + ([(one[:, None] - one[None]).flatten(0, 1)] if len(widths) <= WHOLE else []))
        for _ in range(int((high - low).sum())):
            found = widths + moves
            found = found[((found >= low) & (found <= high)).all(1)]
            if not len(found):
                break
            off = (self.units.macs_at(found).double() - target).abs()
            if float(off.min()) >= self._off(widths, target):
                break
            widths = found[off.argmin()]
        return widths


def limit_of(units: Units, pruner: Pruner, config: UnitConfig) -> Limit:
    """Returns the limit that a pruner's budget sets.

    Args:
        units: All units of its model; counted in MACs if the config has a budget of these.
        pruner: The pruner.
        config: Its config.

    Raises:
        BudgetError: There is no budget, it has no meaning for these units, or it cannot be met.
    """
    least = 1 - config.max_sparsity
    coupled: object = units
    if isinstance(coupled, CoupledChannels) and (config.flops is not None or config.cost == "macs"):
        kept = config.flops if config.flops is not None else _density(pruner, config)
        return Operations(coupled, kept, allow_empty=config.allow_empty, least=least)
    keep = 0 if pruner.pattern.fixed_density is not None else _keep(units, pruner, config)
    return OwnCosts(units, keep, pruner.pattern, config.allow_empty, least)


def _keep(units: Units, pruner: Pruner, config: UnitConfig) -> int:
    """Returns the cost to keep, if each unit has a cost of its own."""
    if config.flops is None:
        return keep_count(units, _density(pruner, config))
    inside, outside = int(units.costs.sum()), cast(LayerUnits, units).outside
    keep = math.floor(config.flops * (inside + outside) + 0.5) - outside
    if keep <= 0:
        share = outside / (inside + outside)
        raise BudgetError(
            f"flops={config.flops:g} cannot be met: {share:.4g} of the multiply-accumulates are outside the pruned layers, so "
            "flops must be above it."
        )
    return keep


def _density(pruner: Pruner, config: UnitConfig) -> float:
    """Returns the kept fraction of the cost."""
    if config.params is not None:
        if isinstance(pruner.pattern, Channel) or config.cost not in ("auto", "weights"):
            raise BudgetError(
                "params counts weights, and this cost counts other units: give density, the kept fraction of that cost."
            )
        return pruner.target / pruner.weights
    if config.density is None:
        raise BudgetError("A budget needs density or flops, the kept fraction in (0, 1]: give one, such as density=0.3.")
    return config.density
