"""Coupled channels as units of a search: the readers, the makers and the cost of each channel."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.auxiliary import counted_parameters
from microglia.core.budget import Budget
from microglia.core.layers import Layer, prunable_layers
from microglia.core.patterns import Reduction
from microglia.graph.channels.costs import Costs
from microglia.graph.channels.groups import ChannelGroup, channel_groups, excluded_tensors, independent
from microglia.graph.channels.widths import Widths, WidthScope, choose_widths, keep_units
from microglia.graph.cutting.modules import cut_module
from microglia.graph.cutting.parts import Part
from microglia.graph.cutting.remove import SINGLE, Subject, class_problem
from microglia.graph.cutting.verify import ShrinkError, run_patched
from microglia.graph.dims.analysis import Analysis


@dataclass(frozen=True)
class Place:
    """A dimension of a parameter in which channels occur.

    Attributes:
        name: The parameter.
        dim: Index of its dimension.
        units: The unit of each entry, int64 (entries,); the number of all units for an entry that belongs to none.
    """

    name: str
    dim: int
    units: Tensor


class CoupledChannels:
    """All removable channels of a model, numbered; channels that must be removed together are one unit.

    A channel is *read* by the weights that contract it. A factor there scales the channel after norm and activation. Before a
    batch norm a positive factor would be divided out, and a mask would get no gradient (spec: SMART 2.6). A channel is *made*
    by the rows of the weights that write it, their biases and the affine parameters of its norms. If all of these are zero, the
    channel is zero, and `shrink` removes it.

    Groups under a norm, mean or softmax are left out, because removing differs from zeroing there. Groups that no weight reads
    are left out too.

    Args:
        model: Any model that `torch.export` can trace; it stays unchanged.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.
        exclude: Selectors of layers that keep both their inputs and outputs; see `prune_channels`.
        layers: The prunable layers that get masks; by default all of the model.
        cost: Cost of a channel in a budget: its ``weights``, or equal for all. Multiply-accumulates are shared by channels, so
            that `macs_at` counts them for all widths together.

    Attributes:
        names: Unique names of the groups: the first weight that makes each.
        lengths: Channels in each group.
        count: Channels in all.
        read: Places where channels are read.
        made: Places where channels are made.
        costs: Cost of each channel, int64 (count,).
        scaled_names: Parameters that factors or masks act on.
        companions: Further parameters that must be zero for a removed channel to be zero.

    Raises:
        SelectorError: A selector matches nothing.
        ShrinkError: No channel can be removed.
        TraceError: The model cannot be traced.
    """

    names: Sequence[str]
    lengths: Sequence[int]
    scaled_names: Sequence[str]
    companions: Sequence[str]

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        exclude: Sequence[str] = (),
        *,
        layers: Mapping[str, Layer] | None = None,
        cost: str = "auto",
    ) -> None:
        subject = Subject.of(model, example_inputs)
        excluded = excluded_tensors(subject.model, exclude)
        found = [(part, group) for part in subject.parts for group in _groups(part, excluded)]
        if not found:
            raise ShrinkError(f"No channels of {type(model).__name__} can be masked and removed.")
        self._subject = subject
        self.groups = [group for _, group in found]
        self.lengths = [group.size for group in self.groups]
        self.count = sum(self.lengths)
        self._parts, self._parameters = subject.parts, counted_parameters(model)
        self._costs = Costs(self._parts, self.groups, self._parameters)
        starts = dict(zip((g.atom for g in self.groups), _starts(self.lengths), strict=True))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        names: list[str] = []
        read: dict[tuple[str, int], Place] = {}
        made: dict[tuple[str, int], Place] = {}
        for part, group in found:
            maker = next(m.name for m in group.members if (m.name, m.dim) in part.analysis.producers)
            names.append(_unused(part.name(maker), names))
            for place, reads in _places(part, group, starts[group.atom], self.count):
                if place.name in parameters:
                    _merge(read if reads else made, place)
        self.names = names
        self.read, self.made = tuple(read.values()), tuple(made.values())
        self._shapes = {p.name: parameters[p.name].shape for p in (*self.read, *self.made)}
        self._read, self._made = _by_name(self.read), _by_name(self.made)
        masked = prunable_layers(model) if layers is None else layers
        self._masked = {name: tuple(layer.shape) for name, layer in masked.items()}
        self.scaled_names = tuple(dict.fromkeys([*self._read, *self._masked]))
        self.companions = tuple(name for name in self._made if name not in self._masked)
        self.costs = self.weights() if cost == "weights" else torch.ones(self.count, dtype=torch.int64)

    def weights(self) -> Tensor:
        """Returns the number of weights that make each channel, int64 (count,)."""
        sizes = torch.zeros(self.count + 1, dtype=torch.int64)
        for place in self.made:
            shape = self._shapes[place.name]
            if len(shape) > 1:
                sizes.index_add_(0, place.units, torch.full_like(place.units, shape.numel() // shape[place.dim]))
        return sizes[:-1]

    def members(self) -> Tensor:
        """Returns the number of filters that make each channel, one of each layer that writes it, int64 (count,)."""
        filters = torch.zeros(self.count + 1, dtype=torch.int64)
        for place in self.made:
            if len(self._shapes[place.name]) > 1:
                filters.index_add_(0, place.units, torch.ones_like(place.units))
        return filters[:-1].clamp(min=1)

    def macs_at(self, widths: Tensor) -> Tensor:
        """Returns the exact multiply-accumulates of the example batch at widths of the groups.

        Args:
            widths: Width vectors, int64 (..., groups).

        Returns:
            Their counts, int64 (...).
        """
        counts = {group.atom: widths[..., number] for number, group in enumerate(self.groups)}
        counted = self._costs.macs(counts)  # type: ignore[arg-type]
        return torch.as_tensor(counted).expand(widths.shape[:-1])

    def macs(self, kept: Tensor) -> Tensor:
        """Returns the remaining fraction of multiply-accumulates for fractions ``kept`` in [0, 1] of channels; differentiable.

        It is the product of the input and output widths of every layer (PaS: the sum over layers of in x out).
        """
        counts = {g.atom: part.sum() for g, part in zip(self.groups, torch.split(kept, list(self.lengths)), strict=True)}
        return self._costs.macs(counts) / self._costs.dense["flops"]  # type: ignore[arg-type,return-value]

    def fraction(self, term: str, widths: Sequence[int]) -> float:
        """Returns the remaining fraction of a budget's term, ``density``, ``params`` or ``flops``, at widths of the groups."""
        if term == "density":
            return sum(widths) / self.count
        return self._costs.fraction(term, {g.atom: width for g, width in zip(self.groups, widths, strict=True)})

    def sliced(self, model: nn.Module, kept: Tensor) -> nn.Module:
        """Returns a smaller copy of a model: its tensors are sliced to channels, without a trace and without verification.

        Args:
            model: The model of this trace, with any weights and without masks; it stays unchanged.
            kept: Channels that stay, boolean (count,), at least one of each group.
        """
        return cut_module(model, *self._subject.changes(self._left(kept)))

    def check_sliced(self) -> None:
        """Checks `sliced` once: half of every group is cut, and its outputs are compared with those of the cut graph.

        Raises:
            ShrinkError: The model's own classes cannot follow a cut.
        """
        left = self._left(torch.cat([torch.arange(size) < (size + 1) // 2 for size in self.lengths]))
        small = cut_module(self._subject.model, *self._subject.changes(left))
        for part, cut in self._subject.cuts(left):
            exact = {"exact": SINGLE / 10} if part.narrow else {}
            if problem := class_problem(small.get_submodule(part.path), cut, run_patched(cut), **exact):
                name = part.path or type(self._subject.model).__name__
                raise ShrinkError(f"Width vectors of {name} cannot be evaluated by slices: {problem} Exclude such layers.")

    def _left(self, kept: Tensor) -> dict[int, Tensor]:
        """Returns the channels that stay, by atom, of groups that lose any."""
        parts = torch.split(kept.cpu().bool(), list(self.lengths))
        return {g.atom: part for g, part in zip(self.groups, parts, strict=True) if not bool(part.all())}

    def choose(
        self,
        ranking: Tensor,
        budget: Budget,
        *,
        scope: WidthScope = "uniform",
        round_to: int = 1,
        among: Tensor | None = None,
    ) -> tuple[Tensor, Widths]:
        """Returns the channels that meet a budget, boolean (count,), and how many each group keeps; see `choose_widths`.

        Args:
            ranking: One value per channel, (count,), higher = keep.
            budget: ``density`` is the kept fraction of the channels that may go.
            scope: ``global``: the values compare across groups as they are.
            round_to: Widths are kept at multiples of this.
            among: Channels that may go, boolean (count,), all or none of a group; None for all.
        """
        parts = zip(self.groups, torch.split(ranking.detach().double().cpu(), list(self.lengths)), strict=True)
        allowed = [True] * len(self.groups)
        if among is not None:
            allowed = [bool(part.all()) for part in torch.split(among, list(self.lengths))]
        ranks = {g.atom: part for (g, part), free in zip(parts, allowed, strict=True) if free}
        groups = [replace(g, rows=1) for g in self.groups if g.atom in ranks]
        costs = Costs(self._parts, groups, self._parameters)
        widths = choose_widths(costs, groups, budget, ranks, scope=scope, round_to=round_to)
        kept = keep_units(ranks, widths.counts)
        ones = [kept.get(g.atom, torch.ones(g.size, dtype=torch.bool)) for g in self.groups]
        return torch.cat(ones).to(ranking.device), widths

    def reduce(self, values: Mapping[str, Tensor], how: Reduction) -> Tensor:
        """Returns one value per channel from one value per weight; mean and l2 are over all weights that make it."""
        like = values[next(name for name in self._made if name in values)]
        dtype = like.dtype if like.is_floating_point() else torch.float32
        total = torch.full((self.count + 1,), -torch.inf if how == "max" else 0.0, dtype=dtype, device=like.device)
        held = torch.zeros_like(total)
        for name, places in self._made.items():
            if name not in values or values[name].ndim < 2:
                continue
            for place in places:
                value = values[name].to(dtype).movedim(place.dim, 0).flatten(1)
                index = place.units.to(total.device)
                if how == "max":
                    total = total.scatter_reduce(0, index, value.amax(1), "amax")
                else:
                    total = total.index_add(0, index, (value.square() if how == "l2" else value).sum(1))
                held = held.index_add(0, index, torch.full_like(total[:1], value.shape[1]).expand(len(index)))
        total, held = total[:-1], held[:-1].clamp(min=1)
        if how == "mean":
            return total / held
        return total.clamp_min(torch.finfo(dtype).tiny).sqrt() if how == "l2" else total

    def scale(self, name: str, parameter: Tensor, factors: Tensor) -> Tensor:
        """Returns a parameter times the factors of the channels that it reads; differentiable in both."""
        return _times(parameter, self._read.get(name, ()), factors)

    def companion(self, name: str, parameter: Tensor, kept: Tensor) -> Tensor:
        """Returns a parameter with its entries of removed channels set to zero."""
        return _times(parameter, self._made[name], kept)

    def masks(self, kept: Tensor) -> dict[str, Tensor]:
        """Returns masks of the rows that make a channel; layers that make none of these channels are all ones."""
        ones = {name: torch.ones(shape, dtype=torch.bool, device=kept.device) for name, shape in self._masked.items()}
        own = {name: places for name, places in self._made.items() if name in ones}
        return {**ones, **{name: _times(ones[name].float(), places, kept) > 0 for name, places in own.items()}}


def _times(parameter: Tensor, places: Sequence[Place], factors: Tensor) -> Tensor:
    """Returns a parameter times the factors of its channels, 1 for entries without a channel."""
    padded = torch.cat([factors.to(parameter.dtype), parameter.new_ones(1)])
    for place in places:
        shape = [1] * parameter.ndim
        shape[place.dim] = -1
        parameter = parameter * padded[place.units.to(padded.device)].view(shape)
    return parameter


def _by_name(places: Sequence[Place]) -> dict[str, list[Place]]:
    found: dict[str, list[Place]] = {}
    for place in places:
        found.setdefault(place.name, []).append(place)
    return found


def _groups(part: Part, excluded: Collection[str]) -> list[ChannelGroup]:
    """Returns the groups for which masking equals removal, and which some weight reads."""
    analysis = part.analysis
    own = [g for g in channel_groups(analysis, excluded, part.path) if not g.renormalized]
    return [
        g
        for g in independent(analysis, own)
        if any(_reads(analysis, m.name, m.dim) for m in g.members)
        and any((m.name, m.dim) in analysis.producers for m in g.members)
    ]


def _reads(analysis: Analysis, name: str, dim: int) -> bool:
    """Tells whether a weight contracts this dimension, that is, makes channels with another one of its dimensions."""
    makers = {k for n, k in analysis.producers if n == name}
    shape = analysis.trace.tensors[name].shape
    return bool(makers) and dim not in makers and shape[dim] > 1


def _places(part: Part, group: ChannelGroup, start: int, none: int) -> Iterator[tuple[Place, bool]]:
    """Yields the places of a group's channels, and whether channels are read or made there."""
    analysis = part.analysis
    for member in group.members:
        reads = _reads(analysis, member.name, member.dim)
        shape = analysis.trace.tensors[member.name].shape
        vector = shape.numel() == shape[member.dim]
        if reads or vector or (member.name, member.dim) in analysis.producers:
            place = analysis.algebra.coordinate(analysis.parameter_dims[member.name][member.dim], group.atom)
            yield Place(part.name(member.name), member.dim, torch.where(place >= 0, place + start, none)), reads


def _merge(places: dict[tuple[str, int], Place], place: Place) -> None:
    """Adds a place; if a dimension holds channels of several groups, they share one place."""
    before = places.get((place.name, place.dim))
    units = place.units if before is None else torch.minimum(before.units, place.units)
    places[place.name, place.dim] = Place(place.name, place.dim, units)


def _unused(name: str, names: Sequence[str]) -> str:
    """Returns an unused name: one layer makes several groups if padding or concatenation cuts its outputs."""
    return name if name not in names else next(n for k in itertools.count(2) if (n := f"{name}#{k}") not in names)


def _starts(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths))]
