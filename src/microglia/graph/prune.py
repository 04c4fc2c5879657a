"""`prune_channels`: score coupled channels, choose widths that meet a budget, remove them, verify, return the smaller model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from microglia.core.budget import Budget
from microglia.core.layers import prunable_layers
from microglia.core.masks import fold
from microglia.graph.analysis import Analysis
from microglia.graph.cut import Cut
from microglia.graph.groups import GroupReduction, channel_groups, group_scores, independent
from microglia.graph.latency_table import LatencyTable
from microglia.graph.modules import attributes, cut_module, indices
from microglia.graph.plan import Kind, Plan, attach, graph_model, plan_of, shapes, write_example
from microglia.graph.trace import arguments, trace
from microglia.graph.verify import ShrinkError, Verification, difference, run_patched, verify
from microglia.graph.widths import Costs, Widths, WidthScope, choose_widths, keep_units
from microglia.scores import Evidence, scores

EXACT, SINGLE = 1e-9, 1e-4
"""Largest relative difference between the cut modules and the cut graph in float64, and to a graph traced in float32."""


@dataclass(frozen=True)
class Subject:
    """A model on its way through the house.

    Attributes:
        model: As given, masks folded (a copy).
        example: Example inputs as given.
        analysis: Of its twin in float64.
        dynamic: Dimensions of the inputs that a graph leaves free.
    """

    model: nn.Module
    example: Any
    analysis: Analysis
    dynamic: tuple[int, ...] = (0,)

    @staticmethod
    def of(model: nn.Module, example_inputs: Any, dynamic: Sequence[int] = (0,)) -> Subject:
        """Traces and analyses a folded copy of a model."""
        own = fold(deepcopy(model))
        double = trace(to_double(deepcopy(own)), to_double(example_inputs), dynamic=())
        return Subject(own, example_inputs, Analysis(double), tuple(dynamic))


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
    keep_class: bool = False,
    dynamic: Sequence[int] = (0,),
    evidence: Evidence | None = None,
    verified: bool = True,
) -> nn.Module:
    """Returns a physically smaller copy of a model: whole channels, heads and hidden units removed from all that use them.

    The outputs equal those of the model with these units masked, verified value by value in float64 before anything is
    returned. Norms and means over a removed dimension run over what is left. Inputs, outputs (the classes of a classifier)
    and everything an operator without a rule touches keep their size.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> small = prune_channels(model, torch.zeros(1, 8), Budget(density=0.5), round_to=1)
        >>> small[0]
        Linear(in_features=8, out_features=16, bias=True)

    Args:
        model: Any model `torch.export` can trace; it is left as it is.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.
        budget: What to keep: ``density`` of the channels, ``params``, ``flops``, ``ms`` per example batch on this machine, or
            several. Met within 1 %, or as near as the rounding allows: the plan's notes say.
        score: Name of a score, or one value per weight by parameter name; higher = keep.
        reduction: How the values of a unit's weights, over all its members, become one.
        scope: ``uniform``: the same fraction of every group; ``global``: by normalized score across groups.
        round_to: Widths are kept at multiples of this where wide enough; 1 for none.
        exclude: Globs over parameter or layer names whose groups stay whole.
        keep_class: Only what the user's own classes can follow; otherwise a model with sizes written into its forward
            comes back as its traced graph. `plan_of` tells which.
        dynamic: Dimensions of the inputs that may differ later where the result is a graph: the batch; (0, 2, 3) for images
            of any size.
        evidence: What the score may look at.
        verified: Whether to compare every value with the masked model's; turn off only to search.

    Returns:
        The smaller model, in the same mode, carrying its `Plan`.

    Raises:
        BudgetError: The budget cannot be met.
        ShrinkError: The pruned model would differ from the masked one; nothing is returned.
        TraceError: The model cannot be traced.
    """
    subject = Subject.of(model, example_inputs, dynamic)
    groups = independent(subject.analysis, channel_groups(subject.analysis, exclude))
    if keep_class:
        groups = [g for g in groups if not g.factor]
    elements = _elements(subject, score, evidence)
    scored = [g for g in groups if any(m.name in elements for m in g.members)]
    ranks = group_scores(subject.analysis, scored, elements, reduction)
    costs = Costs(subject.analysis, scored)
    timer = LatencyTable(subject.example, _candidates(subject, ranks)) if budget.ms is not None else None
    widths = choose_widths(costs, scored, budget, ranks, scope=scope, round_to=round_to, milliseconds=timer)
    cut = Cut(subject.analysis, keep_units(ranks, widths.counts))
    small = remove(subject, cut, keep_class=keep_class, verified=verified)
    return _noted(small, subject, cut, costs, budget=budget, widths=widths, left_out=len(groups) - len(scored))


def remove(subject: Subject, cut: Cut, *, keep_class: bool = False, verified: bool = True) -> nn.Module:
    """Returns the cut model: the user's own classes where they compute what the cut graph does, else the graph.

    Raises:
        ShrinkError: A value differs from the masked model's; or ``keep_class`` and the classes cannot follow.
    """
    checked = verify(cut) if verified else run_patched(cut)
    kept, changed = indices(cut), attributes(cut, subject.model)
    small, problem = _as_module(subject, cut, checked)
    kind: Kind = "module"
    if small is None:
        if keep_class:
            raise ShrinkError(f"{type(subject.model).__name__} cannot keep its class: {problem} Leave keep_class out.")
        small, kind = graph_model(subject.model, subject.example, kept, subject.dynamic), "graph"
        _compare_graph(small, cut, checked)
        small.train(subject.model.training)
    notes = (f"Returned as a graph: {problem}",) if problem else ()
    _carry_notes(subject.model, small)
    plan = Plan(
        kind, kept, changed, example=write_example(subject.example), dynamic=subject.dynamic, error=checked.error, notes=notes
    )
    return attach(small, replace(plan, shapes=shapes(subject.model, small)))


def _carry_notes(model: nn.Module, small: nn.Module) -> None:
    """What the house notes on a model, such as how it was built, holds for the smaller one too."""
    for name, value in vars(model).items():
        if name.startswith("microglia_"):
            object.__setattr__(small, name, value)


def _as_module(subject: Subject, cut: Cut, checked: Verification) -> tuple[nn.Module | None, str]:
    """Returns (the cut modules, or None, and why)."""
    try:
        small = cut_module(subject.model, indices(cut), attributes(cut, subject.model))
        outputs = model_outputs(to_double(deepcopy(small)), cut)
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        return None, f"its forward does not follow the cut ({first[0]})."
    if outputs_difference(outputs, checked.outputs) > EXACT:
        return None, "its forward runs on the cut tensors, but computes something else."
    return small, ""


@torch.no_grad()
def model_outputs(model: nn.Module, cut: Cut) -> list[Any]:
    """Returns a model's flat outputs on the inputs the cut's graph was traced with."""
    args, kwargs = pytree.tree_unflatten(list(cut.analysis.trace.example), cut.analysis.trace.in_spec)
    return pytree.tree_leaves(model.eval()(*args, **kwargs))


def _compare_graph(small: nn.Module, cut: Cut, checked: Verification) -> None:
    """Raises unless the graph that is returned, traced in the model's own precision, computes what was verified."""
    error = outputs_difference(model_outputs(to_double(deepcopy(small)), cut), checked.outputs)
    if error > SINGLE:
        raise ShrinkError(f"The graph in the model's own precision differs by {error:.1e} from the verified one.")


def outputs_difference(got: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Returns the largest relative difference of two flat outputs; infinite where they do not correspond."""
    if len(got) != len(wanted):
        return math.inf
    worst = 0.0
    for mine, theirs in zip(got, wanted, strict=True):
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            worst = max(worst, difference(mine.to(theirs), theirs) if mine.shape == theirs.shape else math.inf)
    return worst


def to_double(value: Any) -> Any:
    """Returns a module (changed in place) or nested inputs with every floating-point tensor in float64."""
    if isinstance(value, nn.Module):
        return value.double()
    return pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, value)


def _elements(subject: Subject, score: str | Mapping[str, Tensor], evidence: Evidence | None) -> dict[str, Tensor]:
    """Returns one value per weight. By magnitude every matrix counts, layer of a known class or not."""
    if not isinstance(score, str):
        return dict(score)
    if score == "magnitude":
        named = subject.model.named_parameters(remove_duplicate=False)
        return {name: p.detach().abs() for name, p in named if p.ndim > 1 and p.is_floating_point()}
    return scores[score](subject.model, prunable_layers(subject.model), evidence or Evidence())


def _candidates(subject: Subject, ranks: Mapping[int, Tensor]) -> Callable[[Mapping[int, int]], nn.Module]:
    """Returns what builds the model of given widths, unverified, to time it."""

    def build(counts: Mapping[int, int]) -> nn.Module:
        cut = Cut(subject.analysis, keep_units(ranks, counts))
        args, kwargs = arguments(subject.example)
        try:
            small = cut_module(subject.model, indices(cut), attributes(cut, subject.model)).eval()
            with torch.no_grad():
                small(*args, **kwargs)
        except Exception:
            small = graph_model(subject.model, subject.example, indices(cut))
        return small

    return build


def _noted(
    small: nn.Module, subject: Subject, cut: Cut, costs: Costs, *, budget: Budget, widths: Widths, left_out: int
) -> nn.Module:
    plan = plan_of(small)
    notes = [*plan.notes, *widths.notes, *subject.analysis.warnings()[:3]]
    notes += [f"No rule for {name}: what it touches is kept." for name in subject.analysis.unknown]
    notes += [f"{left_out} groups have no scored weight and are kept."] if left_out else []
    asked = {f.name: v for f in fields(budget) if (v := getattr(budget, f.name)) is not None}
    return attach(
        small,
        replace(
            plan,
            **totals(subject, cut, costs),
            found=len(costs.groups) + left_out,
            asked=asked,
            got={**widths.got, "round_to": widths.round_to},
            notes=tuple(notes),
        ),
    )


def totals(subject: Subject, cut: Cut, costs: Costs) -> dict[str, Any]:
    """Returns parameters and MACs of the example batch before and after, and how many groups lost units."""
    traced = next((v.shape[0] for v in cut.analysis.trace.example if isinstance(v, Tensor) and v.ndim), 1)
    given = next((v.shape[0] for v in pytree.tree_leaves(arguments(subject.example)) if isinstance(v, Tensor) and v.ndim), 1)
    share = max(1, traced // max(1, given))
    return {
        "parameters": (costs.parameters({}), costs.parameters(cut.counts)),
        "macs": (costs.macs({}) // share, costs.macs(cut.counts) // share),
        "pruned": len(cut.kept),
    }
