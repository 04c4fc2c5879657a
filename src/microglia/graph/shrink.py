"""`shrink`: from masks to a smaller model, in four steps.

1. Find the units that the masks leave, and what the masked ones still add (`microglia.graph.constants`). 2. Settle the
model: fold what removed channels add into biases, or set it to zero with ``clear``. 3. Check that the settled model without its
removed channels computes what the masked one does. 4. Remove the channels, and record the removal in the plan.
"""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.auxiliary import counted_parameters
from microglia.graph.channels.costs import Costs
from microglia.graph.channels.groups import ChannelGroup, channel_groups, entry_rows
from microglia.graph.constants import evened, fold_constants, with_biases
from microglia.graph.cutting.cut import Cut
from microglia.graph.cutting.modules import indices, kept_units
from microglia.graph.cutting.parts import Part, double_copy
from microglia.graph.cutting.plan import Plan, after, attach, plan_of
from microglia.graph.cutting.reference import Reference
from microglia.graph.cutting.remove import EXACT, Subject, model_outputs, outputs_difference, remove
from microglia.graph.cutting.verify import ShrinkError
from microglia.graph.dims.analysis import Analysis
from microglia.graph.prune import totals


def shrink(model: nn.Module, example_inputs: Any, *, clear: bool = False, keep_class: bool = False) -> nn.Module:
    """Returns a smaller copy of a masked model, without the channels that are masked completely.

    A channel is removed if every weight that makes it is masked (in a residual stream: in every layer that adds to it). The
    constant that its bias or norm still adds is folded into the layers that read it. If this is not exact, because of zero
    padding, the channel stays, and the plan's notes give the number. A group of a convolution also keeps the channels that it
    has masked beyond the other groups.

    Args:
        model: A model with masks, attached or folded; it stays unchanged.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.
        clear: Whether to set the biases and norm shifts of masked channels to zero first. Then all masked channels can be
            removed (in a grouped convolution: as many as every group has masked). The result equals the model with these biases
            set to zero.
        keep_class: Whether to remove only channels that the user's own classes can lose; see `prune_channels`.

    Returns:
        The smaller model, in the same mode, carrying its `Plan`. If no channel is masked completely, a folded copy.

    Raises:
        ShrinkError: The shrunk model would differ from the masked one; nothing is returned.
        TraceError: The model cannot be traced.
    """
    subject = Subject.of(model, example_inputs)
    found = _find(subject, keep_class=keep_class, clear=clear)
    settled = _settle(subject, found, clear=clear)
    kept = _same_units(subject, settled, found.kept)
    if not clear:
        _check_settled(subject, settled, kept)
    small = remove(settled, kept, keep_class=keep_class)
    return attach(small, after(model, _plan(subject, settled, found, small)))


@dataclass
class _Found:
    """The units that the masks of a model leave.

    Attributes:
        groups: Groups that could lose units.
        kept: The units that stay.
        biases: Constants to add to the biases of layers that read removed channels.
        masked: Number of completely masked units.
        stay: Number of masked units that cannot be removed, by reason.
        over: Number of removable units beyond those that the other groups of a convolution have masked.
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


def _find(subject: Subject, *, keep_class: bool, clear: bool) -> _Found:
    """Returns the units that the masks leave in all parts of a model; warns if these are all."""
    found = _Found()
    for part in subject.parts:
        groups = [g for g in channel_groups(part.analysis) if not g.renormalized and not (keep_class and g.factor)]
        _find_in(part, groups, found, fold=not clear)
    if not found.kept:
        warnings.warn(f"Nothing to remove: {_why(found)}; the model stays as large as it is.", stacklevel=3)
    return found


def _find_in(part: Part, groups: Sequence[ChannelGroup], found: _Found, *, fold: bool) -> None:
    """Adds the units that the masks leave in a part."""
    alive = {g.atom: units for g in groups if not bool((units := _alive(part.analysis, g)).all())}
    found.masked += sum(int((~units).sum()) for units in alive.values())
    if fold:
        found.biases.update({part.name(name): delta for name, delta in fold_constants(part, alive, found.stay).items()})
    even = evened(alive)
    cut = Cut(part.analysis, even)
    found.over += [(part, g, _left(cut, g, alive[g.atom])) for g in groups if g.atom in alive and g.rows > 1]
    found.kept.update({atom: units for atom, units in even.items() if not bool(units.all())})
    found.groups += groups


def _settle(subject: Subject, found: _Found, *, clear: bool) -> Subject:
    """Returns the model, traced again, in which removed channels no longer add anything."""
    model = with_biases(subject.model, found.biases)
    return Subject.of(_silenced(model, found.over) if clear else model, subject.example)


def _plan(subject: Subject, settled: Subject, found: _Found, small: nn.Module) -> Plan:
    """Returns the plan of the smaller model, relative to the masked one: added biases are new."""
    plan = plan_of(small)
    given = tuple(name for name in found.biases if subject.model.get_submodule(name).bias is None)
    costs = Costs(subject.parts, found.groups, counted_parameters(subject.model))
    total = totals(costs, found.kept, settled.unread(small))
    before, remaining = total["parameters"]
    total["parameters"] = before, remaining + sum(small.get_parameter(f"{name}.bias").numel() for name in given)
    notes = (*subject.notes, *plan.notes, *_notes(found))
    return replace(plan, **total, biases=given, found=len(found.groups), notes=notes)


def _same_units(subject: Subject, settled: Subject, kept: dict[int, Tensor]) -> dict[int, Tensor]:
    """Returns the kept units of the masked model by the atoms of the settled one; new biases are ignored."""
    again: dict[int, Tensor] = {}
    for part, (_, cut) in zip(settled.parts, subject.cuts(kept), strict=True):
        new = [name for name in part.analysis.parameter_dims if name not in cut.analysis.parameter_dims]
        again.update(kept_units(part.analysis, indices(cut), without=new))
    return again


def _left(cut: Cut, group: ChannelGroup, alive: Tensor) -> Tensor:
    """Returns masked units that must stay, boolean (rows, size), because all rows need the same number of units."""
    analysis, left = cut.analysis, torch.zeros(alive.numel(), dtype=torch.bool)
    for member in group.members:
        dim = analysis.entries(member.name, member.dim)
        place = analysis.algebra.coordinate(dim, group.atom, group.rows)
        left[place[cut.mask(dim) & (place >= 0)]] = True
    return left.view_as(alive) & ~alive


@torch.no_grad()
def _silenced(model: nn.Module, silent: Sequence[tuple[Part, ChannelGroup, Tensor]]) -> nn.Module:
    """Sets the biases and norm parameters of masked units that stay to zero; returns the model."""
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
    """Returns the units that some weight still makes, at least one; (rows, size) if rows choose their own units."""
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


@torch.no_grad()
def _check_settled(subject: Subject, settled: Subject, kept: Mapping[int, Tensor]) -> None:
    """Raises unless the settled model without its removed channels equals the masked one."""
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
    """Returns the outputs of the graph with the removed channels set to zero."""
    last = deque(Reference(cut).walk(inputs), maxlen=1)
    return last.pop()[1]  # type: ignore[no-any-return]
