"""`shrink`: from masks to a smaller model. What a masked channel still adds is settled first, so that it can go.

A weight mask zeroes a channel's filter, but its bias and its norm's shift survive: the channel is a constant, not zero.
A constant can be folded into the biases of the layers that read it, exactly where these do not pad with zeros (survey 0.7).
"""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from microglia.graph.channels.groups import ChannelGroup, channel_groups, entry_rows
from microglia.graph.channels.widths import Costs, highest
from microglia.graph.cutting.cut import Cut
from microglia.graph.cutting.modules import indices, kept_units
from microglia.graph.cutting.parts import Part, double_copy
from microglia.graph.cutting.plan import after, attach, give_biases, plan_of
from microglia.graph.cutting.reference import Reference
from microglia.graph.cutting.remove import EXACT, Subject, model_outputs, noise, outputs_difference, remove
from microglia.graph.cutting.verify import ShrinkError
from microglia.graph.dims.analysis import Analysis, Consumer
from microglia.graph.dims.nodes import named_arguments, operator_name
from microglia.graph.prune import totals


def shrink(model: nn.Module, example_inputs: Any, *, clear: bool = False, keep_class: bool = False) -> nn.Module:
    """Returns a smaller copy of a masked model, with the channels gone that the masks removed whole.

    A channel goes when every weight that makes it is masked (of a residual stream: every layer that adds to it). What its
    bias or norm still adds is folded into the layers that read it. Where that is not exact, behind zero padding, the channel
    stays and the plan's notes say how many did; so does what a group of a convolution has masked beyond the others.

    Args:
        model: With masks attached or folded; it is left as it is.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.
        clear: Set the surviving biases and norm shifts of masked channels to zero first: every masked channel can go, as
            many as all groups of a convolution have, and the result equals the model so completed, not the one whose
            weights alone were masked.
        keep_class: Only what the user's own classes can follow; see `prune_channels`.

    Returns:
        The smaller model, in the same mode, carrying its `Plan`. Without a whole masked channel, a folded copy.

    Raises:
        ShrinkError: The shrunk model would differ from the masked one; nothing is returned.
        TraceError: The model cannot be traced.
    """
    subject, found = Subject.of(model, example_inputs), _Found()
    for part in subject.parts:
        own = [g for g in channel_groups(part.analysis) if not g.renormalized and not (keep_class and g.factor)]
        _look(part, own, found, fold=not clear)
    if not found.kept:
        warnings.warn(f"Nothing to remove: {_why(found)}; the model stays as large as it is.", stacklevel=2)
    ready = _with_biases(subject.model, found.biases)
    settled = Subject.of(_silenced(ready, found.over) if clear else ready, subject.example)
    again = _same_units(subject, settled, found.kept)
    if not clear:
        _check_settled(subject, settled, again)
    small = remove(settled, again, keep_class=keep_class)
    plan = plan_of(small)
    given = tuple(name for name in found.biases if subject.model.get_submodule(name).bias is None)
    costs = Costs(subject.parts, found.groups, sum(p.numel() for p in subject.model.parameters()))
    before, remaining = (total := totals(costs, found.kept, settled.unread(small)))["parameters"]
    total["parameters"] = before, remaining + sum(small.get_parameter(f"{name}.bias").numel() for name in given)
    plan = replace(plan, **total, biases=given, found=len(found.groups), notes=(*subject.notes, *plan.notes, *_notes(found)))
    return attach(small, after(model, plan))


@dataclass
class _Found:
    """What the masks of a model leave.

    Attributes:
        groups: That could lose units.
        kept: Which units stay.
        biases: What to add to the biases of layers that read removed channels.
        masked: How many units the masks removed whole.
        stay: Of these that cannot go, by reason.
        over: Those that could, but are more than the other groups of a convolution have masked.
    """

    groups: list[ChannelGroup] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    masked: int = 0
    stay: Counter[str] = field(default_factory=Counter)
    over: list[tuple[Part, ChannelGroup, Tensor]] = field(default_factory=list)


def _why(found: _Found) -> str:
    if found.masked:
        return f"the masks remove {found.masked:,} whole channels, and none of them can go"
    return "no mask removes a whole channel (unstructured and block masks rarely do; pattern='channel' does)"


def _look(part: Part, groups: Sequence[ChannelGroup], found: _Found, *, fold: bool) -> None:
    """Adds what the masks leave of a part."""
    dead = {g.atom: alive for g in groups if not bool((alive := _alive(part.analysis, g)).all())}
    found.masked += sum(int((~alive).sum()) for alive in dead.values())
    if fold:
        found.biases.update({part.name(name): delta for name, delta in _fold_constants(part, dead, found.stay).items()})
    even = _evened(dead)
    cut = Cut(part.analysis, even)
    found.over += [(part, g, _left(cut, g, dead[g.atom])) for g in groups if g.atom in dead and g.rows > 1]
    found.kept.update({atom: alive for atom, alive in even.items() if not bool(alive.all())})
    found.groups += groups


def _same_units(subject: Subject, settled: Subject, kept: dict[int, Tensor]) -> dict[int, Tensor]:
    """Returns the kept units of the masked model by the atoms of the settled one, where new biases say nothing."""
    again: dict[int, Tensor] = {}
    for part, (_, cut) in zip(settled.parts, subject.cuts(kept), strict=True):
        new = [name for name in part.analysis.parameter_dims if name not in cut.analysis.parameter_dims]
        again.update(kept_units(part.analysis, indices(cut), without=new))
    return again


def _left(cut: Cut, group: ChannelGroup, alive: Tensor) -> Tensor:
    """Returns the dead units that a cut leaves, boolean (rows, size): their row stays, and needs as many as the others."""
    analysis, left = cut.analysis, torch.zeros(alive.numel(), dtype=torch.bool)
    for member in group.members:
        dim = analysis.entries(member.name, member.dim)
        place = analysis.algebra.coordinate(dim, group.atom, group.rows)
        left[place[cut.mask(dim) & (place >= 0)]] = True
    return left.view_as(alive) & ~alive


@torch.no_grad()
def _silenced(model: nn.Module, silent: Sequence[tuple[Part, ChannelGroup, Tensor]]) -> nn.Module:
    """Sets what dead units that stay still add to zero, their biases and the affine parameters of norms; returns the model."""
    held = dict(model.named_parameters(remove_duplicate=False))
    for part, group, units in silent:
        for member in group.members:
            parameter = held.get(part.name(member.name))
            if parameter is not None and parameter.ndim == 1:
                place = part.analysis.algebra.coordinate(part.analysis.entries(member.name, 0), group.atom, group.rows)
                parameter[((place >= 0) & units.flatten()[place.clamp_min(0)]).to(parameter.device)] = 0
    return model


def _notes(found: _Found) -> list[str]:
    if found.masked == 0:
        return ["No channel is masked whole, so nothing was removed; mask with the pattern 'channel'."]
    over = sum(int(units.sum()) for _, _, units in found.over)
    notes = [f"{over} masked channels stay: the groups of a convolution or norm have to keep equally many."] if over else []
    if not found.stay:
        return notes
    reasons = "; ".join(f"{count} because {reason}" for reason, count in found.stay.items())
    return [
        *notes,
        f"{found.stay.total()} of {found.masked} masked channels stay, for what they still add cannot be folded into a bias: "
        f"{reasons}. shrink(..., clear=True) sets what they add to zero and removes them.",
    ]


def _alive(analysis: Analysis, group: ChannelGroup) -> Tensor:
    """Returns which units some weight still makes, at least one; (rows, size) where rows choose for themselves."""
    alive = torch.zeros(group.rows * group.size, dtype=torch.bool)
    makers = [m for m in group.members if (m.name, m.dim) in analysis.producers]
    for member in makers:
        made = entry_rows(analysis, member, analysis.trace.tensors[member.name].detach()).count_nonzero(1) > 0
        place = analysis.algebra.coordinate(analysis.entries(member.name, member.dim), group.atom, group.rows)
        alive[place[made.cpu() & (place >= 0)]] = True
    if not makers:
        alive[:] = True
    if not bool(alive.any()):
        alive[0] = True
    return alive if group.rows == 1 else alive.view(group.rows, -1)


def _evened(alive: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Returns what stays if rows that choose for themselves keep equally many: as many as the one that needs most."""
    return {a: highest(units.byte(), int(units.sum(-1).max())) if units.ndim > 1 else units for a, units in alive.items()}


# ------------------------------------------------------------------------------------------------------------- constants
@torch.no_grad()
def _fold_constants(part: Part, kept: dict[int, Tensor], stay: Counter[str]) -> dict[str, Tensor]:
    """Returns what to add to the biases of layers that read removed channels; channels that cannot be folded are kept.

    ``kept`` is changed: it gets back the units whose value is not one constant, or is read through zero padding. ``stay``
    counts them by reason.
    """
    while True:
        found = list(_constants(part.analysis, Cut(part.analysis, _evened(kept))))
        stubborn = [(consumer, values, why) for consumer, values in found if (why := _obstacle(part, consumer, values))]
        if not stubborn:
            break
        for consumer, values, why in stubborn:
            stay[why] += _give_back(part.analysis, consumer, values, kept)
    biases: dict[str, Tensor] = {}
    for consumer, values in found:
        if bool(values.any()):
            name = consumer.weight.rpartition(".")[0]
            delta = _contribution(part.analysis, consumer, values)
            biases[name] = biases[name] + delta if name in biases else delta
    return biases


def _constants(analysis: Analysis, cut: Cut) -> Iterator[tuple[Consumer, Tensor]]:
    """Yields for each weight that reads removed channels their values: 0 for those kept, NaN for those not constant.

    Infinity stands for those that are no numbers in the masked model itself.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = analysis.trace.example
    other = tuple(noise(v, generator) for v in inputs)
    consumers = [c for c in analysis.consumers if cut.changes(analysis.dims[c.source][c.dim])]
    first, second = (_values(analysis, consumers, given) for given in (inputs, other))
    for consumer in consumers:
        removed = ~cut.mask(analysis.dims[consumer.source][consumer.dim])
        rows = torch.cat([v[consumer].movedim(consumer.dim, 0).flatten(1) for v in (first, second)], 1)
        low, high = rows.aminmax(dim=1)
        constant = (high - low) <= 1e-12 * (1 + high.abs())
        values = torch.where(constant, rows[:, 0], torch.nan).masked_fill(~rows.isfinite().all(1), torch.inf)
        yield consumer, torch.where(removed.to(values.device), values, 0.0)


def _values(analysis: Analysis, consumers: Sequence[Consumer], inputs: tuple[Any, ...]) -> dict[Consumer, Tensor]:
    """Runs the graph and returns what each consumer reads, which operators in place may write after it was made."""
    held: dict[fx.Node, Tensor | None] = {consumer.source: None for consumer in consumers}
    found: dict[Consumer, Tensor] = {}
    for node, value in Reference(Cut(analysis, {})).walk(inputs):
        if node in held:
            held[node] = value
        for consumer in consumers:
            if consumer.node is node:
                found[consumer] = cast(Tensor, held[consumer.source]).clone()
    return found


def _obstacle(part: Part, consumer: Consumer, values: Tensor) -> str:
    """Returns why what removed channels are where a weight reads them cannot become part of a bias; empty if it can."""
    if bool(values.isinf().any()):
        return "the masked model itself makes them infinite or NaN, as a division by a zero does"
    if bool(values.isnan().any()):
        return f"they are not constant where {consumer.weight} reads them"
    if not bool(values.any()):
        return ""
    layer = part.module.get_submodule(consumer.weight.rpartition(".")[0])
    name = operator_name(consumer.node)
    if name not in ("linear", "conv1d", "conv2d", "conv3d") or not isinstance(layer, _WITH_BIAS):
        return f"{consumer.weight} is not the weight of a linear layer or convolution, which could take a bias"
    if name != "linear" and any(_numbers(named_arguments(consumer.node).get("padding"))):
        return f"they are constants that {consumer.weight} reads behind zero padding, where no bias equals them"
    return ""


_WITH_BIAS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def _numbers(padding: Any) -> list[Any]:
    return list(padding) if isinstance(padding, list | tuple) else [padding != "valid"]


def _give_back(analysis: Analysis, consumer: Consumer, values: Tensor, kept: dict[int, Tensor]) -> int:
    """Keeps the units that are not zero where a weight reads them; returns how many were to go until now."""
    before = sum(int(units.sum()) for units in kept.values())
    dim = analysis.dims[consumer.source][consumer.dim]
    entries = values.isnan() | (values != 0)
    for atom in set(analysis.algebra.leaves(dim)) & set(kept):
        rows = len(kept[atom]) if kept[atom].ndim > 1 else 1
        place = analysis.algebra.coordinate(dim, atom, rows)
        kept[atom].view(-1)[place[entries.cpu() & (place >= 0)]] = True
    return sum(int(units.sum()) for units in kept.values()) - before


def _contribution(analysis: Analysis, consumer: Consumer, values: Tensor) -> Tensor:
    """Returns what constant channels add to each output of a layer: the layer applied to them, where it does not pad."""
    weight = analysis.trace.tensors[consumer.weight].detach()
    if weight.ndim == 2:
        return nn.functional.linear(values, weight)
    rank = weight.ndim - 2
    image = values.view(1, -1, *[1] * rank).expand(1, -1, *weight.shape[2:])
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[rank - 1]
    return convolve(image, weight, groups=named_arguments(consumer.node)["groups"]).flatten()


@torch.no_grad()
def _with_biases(model: nn.Module, biases: Mapping[str, Tensor]) -> nn.Module:
    """Returns a copy whose layers carry what the channels they lose added."""
    model = deepcopy(model)
    give_biases(model, tuple(biases))
    for name, delta in biases.items():
        bias = cast(nn.Linear, model.get_submodule(name)).bias
        bias.add_(delta.to(bias))
    return model


@torch.no_grad()
def _check_settled(subject: Subject, settled: Subject, kept: Mapping[int, Tensor]) -> None:
    """Raises unless the settled model without its removed channels computes what the masked one does."""
    for part, (now, cut) in zip(subject.parts, settled.cuts(kept), strict=True):
        before = Cut(part.analysis, {})
        inputs = part.analysis.trace.example
        wanted = _outputs(before, inputs) if part.narrow else model_outputs(double_copy(part.module), before)
        error = outputs_difference(_outputs(cut, inputs), wanted)
        single = part.narrow or any(p.dtype != torch.float64 for p in now.module.parameters())
        if error > (1e-5 if single else EXACT):  # biases were added in the model's own precision
            raise ShrinkError(
                f"The masked channels of {part.path or 'the model'} add something that no bias can carry: without them the "
                f"outputs change by {error:.1e}. shrink(..., clear=True) sets what they add to zero and removes them."
            )


def _outputs(cut: Cut, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns what the graph returns with the removed channels zero."""
    last = deque(Reference(cut).walk(inputs), maxlen=1)
    return last.pop()[1]  # type: ignore[no-any-return]
