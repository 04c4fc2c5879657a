"""Search for the order of a group's units that keeps most score in blocks, by swaps of two units.

Blocks tie consecutive rows (a *stripe*) to the same columns, so rows with similar columns should be neighbours: the V x 1
pattern with channel permutation (Tan et al., "Accelerating Sparse Convolution with Column Vector-Wise Sparsity", NeurIPS 2022).

    S[s, c] = sum of the scores of stripe s in column c, each block of n[s, c] weights
    K = the best blocks by S / n, as the density allows; t = the minimum S / n among them

A layer keeps sum S[K], which is the minimum over t of sum max(S - t n, 0) + t (weights kept). At this t a swap of two units
changes only two stripes, and its gain there is an upper bound of its true gain. A swap that gains nothing at this t gains
nothing at all. Each round tries for every slot the most promising partners with the current K. Many improving swaps are made at
once, or a single one, whichever really keeps most. The search ends when no swap keeps more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microglia.core.patterns import Pattern
from microglia.core.selection import keep_best

PARTNERS, TRIALS = 32, 1 << 22
"""Number of partners tried for each slot; fewer, but at least four, if a round would exceed the number of elements."""
WORK = 1 << 28
"""Maximum number of elements tried in all (at least ten rounds); it ends the search early only in the widest layers."""
CHUNK = 1 << 20
"""Elements of one operation."""
SMALL = 1 << 15
"""Up to this number of blocks of a layer a plain top-k is fastest."""
ALONE = 8
"""If the improving swaps conflict, at most this many of them are tried one by one."""
NOISE = 1e-6
"""A relative gain below this is rounding error."""


@dataclass(frozen=True)
class Stripes:
    """The scores of one layer along a dimension in which a group's units occur.

    Attributes:
        values: Scores of each unit's entries, float32 (units, entries, columns).
        stripe: Stripe of each slot's entries, int64 (units, entries).
        rest: Scores of entries of other units or of none, float32 (stripes, columns).
        sizes: Weights in each block, int64 (stripes, columns).
        keep: Weights to keep in the layer.
    """

    values: Tensor
    stripe: Tensor
    rest: Tensor
    sizes: Tensor
    keep: int

    @property
    def width(self) -> int:
        """Scores of one unit."""
        return self.values[0].numel()

    def sums(self, units: Tensor) -> Tensor:
        """Returns the score of each block, (stripes, columns), with ``units[q]`` at slot q."""
        total = self.rest
        for entry in range(self.values.shape[1]):
            member = torch.arange(len(self.rest))[:, None] == self.stripe[:, entry]
            total = torch.addmm(total, member.float(), self.values[units, entry])
        return total

    def best(self, sums: Tensor) -> Tensor:
        """Returns the blocks that stay, boolean (stripes, columns): those with the best mean, as with scope ``layer``."""
        return best_blocks(sums / self.sizes, self.sizes, self.keep)

    def worth(self, kept: Tensor) -> Tensor:
        """Returns the score of each unit at each slot in the blocks that stay, (units, slots)."""
        total = torch.zeros(len(self.values), len(self.values))
        for entry in range(self.values.shape[1]):
            total += (self.values[:, entry] @ kept.float().T)[:, self.stripe[:, entry]]
        return total


def best_blocks(means: Tensor, sizes: Tensor, keep: int) -> Tensor:
    """Returns the blocks with the best mean score that hold ``keep`` weights."""
    least, most = (int(bound) for bound in sizes.aminmax())
    if least != most or means.numel() > SMALL:
        return keep_best({"": means}, keep, {"": sizes})[""]
    count = -(-(2 * keep - most) // (2 * most))  # the same rule as in selection, without its optimizations for large tensors
    best = means.flatten().topk(count).indices
    return torch.zeros(means.numel(), dtype=torch.bool).index_fill_(0, best, True).view_as(means)


def best_mass(pattern: Pattern, score: Tensor, keep: int) -> float:
    """Returns the score that the best units of a layer hold, in the current order."""
    kept = best_blocks(pattern.reduce(score, "mean"), pattern.sizes(score.shape), keep)
    return float(score[pattern.expand(kept, score.shape)].sum(dtype=torch.float64))


def find_order(layers: Sequence[Stripes], generator: torch.Generator, starts: int = 1) -> Tensor:
    """Returns an order of a group's units, int64 (units,): the unit at each slot.

    Args:
        layers: The stripes in which the units occur, all over the same units.
        generator: Draws the random initial orders.
        starts: Number of initial orders; the first is the current order.

    Returns:
        The best order found; the current order, 0, 1, 2 ..., if none keeps more.
    """
    best = here = torch.arange(len(layers[0].values))
    most = mass(layers, here)
    for number in range(starts):
        units = here if number == 0 else torch.randperm(len(here), generator=generator)
        units = _traded(layers, units)
        if (kept := mass(layers, units)) > most * (1 + NOISE):
            best, most = units, kept
    return best


def mass(layers: Sequence[Stripes], units: Tensor) -> float:
    """Returns the score that the best blocks of all layers hold."""
    every = [layer.sums(units) for layer in layers]
    return sum(float(sums[layer.best(sums)].sum(dtype=torch.float64)) for layer, sums in zip(layers, every, strict=True))


def _traded(layers: Sequence[Stripes], units: Tensor) -> Tensor:
    """Returns the units after swaps, until no swap gains."""
    kept = mass(layers, units)
    slots = torch.arange(len(units))[:, None]
    stripes = torch.cat([layer.stripe + number * len(units) for number, layer in enumerate(layers)], 1)
    rounds = WORK // max(1, len(units) * _partners(layers) * sum(layer.width for layer in layers))
    for _ in range(max(10, rounds)):
        pairs = _gaining(layers, units)
        each = _disjoint(pairs, slots)
        now, further = _best(layers, units, [each, each[: len(each) // 4], _disjoint(pairs, stripes)])
        if now <= kept * (1 + NOISE):
            now, further = _best(layers, units, [pair[None] for pair in pairs[:ALONE]])
        if now <= kept * (1 + NOISE):
            break
        units, kept = further, now
    return units


def _best(layers: Sequence[Stripes], units: Tensor, choices: Sequence[Tensor]) -> tuple[float, Tensor]:
    """Returns (kept score, units) after the best of several choices of swaps."""
    trials = [_trade(units, pairs) for pairs in choices] or [units]
    masses = [mass(layers, trial) for trial in trials]
    return max(masses), trials[masses.index(max(masses))]


def _trade(units: Tensor, pairs: Tensor) -> Tensor:
    traded = units.clone()
    traded[pairs[:, 0]], traded[pairs[:, 1]] = units[pairs[:, 1]], units[pairs[:, 0]]
    return traded


def _disjoint(pairs: Tensor, touched: Tensor) -> Tensor:
    """Returns pairs of slots that touch nothing that an earlier chosen pair touches; ``touched`` is by slot."""
    taken: set[int] = set()
    chosen = []
    for number, here in enumerate(touched[pairs].flatten(1).tolist()):
        if taken.isdisjoint(here):
            taken.update(here)
            chosen.append(number)
    return pairs[chosen]


def _gaining(layers: Sequence[Stripes], units: Tensor) -> Tensor:
    """Returns pairs of slots whose swap gains, (pairs, 2), best first."""
    excess, worth = [], torch.zeros(len(units), len(units))
    for layer in layers:
        sums = layer.sums(units)
        kept, means = layer.best(sums), sums / layer.sizes
        threshold = means[kept].min() if bool(kept.any()) else means.max()
        excess.append(sums - threshold * layer.sizes)
        worth += layer.worth(kept)
    pairs = _promising(layers, worth[units])
    gains = torch.zeros(len(pairs))
    for layer, over in zip(layers, excess, strict=True):
        for entry in range(layer.values.shape[1]):
            gains += _gains(layer, entry, over, units, pairs)
    order = gains.argsort(descending=True, stable=True)
    return pairs[order[gains[order] > 0]]


def _promising(layers: Sequence[Stripes], worth: Tensor) -> Tensor:
    """Returns the pairs of slots with the highest gain for the current kept blocks; (pairs, 2), each once."""
    apart = torch.stack([(s.stripe[:, None] != s.stripe).any(2) for s in layers]).any(0)  # other slots do not change
    promise = worth + worth.T - worth.diagonal()[:, None] - worth.diagonal()
    partner = promise.masked_fill_(~apart, -torch.inf).topk(_partners(layers), 1).indices
    slots = torch.arange(len(worth))[:, None].expand_as(partner)
    pairs = torch.stack([slots, partner], -1)[apart[slots, partner]].sort(1).values
    number = (pairs[:, 0] * len(worth) + pairs[:, 1]).sort().values
    number = number[torch.diff(number, prepend=number.new_tensor([-1])) != 0]
    return torch.stack([number // len(worth), number % len(worth)], 1)


def _partners(layers: Sequence[Stripes]) -> int:
    units = len(layers[0].values)
    return min(PARTNERS, max(4, TRIALS // (units * sum(layer.width for layer in layers))), units - 1)


def _gains(layer: Stripes, entry: int, over: Tensor, units: Tensor, pairs: Tensor) -> Tensor:
    """Returns by how much each swap raises the sum of block scores above the threshold."""
    values, stripe, each = layer.values[:, entry], layer.stripe[:, entry], over.clamp_min(0).sum(1)
    found = [torch.zeros(0)]
    for some in torch.split(pairs, max(1, CHUNK // values.shape[1])):
        first, second = stripe[some[:, 0]], stripe[some[:, 1]]
        moved = values[units[some[:, 1]]] - values[units[some[:, 0]]]
        after = (over[first] + moved).clamp_min_(0).sum(1) + (over[second] - moved).clamp_min_(0).sum(1)
        found.append(torch.where(first == second, 0.0, after - each[first] - each[second]))
    return torch.cat(found)
