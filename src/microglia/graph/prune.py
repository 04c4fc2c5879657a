"""`prune_channels`: score coupled channels, choose widths that meet a budget, remove them, verify, return the smaller model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.auxiliary import counted_parameters
from microglia.core.budget import Budget
from microglia.core.layers import prunable_layers
from microglia.core.progress import progress_bar
from microglia.graph.channels.costs import Costs
from microglia.graph.channels.groups import (
    ChannelGroup,
    GroupReduction,
    channel_groups,
    excluded_tensors,
    group_scores,
    independent,
    scored_members,
)
from microglia.graph.channels.latency_table import TIMED_BY, LatencyTable
from microglia.graph.channels.request import ChannelRequest
from microglia.graph.channels.widths import Widths, WidthScope, choose_widths, highest, keep_units
from microglia.graph.cutting.cut import Cut, constants, counts
from microglia.graph.cutting.modules import NOTED, cut_module
from microglia.graph.cutting.parts import Part
from microglia.graph.cutting.plan import after, attach, plan_of
from microglia.graph.cutting.remove import Subject, remove
from microglia.graph.cutting.verify import ShrinkError
from microglia.graph.dims.trace import arguments
from microglia.scores import Evidence, scores, values_filters
from microglia.scores.base import compact
from microglia.scores.checks import check_evidence


def prune_channels(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget,
    *,
    score: str | Mapping[str, Tensor] = "magnitude",
    reduction: GroupReduction = "l2",
    scope: WidthScope = "uniform",
    round_to: int = 16,
    exclude: Sequence[str] = (),
    within_groups: bool = False,
    keep_class: bool = False,
    dynamic: Sequence[int] = (0,),
    evidence: Evidence | None = None,
    executions: Sequence[str] = TIMED_BY,
    verified: bool = True,
) -> nn.Module:
    """Returns a physically smaller copy of a model: whole channels, heads and hidden units removed from all that use them.

    The outputs equal those of the model with these units masked; every value is verified in float64. Sums over a removed
    dimension run over what remains, which the plan's notes report. Tensors of an operator without a rule keep their size.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> small = prune_channels(model, torch.zeros(1, 8), Budget(density=0.5), round_to=1)
        >>> small[0]
        Linear(in_features=8, out_features=16, bias=True)

    Args:
        model: Any model that `torch.export` can trace; it stays unchanged.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.
        budget: The budget; `microglia.graph.channels.request.ChannelRequest` explains it and the keywords in full.
        score: Name of a score, or one value per weight by parameter name; higher = keep.
        reduction: How the values of a unit's weights, over all its members, become one.
        scope: ``uniform``: the same fraction of every group; ``global``: by normalized score across groups.
        round_to: Widths are kept at multiples of this if the budget allows; 1 for none.
        exclude: Selectors of layers that keep both their inputs and outputs; coupled channels stay too.
        within_groups: Whether to remove channels within each group of a grouped convolution or norm.
        keep_class: Whether to remove only channels that the user's own classes can lose, so that no graph is returned.
        dynamic: Dimensions of the inputs that may change later if the result is a graph.
        evidence: The data for the score.
        executions: Ways to time a budget in ``ms``, such as ``("openvino",)``.
        verified: Whether to compare every value with the masked model's; turn it off only in a search.

    Returns:
        The smaller model, in the same mode, carrying its `Plan`.

    Raises:
        BudgetError: The budget cannot be met.
        ShrinkError: The pruned model would differ from the masked one; nothing is returned.
        TraceError: The model cannot be traced.
        MicrogliaError: An argument is wrong; the text names it.
    """
    # fmt: off
    request = ChannelRequest(
        budget=budget, reduction=reduction, scope=scope, round_to=round_to, exclude=exclude, within_groups=within_groups,
        keep_class=keep_class, dynamic=dynamic, executions=executions, verified=verified,
    ).checked()
    # fmt: on
    return _Pruning.of_model(model, example_inputs, request, score, check_evidence(evidence, "prune_channels")).best()


Reach = Callable[[Part, ChannelGroup], bool]
"""Choices of groups to prune: a forward with fixed sizes permits only some cuts."""


@dataclass(frozen=True)
class _Pruning:
    """A request on one model; see `prune_channels`. To keep the user's class, several sets of groups are tried."""

    model: nn.Module
    subject: Subject
    elements: Mapping[str, Tensor]
    makers: bool
    request: ChannelRequest
    excluded: Collection[str]

    @staticmethod
    def of_model(
        model: nn.Module, inputs: Any, request: ChannelRequest, score: str | Mapping[str, Tensor], evidence: Evidence
    ) -> _Pruning:
        """Returns the request on a model, traced and scored."""
        subject = Subject.of(model, inputs, tuple(request.dynamic))
        elements = _elements(subject, score, evidence, signed=request.reduction == "l2")
        makers = isinstance(score, str) and values_filters(score)
        return _Pruning(model, subject, elements, makers, request, excluded_tensors(subject.model, request.exclude))

    def best(self) -> nn.Module:
        """Returns the smaller model with as many groups pruned as the request allows."""
        if not self.request.keep_class:
            return self.of(_all)
        for reach in (_all, _whole):
            with suppress(ShrinkError):
                return self.of(reach)
        return self.of(_followed)

    def of(self, reach: Reach) -> nn.Module:
        """Returns the smaller model; only the groups in reach lose units."""
        subject, by_part = self.subject, [self._free(part, reach) for part in self.subject.parts]
        groups, ranks = (
            list(chain.from_iterable(by_part)),
            _ranked(subject, by_part, self.elements, self.request.reduction, makers=self.makers),
        )
        chosen = [g for g in groups if g.atom in ranks]
        costs = Costs(subject.parts, chosen, counted_parameters(subject.model))
        widths = self._widths(costs, chosen, ranks)
        kept = never_empty(subject, keep_units(ranks, widths.counts), ranks)
        small = remove(subject, kept, keep_class=self.request.keep_class, verified=self.request.verified)
        plan = replace(
            plan_of(small),
            **totals(costs, kept, subject.unread(small)),
            found=len(groups),
            asked={term: value for term, value in asdict(self.request.budget).items() if value is not None},
            got={**widths.got, "round_to": widths.round_to},
            notes=(*plan_of(small).notes, *_notes(subject, widths, len(groups) - len(chosen))),
        )
        return attach(small, after(self.model, plan))

    def _free(self, part: Part, reach: Reach) -> list[ChannelGroup]:
        """Returns the groups of a part that may lose units, in reach."""
        groups = channel_groups(part.analysis, self.excluded, part.path)
        return [g for g in independent(part.analysis, groups, within=self.request.within_groups) if reach(part, g)]

    def _widths(self, costs: Costs, groups: Sequence[ChannelGroup], ranks: Mapping[int, Tensor]) -> Widths:
        """Returns the widths that meet the budget; for a budget in milliseconds models are timed."""
        asked = self.request
        choose = partial(choose_widths, costs, groups, asked.budget, ranks, scope=asked.scope, round_to=asked.round_to)
        if asked.budget.ms is None:
            return choose()
        timer = LatencyTable(self.subject.example, _candidates(self.subject, ranks), executions=asked.executions)
        with progress_bar("time candidate widths") as bar:

            def milliseconds(widths: Mapping[int, int]) -> float:
                bar.advance()
                return timer(widths)

            return choose(milliseconds=milliseconds)


def _all(part: Part, group: ChannelGroup) -> bool:
    return True


def _whole(part: Part, group: ChannelGroup) -> bool:
    """All groups except heads and convolution groups, which forwards seldom permit."""
    return not group.factor


def _followed(part: Part, group: ChannelGroup) -> bool:
    """Only groups that change no operator argument outside the layers' own attributes, such as hidden units."""
    cut = Cut(part.analysis, {group.atom: torch.arange(group.size) >= (group.size + 1) // 2})
    nodes = (n for n in part.analysis.trace.graph.nodes if n.op == "call_function")
    return _whole(part, group) and all(set(constants(cut, node)[1]) <= set(NOTED) for node in nodes)


def _ranked(
    subject: Subject,
    groups: Sequence[Sequence[ChannelGroup]],
    elements: Mapping[str, Tensor],
    reduction: GroupReduction,
    *,
    makers: bool,
) -> dict[int, Tensor]:
    """Returns the scores by atom, by part, for the groups whose weights have scores."""
    ranks: dict[int, Tensor] = {}
    for part, own in zip(subject.parts, groups, strict=True):
        local = {name: elements[part.name(name)] for name in part.analysis.parameter_dims if part.name(name) in elements}
        scored = [g for g in own if scored_members(part.analysis, g, local, makers=makers)]
        ranks.update(group_scores(part.analysis, scored, local, reduction, makers=makers))
    return ranks


def _elements(subject: Subject, score: str | Mapping[str, Tensor], evidence: Evidence, *, signed: bool) -> dict[str, Tensor]:
    """Returns one value per weight or per filter. By magnitude every matrix counts, layer of a known class or not.

    ``signed`` leaves magnitudes their signs, for a reduction that squares: the weights themselves then need no copy.
    """
    if not isinstance(score, str):
        return dict(score)
    if score == "magnitude":
        named = subject.model.named_parameters(remove_duplicate=False)
        matrices = {name: p.detach() for name, p in named if p.ndim > 1 and p.is_floating_point()}
        return matrices if signed else {name: weight.abs() for name, weight in matrices.items()}
    layers = prunable_layers(subject.model)
    values = scores[score](subject.model, layers, evidence)
    return {n: compact(layers[n], v) for n, v in values.items()} if values_filters(score) else values


def _candidates(subject: Subject, ranks: Mapping[int, Tensor]) -> Callable[[Mapping[int, int]], nn.Module]:
    """Returns a function that builds the model with given widths, unverified, for timing."""

    def build(widths: Mapping[int, int]) -> nn.Module:
        kept = keep_units(ranks, widths)
        args, kwargs = arguments(subject.example)
        try:
            small = cut_module(subject.model, *subject.changes(kept)).eval()
            with torch.no_grad():
                small(*args, **kwargs)
        except Exception:
            small = remove(subject, kept, verified=False).eval()
        return small

    return build


def never_empty(subject: Subject, kept: dict[int, Tensor], ranks: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Returns the kept units; if a dimension would be empty, its best unit is kept."""
    kept = dict(kept)
    for part in subject.parts:
        algebra = part.analysis.algebra
        for dims in part.analysis.parameter_dims.values():
            for dim in dims:
                lost = [a for a in algebra.leaves(dim) if a in kept and not bool(kept[a].any())]
                if lost and algebra.count(dim, counts(kept)) == 0:
                    best = max(lost, key=lambda a: float(ranks[a].max()))
                    kept[best] = highest(ranks[best], 1)
    return kept


def _notes(subject: Subject, widths: Widths, unscored: int) -> list[str]:
    notes = list(widths.notes)
    for part in subject.parts:
        notes += part.analysis.warnings()[:3]
        notes += [f"No rule for the operator {name}: what it touches is kept." for name in part.analysis.unknown]
    if len(subject.parts) > 1 or subject.parts[0].path:
        notes.append("The model cannot be traced whole; pruned within " + ", ".join(p.path for p in subject.parts) + ".")
    return notes + ([f"{unscored} groups have no scored weight and are kept."] if unscored else [])


def totals(costs: Costs, kept: Mapping[int, Tensor], unread: int = 0) -> dict[str, Any]:
    """Returns parameters and MACs of the example batch before and after, and the number of groups that lost units.

    ``unread`` counts the parameters that the smaller model does not hold at all.
    """
    left = counts(kept)
    return {
        "parameters": (costs.parameters({}), costs.parameters(left) - unread),
        "macs": (costs.macs({}), costs.macs(left)),
        "pruned": len(kept),
    }
