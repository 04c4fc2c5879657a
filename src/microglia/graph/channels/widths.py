"""Widths: the number of units that each group keeps for a budget.

All removals are put in one order, each step a few units of one group. Every cost falls along this order, so a budget is a
position in it, found by bisection.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from microglia.core.budget import Budget
from microglia.core.errors import BudgetError
from microglia.graph.channels.groups import ChannelGroup, Member
from microglia.graph.cutting.parts import Part
from microglia.graph.dims.atoms import Dim

WidthScope = Literal["uniform", "global"]
Counts = dict[int, int]
"""Atom -> units kept."""

Milliseconds = Callable[[Counts], float]

TOLERANCE = 0.01
"""Largest deviation from a budget, as a fraction of it."""
BELOW = {"ms": 0.05}
"""How far the term may be below its budget, where that is more: repeated timings of one model differ by a few percent."""


@dataclass(frozen=True)
class Step:
    """A removal of some units of a group, those with the lowest remaining scores."""

    atom: int
    units: int


@dataclass(frozen=True)
class Widths:
    """The chosen widths.

    Attributes:
        counts: Atom -> units kept.
        got: Budget term -> its reached value (fractions, milliseconds).
        round_to: The rounding that was used; it is lowered if a budget would be missed.
        notes: Deviations from the request, with the reasons.
    """

    counts: Counts
    got: dict[str, float]
    round_to: int
    notes: tuple[str, ...] = ()


class Costs:
    """Parameters and multiply-accumulates of a model as functions of its widths.

    Args:
        parts: The traced parts of the model.
        groups: The groups that may change.
        parameters: Parameters of the whole model.
    """

    def __init__(self, parts: Sequence[Part], groups: Sequence[ChannelGroup], parameters: int) -> None:
        self.groups, self.units = groups, sum(g.rows * g.size for g in groups)
        self._count = parts[0].analysis.algebra.count
        self._parameters: list[Sequence[Dim]] = []
        self._macs: list[tuple[int, Sequence[Dim]]] = []
        for part in parts:
            unique = {id(t): name for name, t in part.analysis.trace.tensors.items() if isinstance(t, nn.Parameter)}
            self._parameters += [part.analysis.parameter_dims[name] for name in unique.values()]
            self._macs += [(part.weight, dims) for dims in part.analysis.macs.values()]
        self._untraced = 0
        self._untraced = parameters - self.parameters({})
        self.dense = {"params": self.parameters({}), "flops": self.macs({})}

    def _product(self, dims: Sequence[Dim], counts: Mapping[int, int]) -> int:
        return math.prod(self._count(d, counts) for d in dims)

    def parameters(self, counts: Mapping[int, int]) -> int:
        """Returns the remaining parameters, including those outside the traced parts."""
        return self._untraced + sum(self._product(dims, counts) for dims in self._parameters)

    def macs(self, counts: Mapping[int, int]) -> int:
        """Returns the remaining multiply-accumulates of the example batch."""
        return sum(weight * self._product(dims, counts) for weight, dims in self._macs)

    def fraction(self, term: str, counts: Mapping[int, int]) -> float:
        """Returns the remaining fraction of a budget's term."""
        if term == "density":
            return sum(g.rows * counts.get(g.atom, g.size) for g in self.groups) / self.units
        value = self.parameters(counts) if term == "params" else self.macs(counts)
        return value / max(1, self.dense[term])


def choose_widths(
    costs: Costs,
    groups: Sequence[ChannelGroup],
    budget: Budget,
    scores: Mapping[int, Tensor],
    *,
    scope: WidthScope = "uniform",
    round_to: int = 16,
    milliseconds: Milliseconds | None = None,
) -> Widths:
    """Returns the widths that meet a budget.

    Args:
        costs: Costs of the model.
        groups: Groups whose widths may change.
        budget: The budget; with several terms the tightest one binds.
        scores: Units' scores by atom. They rank removals within a group, and across groups under ``global``. If rows choose
            their own units, the rank is the mean over rows of the next removed unit.
        scope: ``uniform``: every group keeps the same fraction. ``global``: the units with the lowest normalized score are
            removed first.
        round_to: Entries per dimension are kept at multiples of this where the dimension is wide enough; halved until the
            budget is met within 1 %, a time within 5 % below it.
        milliseconds: Measured time of the model at given widths, for a budget in ms.

    Raises:
        BudgetError: Nothing can be pruned, or even the narrowest model is above the budget; for a time this is checked first.
    """
    if not groups:
        raise BudgetError(
            "The model has no channels that can be removed: they are inputs or outputs of it, excluded, or go through an "
            "operator without a rule."
        )
    if milliseconds is not None and budget.ms is not None:
        narrowest = {r: _counts(groups, _steps(groups, scores, scope, r)) for r in (round_to, 1)}
        _refuse_unreachable(budget.ms, narrowest.values(), milliseconds)
    while True:
        steps = _steps(groups, scores, scope, round_to)
        at = _place(costs, budget, steps, groups, milliseconds)
        counts = _counts(groups, steps[:at])
        got = _got(costs, budget, counts, milliseconds)
        if _met(budget, got) or round_to == 1:
            break
        round_to //= 2
    notes = [] if _met(budget, got) else [_explain(budget, got, at, len(steps))]
    if at == len(steps) and any(value > getattr(budget, term) * (1 + TOLERANCE) for term, value in got.items()):
        raise BudgetError(f"The budget ({budget}) cannot be met. {notes[0]}")
    return Widths(counts, got, round_to, tuple(notes))


def _refuse_unreachable(asked: float, narrowest: Iterable[Counts], milliseconds: Milliseconds) -> None:
    """Raises if even the narrowest models take too long: a search would time many candidates without success."""
    times = []
    for counts in narrowest:
        times.append(milliseconds(counts))
        if times[-1] <= asked * (1 + TOLERANCE):
            return
    raise BudgetError(
        f"The budget (ms {asked:g}) cannot be met: with every group at its narrowest the model takes {min(times):.3g} ms."
    )


def _met(budget: Budget, got: Mapping[str, float]) -> bool:
    """Tells whether no term exceeds its budget by more than 1 %, and the tightest is not below it by more (a time: 5 %)."""
    ratio, term = max((value / getattr(budget, term), term) for term, value in got.items())
    return bool(1 - BELOW.get(term, TOLERANCE) <= ratio <= 1 + TOLERANCE)


def _explain(budget: Budget, got: Mapping[str, float], at: int, steps: int) -> str:
    text = ", ".join(f"{term} {value:.4g} (asked {getattr(budget, term):.4g})" for term, value in got.items())
    if at == steps:
        return f"With every group at its narrowest the model has {text}."
    why = "a time does not fall with every unit" if "ms" in got else "one more unit of the next group would go past it"
    return f"The nearest widths found have {text}: {why}."


def _got(costs: Costs, budget: Budget, counts: Counts, milliseconds: Milliseconds | None) -> dict[str, float]:
    terms = [t for t in ("density", "params", "flops") if getattr(budget, t) is not None]
    got = {t: costs.fraction(t, counts) for t in terms}
    if budget.ms is not None and milliseconds is not None:
        got["ms"] = milliseconds(counts)
    return got


def _place(
    costs: Costs, budget: Budget, steps: Sequence[Step], groups: Sequence[ChannelGroup], milliseconds: Milliseconds | None
) -> int:
    """Returns the number of steps: for each term the nearest number, and the maximum of these."""
    places = []
    for term in ("density", "params", "flops", "ms"):
        target = getattr(budget, term)
        if target is None:
            continue

        def cost(at: int, term: str = term) -> float:
            counts = _counts(groups, steps[:at])
            if term != "ms":
                return costs.fraction(term, counts)
            assert milliseconds is not None
            return milliseconds(counts)

        at = bisect.bisect_left(range(len(steps) + 1), -target, key=lambda i: -cost(i))  # first position at or below the target
        at = min(at, len(steps))
        if term != "ms" and at > 0 and abs(cost(at - 1) - target) < abs(cost(at) - target):
            at -= 1
        places.append(at)
    return max(places)


def _counts(groups: Sequence[ChannelGroup], steps: Sequence[Step]) -> Counts:
    counts = {g.atom: g.size for g in groups}
    for step in steps:
        counts[step.atom] -= step.units
    return counts


def granularity(group: ChannelGroup, round_to: int) -> int:
    """Returns the number of units that a group loses at once, so that its dimensions stay multiples of ``round_to``.

    Narrow groups are rounded less, to at most a quarter of their width; otherwise nothing could be removed from them.
    """
    step = round_to // math.gcd(round_to, group.cofactor)
    while step > 1 and step > group.size // 4:
        step //= 2
    return max(1, step)


def _steps(groups: Sequence[ChannelGroup], scores: Mapping[int, Tensor], scope: WidthScope, round_to: int) -> list[Step]:
    """Returns all removals in order; each group keeps at least the units of one step, and at least one unit."""
    keyed: list[tuple[float, int, Step]] = []
    for group in groups:
        if group.size == 1:
            continue
        step = granularity(group, round_to)
        ranked = scores[group.atom].view(group.rows, -1).sort().values.mean(0) if scope == "global" else None
        removed, first, usual = 0, group.size % step or step, Step(group.atom, step)
        while group.size - removed > step:
            units = first if removed == 0 else step
            worth = (removed + units / 2) / group.size if ranked is None else float(ranked[removed : removed + units].mean())
            keyed.append((worth, len(keyed), usual if units == step else Step(group.atom, units)))
            removed += units
    for family in families([g for g in groups if g.size == 1]):
        ranked_units = sorted(family, key=lambda g: float(scores[g.atom]))[:-1]  # one step stays
        for rank, group in enumerate(ranked_units):
            place = (rank + 0.5) / len(family)
            keyed.append((place if scope == "uniform" else float(scores[group.atom]), len(keyed), Step(group.atom, 1)))
    if scope == "global":  # within a group the order is by rank, independent of the means
        return _monotone(keyed)
    return [step for _, _, step in sorted(keyed)]  # never compares the steps: the numbers are unique


def families(groups: Sequence[ChannelGroup]) -> list[list[ChannelGroup]]:
    """Returns families of single entries of the same dimensions: pieces of one dimension that shuffles cut."""
    found: list[tuple[set[Member], list[ChannelGroup]]] = []
    for group in groups:
        members, together, apart = set(group.members), [group], []
        for others, family in found:
            if others & members:
                members, together = members | others, family + together
            else:
                apart.append((others, family))
        found = [*apart, (members, together)]
    return [family for _, family in found]


def _monotone(keyed: Sequence[tuple[float, int, Step]]) -> list[Step]:
    highest: dict[int, float] = {}
    result = []
    for worth, number, step in keyed:
        highest[step.atom] = max(highest.get(step.atom, -math.inf), worth)
        result.append((highest[step.atom], number, step))
    return [step for _, _, step in sorted(result)]


def keep_units(scores: Mapping[int, Tensor], counts: Mapping[int, int]) -> dict[int, Tensor]:
    """Returns the units that stay, boolean by atom: those with the highest scores in each row; ties by position."""
    return {atom: highest(scores[atom], count) for atom, count in counts.items() if count < scores[atom].shape[-1]}


def highest(values: Tensor, count: int) -> Tensor:
    """Returns a boolean mask of the highest entries, a given number, along the last dimension; ties by position."""
    order = values.argsort(descending=True, stable=True)
    return torch.zeros(values.shape, dtype=torch.bool).scatter_(-1, order[..., :count], True)
