"""`shrink`: from masks to a smaller model. What a masked channel still adds is settled first, so that it can go.

A weight mask zeroes a channel's filter, but its bias and its norm's shift survive: the channel is a constant, not zero.
A constant can be folded into the biases of the layers that read it, exactly where these do not pad with zeros (survey 0.7).
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from microglia.graph.analysis import Analysis, Consumer
from microglia.graph.cut import Cut
from microglia.graph.groups import ChannelGroup, channel_groups
from microglia.graph.modules import indices
from microglia.graph.parts import Part, to_double
from microglia.graph.plan import after, attach, give_biases, kept_units, plan_of
from microglia.graph.prune import totals
from microglia.graph.removal import EXACT, Subject, model_outputs, noise, outputs_difference, remove
from microglia.graph.trace import named_arguments, operator_name
from microglia.graph.verify import ShrinkError
from microglia.graph.widths import Costs


def shrink(model: nn.Module, example_inputs: Any, *, clear: bool = False, keep_class: bool = False) -> nn.Module:
    """Returns a smaller copy of a masked model, with the channels gone that the masks removed whole.

    A channel goes when every weight that makes it is masked (of a residual stream: every layer that adds to it). What its
    bias or norm still adds is folded into the layers that read it. Where that is not exact, behind zero padding, the channel
    stays and the plan's notes say how many did.

    Args:
        model: With masks attached or folded; it is left as it is.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.
        clear: Set the surviving biases and norm shifts of masked channels to zero first: every masked channel can go, and
            the result equals the model so completed, not the one whose weights alone were masked.
        keep_class: Only what the user's own classes can follow; see `prune_channels`.

    Returns:
        The smaller model, in the same mode, carrying its `Plan`. Without a whole masked channel, a folded copy.

    Raises:
        ShrinkError: The shrunk model would differ from the masked one; nothing is returned.
        TraceError: The model cannot be traced.
    """
    subject = Subject.of(model, example_inputs)
    groups: list[ChannelGroup] = []
    kept: dict[int, Tensor] = {}
    biases: dict[str, Tensor] = {}
    masked = 0
    for part in subject.parts:
        own = [g for g in channel_groups(part.analysis) if not g.renormalized and not (keep_class and g.factor)]
        dead = {g.atom: alive for g in own if not bool((alive := _alive(part.analysis, g)).all())}
        masked += sum(int((~alive).sum()) for alive in dead.values())
        if not clear:
            biases.update({part.name(name): delta for name, delta in _fold_constants(part, dead).items()})
        kept.update({atom: alive for atom, alive in dead.items() if not bool(alive.all())})
        groups += own
    settled = _settled(subject, kept, biases)
    if not clear:
        _check_settled(subject, settled, kept)
    small = _removed(subject, settled, kept, keep_class=keep_class)
    plan = plan_of(small)
    left = masked - sum(int((~alive).sum()) for alive in kept.values())
    given = tuple(name for name in biases if subject.model.get_submodule(name).bias is None)
    costs = Costs(subject.parts, groups, sum(p.numel() for p in subject.model.parameters()))
    notes = (*plan.notes, *_notes(masked, left))
    plan = replace(plan, **totals(costs, kept), biases=given, found=len(groups), notes=notes)
    return attach(small, after(model, plan))


def _removed(subject: Subject, settled: nn.Module, kept: dict[int, Tensor], *, keep_class: bool) -> nn.Module:
    """Cuts the settled model by the indices that were found on the masked one."""
    after = Subject.of(settled, subject.example)
    again: dict[int, Tensor] = {}
    for part, (_, cut) in zip(after.parts, subject.cuts(kept), strict=True):
        again.update(kept_units(part.analysis, indices(cut)))
    return remove(after, again, keep_class=keep_class)


def _notes(masked: int, left: int) -> list[str]:
    if masked == 0:
        return ["No channel is masked whole, so nothing was removed; mask with the pattern 'channel'."]
    if left:
        return [
            f"{left} of {masked} masked channels stay: they are constants read by layers that pad with zeros, where no bias "
            "equals them. shrink(..., clear=True) sets them to zero and removes them."
        ]
    return []


def _alive(analysis: Analysis, group: ChannelGroup) -> Tensor:
    """Returns which units some weight still makes; at least one."""
    alive = torch.zeros(group.size, dtype=torch.bool)
    makers = [m for m in group.members if (m.name, m.dim) in analysis.producers]
    for member in makers:
        rows = analysis.trace.tensors[member.name].detach().movedim(member.dim, 0).flatten(1).count_nonzero(1) > 0
        place = analysis.algebra.coordinate(analysis.parameter_dims[member.name][member.dim], group.atom)
        alive[place[rows.cpu() & (place >= 0)]] = True
    if not makers:
        alive[:] = True
    if not bool(alive.any()):
        alive[0] = True
    return alive


# ------------------------------------------------------------------------------------------------------------- constants
@torch.no_grad()
def _fold_constants(part: Part, kept: dict[int, Tensor]) -> dict[str, Tensor]:
    """Returns what to add to the biases of layers that read removed channels; channels that cannot be folded are kept.

    ``kept`` is changed: it gets back the units whose value is not one constant, or is read through zero padding.
    """
    while True:
        found = list(_constants(part.analysis, Cut(part.analysis, kept)))
        stubborn = [(consumer, values) for consumer, values in found if not _foldable(part, consumer, values)]
        if not stubborn:
            break
        for consumer, values in stubborn:
            _give_back(part.analysis, consumer, values, kept)
    biases: dict[str, Tensor] = {}
    for consumer, values in found:
        if bool(values.nan_to_num().any()):
            name = consumer.weight.rpartition(".")[0]
            delta = _contribution(part.analysis, consumer, values)
            biases[name] = biases[name] + delta if name in biases else delta
    return biases


def _constants(analysis: Analysis, cut: Cut) -> Iterator[tuple[Consumer, Tensor]]:
    """Yields for each weight that reads removed channels their values, 0 for those kept, NaN for those not constant."""
    generator = torch.Generator().manual_seed(0)
    inputs = analysis.trace.example
    other = tuple(noise(v, generator) for v in inputs)
    consumers = [c for c in analysis.consumers if cut.changes(analysis.dims[c.source][c.dim])]
    first, second = (_values(analysis, {c.source for c in consumers}, given) for given in (inputs, other))
    for consumer in consumers:
        removed = ~cut.mask(analysis.dims[consumer.source][consumer.dim])
        rows = torch.cat([v[consumer.source].movedim(consumer.dim, 0).flatten(1) for v in (first, second)], 1)
        low, high = rows.aminmax(dim=1)
        constant = (high - low) <= 1e-12 * (1 + high.abs())
        values = torch.where(constant, rows[:, 0], torch.nan)
        yield consumer, torch.where(removed.to(values.device), values, 0.0)


def _values(analysis: Analysis, wanted: set[fx.Node], inputs: tuple[Any, ...]) -> dict[fx.Node, Tensor]:
    """Runs the graph and returns the values of some nodes."""
    trace = analysis.trace
    given = dict(zip(trace.inputs, inputs, strict=True))
    last = {source: node for node in trace.graph.nodes for source in node.all_input_nodes}
    values: dict[fx.Node, Any] = {}
    found: dict[fx.Node, Tensor] = {}
    for node in trace.graph.nodes:
        if node.op == "placeholder":
            name = trace.name_of.get(node.name)
            values[node] = given[node.name] if name is None else trace.tensors[name].detach()
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        if node in wanted:
            found[node] = values[node].clone()
        for source in node.all_input_nodes:
            if last[source] is node:
                values.pop(source, None)
    return found


def _foldable(part: Part, consumer: Consumer, values: Tensor) -> bool:
    if not bool(values.isnan().any()) and not bool(values.any()):
        return True
    layer = part.module.get_submodule(consumer.weight.rpartition(".")[0])
    plain = operator_name(consumer.node) == "linear" or (
        operator_name(consumer.node).startswith("conv") and not any(_numbers(named_arguments(consumer.node).get("padding")))
    )
    return plain and isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and not bool(values.isnan().any())


def _numbers(padding: Any) -> list[Any]:
    return list(padding) if isinstance(padding, list | tuple) else [padding != "valid"]


def _give_back(analysis: Analysis, consumer: Consumer, values: Tensor, kept: dict[int, Tensor]) -> None:
    dim = analysis.dims[consumer.source][consumer.dim]
    entries = values.isnan() | (values != 0)
    for atom in set(analysis.algebra.leaves(dim)) & set(kept):
        place = analysis.algebra.coordinate(dim, atom)
        kept[atom][place[entries.cpu() & (place >= 0)]] = True


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
def _settled(subject: Subject, kept: dict[int, Tensor], biases: dict[str, Tensor]) -> nn.Module:
    """Returns a copy whose removed channels are zero in every tensor and whose readers carry what they added."""
    model = deepcopy(subject.model)
    for part, cut in subject.cuts(kept):
        for name, parameter in model.get_submodule(part.path).named_parameters(remove_duplicate=False):
            if name in part.analysis.parameter_dims and cut.removed(name):
                parameter.copy_(cut.zero(name, parameter))
    give_biases(model, tuple(biases))
    for name, delta in biases.items():
        bias = cast(nn.Linear, model.get_submodule(name)).bias
        bias.add_(delta.to(bias))
    return model


def _check_settled(subject: Subject, settled: nn.Module, kept: dict[int, Tensor]) -> None:
    """Raises unless the settled model computes what the masked one does."""
    for part, cut in subject.cuts(kept):
        before = model_outputs(to_double(deepcopy(part.module)), cut)
        now = settled.get_submodule(part.path)
        error = outputs_difference(model_outputs(to_double(deepcopy(now)), cut), before)
        single = part.narrow or any(p.dtype != torch.float64 for p in now.parameters())
        if error > (1e-5 if single else EXACT):  # biases were added in the model's own precision
            raise ShrinkError(f"Folding the constants of masked channels would change the outputs by {error:.1e}.")
