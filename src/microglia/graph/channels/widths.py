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
from torch import Tensor

from microglia.core.budget import Budget
from microglia.core.errors import BudgetError
from microglia.graph.channels.costs import Costs, Counts
from microglia.graph.channels.groups import ChannelGroup, Member

WidthScope = Literal["uniform", "global"]
Milliseconds = Callable[[Counts], float]

TOLERANCE = 0.01
"""Largest deviation from a budget, as a fraction of it."""
DEVIATION = 0.2
"""Largest mean difference of the groups' kept fractions that rounding may make.

Networks that run faster with widths of 16 lie below it (YOLOv5n, EfficientNet-B0: up to 0.14). ResNet-56, whose wide groups
would pay for the narrow ones, lies above it (0.24).
"""
BELOW = {"ms": 0.05}
"""How far the term may be below its budget, where that is more: repeated timings of one model differ by a few percent."""

LEFT = 0.1
"""Part of the time that channels can save below which a budget in milliseconds is noted: it leaves hardly any channels."""


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
        round_to: Entries per dimension are kept at multiples of this; narrower groups at multiples of its largest half that
            fits. Halved until the budget is met within 1 %, a time within 5 % below it, and the groups keep nearly the
            fractions that they keep without rounding.
        milliseconds: Measured time of the model at given widths, for a budget in ms.

    Raises:
        BudgetError: Nothing can be pruned, or even the narrowest model is above the budget; for a time this is checked first.
    """
    if not groups:
        raise BudgetError(
            "The model has no channels that can be removed: they are inputs or outputs of it, excluded, or go through an "
            "operator without a rule."
        )
    search = _Search(costs, groups, budget, scores, scope, milliseconds)
    floor = []
    if milliseconds is not None and budget.ms is not None:
        narrowest = (_counts(groups, search.steps(r)) for r in (round_to, 1))
        floor = _floor(budget.ms, narrowest, milliseconds, _counts(groups, ()))
    while True:
        steps = search.steps(round_to)
        at = search.place(steps)
        counts = _counts(groups, steps[:at] if budget.ms is not None else search.fitted(steps, at))
        got = search.got(counts)
        if round_to == 1 or (_met(budget, got) and not search.distorted(round_to, counts)):
            break
        round_to //= 2
    notes = [] if _met(budget, got) else [_explain(budget, got, at, len(steps))]
    if at == len(steps) and any(value > getattr(budget, term) * (1 + TOLERANCE) for term, value in got.items()):
        raise BudgetError(f"The budget ({budget}) cannot be met. {notes[0]}")
    return Widths(counts, got, round_to, (*notes, *floor))


@dataclass(frozen=True)
class _Search:
    """The arguments of `choose_widths`; removals in order, and the place of the budget among them."""

    costs: Costs
    groups: Sequence[ChannelGroup]
    budget: Budget
    scores: Mapping[int, Tensor]
    scope: WidthScope
    milliseconds: Milliseconds | None

    def steps(self, round_to: int) -> list[Step]:
        """Returns all removals in order."""
        return _steps(self.groups, self.scores, self.scope, round_to)

    def got(self, counts: Counts) -> dict[str, float]:
        """Returns the reached value of each term of the budget."""
        terms = [t for t in ("density", "params", "flops") if getattr(self.budget, t) is not None]
        got = {t: self.costs.fraction(t, counts) for t in terms}
        if self.budget.ms is not None and self.milliseconds is not None:
            got["ms"] = self.milliseconds(counts)
        return got

    def place(self, steps: Sequence[Step]) -> int:
        """Returns the number of steps: for each term the nearest number, and the maximum of these."""
        places = []
        for term in ("density", "params", "flops", "ms"):
            target = getattr(self.budget, term)
            if target is None:
                continue

            def cost(at: int, term: str = term) -> float:
                counts = _counts(self.groups, steps[:at])
                if term != "ms":
                    return self.costs.fraction(term, counts)
                assert self.milliseconds is not None
                return self.milliseconds(counts)

            at = bisect.bisect_left(range(len(steps) + 1), -target, key=lambda i: -cost(i))  # the first at or below the target
            at = min(at, len(steps))
            if term != "ms" and at > 0 and abs(cost(at - 1) - target) < abs(cost(at) - target):
                at -= 1
            places.append(at)
        return max(places)

    def fitted(self, steps: Sequence[Step], at: int) -> Sequence[Step]:
        """Returns the first ``at`` steps; where these miss the budget, fewer of them and one more of some groups that meet it.

        So coarse rounding stays possible where single steps are worth more than the tolerance.
        """

        def ratio(taken: Sequence[Step]) -> float:
            got = self.got(_counts(self.groups, taken))
            return float(max(value / getattr(self.budget, term) for term, value in got.items()))

        if abs(ratio(steps[:at]) - 1) <= TOLERANCE:
            return steps[:at]
        above = bisect.bisect_right(range(at), -1 - TOLERANCE, key=lambda i: -ratio(steps[: i + 1]))
        taken, tried = list(steps[:above]), set()
        for step in steps[above:]:
            if step.atom in tried:  # one more step of a group at most: the groups keep about the fraction of the scope
                continue
            tried.add(step.atom)
            if (found := ratio([*taken, step])) >= 1 - TOLERANCE:
                taken.append(step)
                if found <= 1 + TOLERANCE:
                    return taken
        return steps[:at]

    def distorted(self, round_to: int, counts: Counts) -> bool:
        """Tells whether narrow groups, which rounding leaves whole, make the others pay too much for the budget."""
        if self.budget.ms is not None or all(4 * granularity(group, round_to) <= group.size for group in self.groups):
            return False
        steps = self.steps(1)
        exact = _counts(self.groups, steps[: self.place(steps)])
        return sum(abs(counts[g.atom] - exact[g.atom]) / g.size for g in self.groups) > DEVIATION * len(self.groups)


def _floor(asked: float, narrowest: Iterable[Counts], milliseconds: Milliseconds, whole: Counts) -> list[str]:
    """Returns a note if hardly any of the time asked for is left for channels; ``whole`` are the widths before.

    Raises:
        BudgetError: Even the narrowest models take too long: a search would time many candidates without success.
    """
    times = []
    for counts in narrowest:
        times.append(milliseconds(counts))
        if times[-1] <= asked * (1 + TOLERANCE):
            break
    else:
        raise BudgetError(
            f"The budget (ms {asked:g}) cannot be met: with every group at its narrowest the model takes {min(times):.3g} ms."
        )
    dense, floor = milliseconds(whole), times[-1]
    if asked - floor >= LEFT * (dense - floor):
        return []
    return [
        f"The model takes {dense:.3g} ms, and {floor:.3g} ms with every group at its narrowest: a budget of {asked:g} ms "
        "leaves hardly any channels. Other executions may have less time that no channel can save: name them in executions."
    ]


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


def _counts(groups: Sequence[ChannelGroup], steps: Sequence[Step]) -> Counts:
    counts = {g.atom: g.size for g in groups}
    for step in steps:
        counts[step.atom] -= step.units
    return counts


def granularity(group: ChannelGroup, round_to: int) -> int:
    """Returns the number of units that a group loses at once, so that its dimensions stay multiples of ``round_to``.

    A group narrower than that is rounded to the largest half, quarter and so on that fits. So a group of ``round_to`` keeps
    its width: with AVX-512 ONNX Runtime computes 12 channels as 16, and reorders them before and after.
    """
    step = round_to // math.gcd(round_to, group.cofactor)
    while step > max(1, group.size):
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
