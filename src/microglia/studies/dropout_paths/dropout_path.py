"""A path between two networks that is built, not trained: each lets half of its units go, and the other's take their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from microglia.core.errors import MicrogliaError
from microglia.studies.dropout_paths.unit_chain import (
    Copied,
    Network,
    UnitChain,
    between,
    empty_units,
    move_outlets,
    put_outlets,
    put_units,
)
from microglia.studies.space.points import check_alike

Keep = Sequence[Tensor]
"""For each hidden layer the units that stay, int64, at most half of them."""
Kind = Literal["linear", "constant"]
"""``linear``: the last layer alone moves, so that a convex loss stays below the larger of both ends. ``constant``: only what
comes into units without outlet moves, or an outlet moves between two equal units, so that the outputs stay the same."""


@dataclass(frozen=True)
class DropoutPath:
    """Straight segments through way-points.

    Attributes:
        points: Way-points; they share the tensors they have in common, so do not write into them.
        kinds: Kind of each segment, one less than points.
    """

    points: tuple[Network, ...]
    kinds: tuple[Kind, ...]

    def at(self, place: float) -> dict[str, Tensor]:
        """Returns the network at a place in [0, 1], each segment taking the same share of it.

        Raises:
            MicrogliaError: The place is outside.
        """
        if not 0 <= place <= 1:
            raise MicrogliaError(f"A place on a path is in [0, 1]; got {place}.")
        number = min(int(place * len(self.kinds)), len(self.kinds) - 1)
        return self.within(number, place * len(self.kinds) - number)

    def within(self, segment: int, share: float) -> dict[str, Tensor]:
        """Returns the network at a share in [0, 1] of a segment."""
        return between(self.points[segment], self.points[segment + 1], share)


def keep_sets(chain: UnitChain, *, seed: int = 0, share: float = 0.5) -> list[Tensor]:
    """Returns for each hidden layer drawn units to keep, in ascending order; the same for the same seed.

    Args:
        chain: The network's layers.
        seed: Root of the draw.
        share: Fraction of a layer's units to keep, in (0, 0.5], rounded down, but at least one unit.

    Raises:
        MicrogliaError: The share is out of range, or a layer has a single unit.
    """
    if not 0 < share <= 0.5:
        raise MicrogliaError(f"The share of units to keep is above 0 and at most 0.5, for the others need room; got {share}.")
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randperm(units, generator=generator)[: max(1, int(share * units))] for units in chain.hidden]
    keep = [draw.sort().values for draw in draws]
    check_keep(chain, keep)
    return keep


def check_keep(chain: UnitChain, keep: Keep) -> None:
    """Raises unless every hidden layer keeps at least one and at most half of its units, each named once."""
    if len(keep) != len(chain.hidden):
        raise MicrogliaError(f"There are {len(keep)} keep sets for {len(chain.hidden)} hidden layers; expected one for each.")
    for number, (units, kept) in enumerate(zip(chain.hidden, keep, strict=True)):
        if not 1 <= len(kept) <= units // 2:
            raise MicrogliaError(
                f"Hidden layer {number + 1} keeps {len(kept)} of {units} units; expected 1 to {units // 2}: the other half is "
                "the room in which the path rebuilds the network."
            )
        if len(set(kept.tolist())) < len(kept) or not 0 <= int(kept.min()) <= int(kept.max()) < units:
            raise MicrogliaError(
                f"Hidden layer {number + 1} keeps {kept.tolist()}; expected different units of 0 to {units - 1}."
            )


def dropped(
    network: Network, chain: UnitChain, keep: Keep, from_layer: int = 0, rescale: float | None = None
) -> dict[str, Tensor]:
    """Returns the network with dropped units from one hidden layer on (theta_i): they are silent, the kept ones louder.

    The output of a kept unit is multiplied where it is consumed, after batch norm and activation; that of a dropped one is
    zero, and so is what comes into it.

    Args:
        network: Stays as it is.
        chain: Its layers.
        keep: Units to keep.
        from_layer: First hidden layer that drops units, from 0 (theta_1 of the source) to the last.
        rescale: Factor of what leaves kept units; None for all units over kept ones, of each layer.

    Source: Kuditipudi et al. 2019, "Explaining landscape connectivity of low-cost solutions for multilayer nets",
    definition 1; survey 2.2.
    """
    check_keep(chain, keep)
    here = dict(network)
    for layer in range(from_layer, len(chain.hidden)):
        kept, units, outlet = keep[layer], chain.hidden[layer], chain.layers[layer + 1].weight
        here = put_outlets(here, chain, layer, kept, Copied(here, kept))
        here[outlet] = here[outlet] * (units / len(kept) if rescale is None else rescale)
        here = empty_units(here, chain, layer, outside(units, kept))
    return here


def outside(units: int, *kept: Tensor) -> Tensor:
    """Returns the units of a layer that are in none of the sets, ascending."""
    free = torch.ones(units, dtype=torch.bool)
    for some in kept:
        free[some.cpu()] = False
    return free.nonzero().squeeze(1)


@torch.no_grad()
def dropout_path(
    chain: UnitChain,
    ends: tuple[Network, Network],
    keeps: tuple[Keep, Keep],
    rescale: float | tuple[float, float] | None = None,
) -> DropoutPath:
    """Returns the path between two networks of one architecture.

    On it a loss that is convex in the outputs is never above the largest of both ends and of all their `dropped` networks,
    with batch norm in evaluation mode. It has 2 + 5(d - 2) segments a side and at most 3 + 3(d - 1) in the middle, for d
    weight layers.

    Args:
        chain: The layers of both.
        ends: The two networks; the first and the last way-point are they, bit for bit.
        keeps: Their units to keep.
        rescale: See `dropped`; two for two.

    Raises:
        MicrogliaError: The ends are not alike, or a layer keeps more than half of its units.

    Source: Kuditipudi et al. 2019, theorem 1; survey 2.2.
    """
    check_alike(*ends)
    factors = rescale if isinstance(rescale, tuple) else (rescale, rescale)
    one, other = (_Way.down(chain, *side) for side in zip(ends, keeps, factors, strict=True))
    across = _Way([one.points[-1]], [])
    across.cross(chain, other.points[-1], *keeps)
    points = (*one.points, *across.points[1:-1], *reversed(other.points))  # across ends in the same values
    return DropoutPath(points, (*one.kinds, *across.kinds, *reversed(other.kinds)))


@dataclass
class _Way:
    """Way-points under construction."""

    points: list[Network]
    kinds: list[Kind]

    def to(self, point: Network, kind: Kind) -> Network:
        """Adds a segment."""
        self.points.append(point)
        self.kinds.append(kind)
        return point

    @classmethod
    def down(cls, chain: UnitChain, network: Network, keep: Keep, rescale: float | None) -> _Way:
        """From a network to itself with dropped units in all layers, from the last layer to the first."""
        way, last = cls([network], []), len(chain.hidden) - 1
        goals = [dropped(network, chain, keep, layer, rescale) for layer in range(last + 1)]
        way.to({**network, **{name: goals[last][name] for name in chain.top.tensors}}, "linear")
        way.to(goals[last], "constant")
        for layer in reversed(range(last)):
            way.one_layer(chain, goals[layer], keep, layer)
        return way

    def one_layer(self, chain: UnitChain, goal: Network, keep: Keep, layer: int) -> None:
        """Five segments after which one more layer has dropped units: the layers after it are rebuilt in the free half."""
        here, last = self.points[-1], len(chain.hidden) - 1
        above = range(layer + 1, last + 1)
        spare = {j: outside(chain.hidden[j], keep[j])[: len(keep[j])] for j in above}
        for j in above:  # the first of them hears all of the layer before, for that one is not rebuilt
            heard = None if j == layer + 1 else (spare[j - 1], keep[j - 1])
            here = put_units(here, chain, j, spare[j], Copied(goal, keep[j], heard))
        here = self.to(here, "constant")
        here = self.to(put_outlets(here, chain, last, spare[last], Copied(goal, keep[last])), "linear")
        for j in above:
            here = put_units(here, chain, j, keep[j], Copied(goal, keep[j]))
        here = self.to(here, "constant")
        self.to(put_outlets(here, chain, last, keep[last], Copied(goal, keep[last])), "constant")  # both halves are equal
        self.to(goal, "constant")

    def cross(self, chain: UnitChain, goal: Network, keep: Keep, coming: Keep) -> None:
        """From one network with dropped units in all layers to the other's: it is built in free places, then goes home."""
        here, last = self.points[-1], len(chain.hidden) - 1
        places = [_places(units, kept, new) for units, kept, new in zip(chain.hidden, keep, coming, strict=True)]
        for j, place in enumerate(places):
            here = put_units(here, chain, j, place, Copied(goal, coming[j], (places[j - 1], coming[j - 1]) if j else None))
        here = self.to(here, "constant")
        here = put_outlets(here, chain, last, places[last], Copied(goal, coming[last]))
        here = self.to({**here, **{name: goal[name] for name in chain.top.others}}, "linear")
        for j, kept in enumerate(keep):
            here = empty_units(here, chain, j, kept)
        here = self.to(here, "constant")
        for j, place in enumerate(places):
            homeless = place != coming[j]
            if homeless.any():
                source, home = place[homeless], coming[j][homeless]
                here = self.to(put_units(here, chain, j, home, Copied(here, source)), "constant")
                here = self.to(move_outlets(here, chain, j, home, source), "constant")
                here = self.to(empty_units(here, chain, j, source), "constant")


def _places(units: int, kept: Tensor, coming: Tensor) -> Tensor:
    """Returns where coming units live first: at home, unless somebody kept lives there; then where neither has a unit."""
    places, free = coming.clone(), outside(units, kept, coming)
    taken = torch.isin(coming, kept)
    places[taken] = free[: int(taken.sum())].to(coming)
    return places
