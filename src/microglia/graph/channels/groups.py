"""Channel groups: units that must be removed together, their scores, and the reasons why some must stay."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from microglia.core.errors import ScoreError
from microglia.core.layers import Layer, check_selectors, matches
from microglia.graph.channels.sums import entry_sums
from microglia.graph.dims.analysis import Analysis
from microglia.graph.dims.atoms import UNIT

GroupReduction = Literal["sum", "mean", "max", "l2"]


@dataclass(frozen=True)
class Member:
    """A dimension of a parameter in which a group's units occur."""

    name: str
    dim: int


@dataclass(frozen=True)
class ChannelGroup:
    """Units that can be removed, each from all members of the group at once.

    Attributes:
        atom: Its number in the algebra.
        size: Number of units; per row, if rows choose their own units.
        members: The dimensions in which the units occur.
        factor: Whether the atom is a proper factor of some dimension: heads, channels per group.
        renormalized: Whether a norm, a mean or a softmax runs over it, so that removing a unit differs from zeroing it.
        cofactor: Minimum number of entries per unit in a member dimension.
        rows: Number of rows (groups of a convolution or norm) that may each lose different units, equally many; 1 if all lose
            the same units.
    """

    atom: int
    size: int
    members: tuple[Member, ...]
    factor: bool
    renormalized: bool
    cofactor: int
    rows: int = 1


def channel_groups(analysis: Analysis, excluded: Collection[str] = (), path: str = "") -> list[ChannelGroup]:
    """Returns the groups that can lose units, in the order in which the graph uses them.

    Args:
        analysis: Analysis of the model.
        excluded: Tensors of the model whose groups are left out; see `excluded_tensors`.
        path: Path of the analysed part in the model.
    """
    return [
        group
        for group in _groups(analysis)
        if not any(f"{path}.{member.name}".strip(".") in excluded for member in group.members)
    ]


def excluded_tensors(model: nn.Module, selectors: Sequence[str]) -> frozenset[str]:
    """Returns the selected parameters and buffers of a model, under all their names.

    Args:
        model: Any module.
        selectors: Selectors in the language of `microglia.core.layers.matches`, over all parameters and buffers of all modules.

    Raises:
        SelectorError: A selector matches none of them.
    """
    held = {
        f"{path}.{name}".strip("."): (tensor, Layer(f"{path}.{name}".strip("."), ((module, name),)))
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    check_selectors({name: layer for name, (_, layer) in held.items()}, selectors)
    chosen = {id(t) for name, (t, layer) in held.items() if selectors and matches(name, layer.module, selectors)}
    return frozenset(name for name, (tensor, _) in held.items() if id(tensor) in chosen)


def _groups(analysis: Analysis) -> Iterator[ChannelGroup]:
    """Yields the groups of all atoms that can lose units, in one pass over the dimensions of all parameters."""
    algebra = analysis.algebra
    members: dict[int, list[Member]] = {atom: [] for atom in analysis.prunable()}
    cofactors: dict[int, list[int]] = {atom: [] for atom in members}
    factors: set[int] = set()
    for name in dict.fromkeys(analysis.used_parameters()):
        for k, dim in enumerate(analysis.parameter_dims[name]):
            segments = algebra.normal(dim)
            for atom in dict.fromkeys(algebra.leaves(segments)):
                if atom in members:
                    members[atom].append(Member(name, k))
                    cofactors[atom].append(int((algebra.coordinate(segments, atom) == 0).sum()))
                    if any(atom in s and len(s) > 1 for s in segments) or _nested(analysis, segments, atom):
                        factors.add(atom)
    for atom, own in members.items():
        cofactor = min(cofactors[atom])
        size, rows = algebra.sizes[atom], analysis.rows.get(atom, 1)
        yield ChannelGroup(atom, size, tuple(own), atom in factors, algebra.renormalized[atom], cofactor, rows)


def _nested(analysis: Analysis, dim: tuple[object, ...], atom: int) -> bool:
    """Tells whether an atom sits in a sum inside a product."""
    segments = analysis.algebra.normal(dim)  # type: ignore[arg-type]
    inner = [f for segment in segments for f in segment if not isinstance(f, int)]
    return any(atom in set(analysis.algebra.leaves(f)) for f in inner)


def independent(analysis: Analysis, groups: Sequence[ChannelGroup], *, within: bool = False) -> list[ChannelGroup]:
    """Returns groups such that no two are factors of one dimension: half the heads *and* half their width is a quarter.

    From each such product the leading factor is taken (heads, convolution groups) if it has at least four units, else the
    largest. With ``within``, factors whose rows choose their own units come first: channels within the groups of a convolution
    or norm. Among several such factors with at least four units the innermost is taken.
    """
    rivals: dict[int, set[int]] = {g.atom: set() for g in groups}
    leading: set[int] = set()
    for name in dict.fromkeys(analysis.used_parameters()):
        for dim in analysis.parameter_dims[name]:
            for segment in analysis.algebra.normal(dim):
                _note_rivals(analysis, segment, rivals, leading)

    def preference(group: ChannelGroup) -> tuple[int, ...]:
        usual = not (group.atom in leading and group.size >= 4), -group.size
        return (0, group.size < 4, -group.rows, *usual) if within and group.rows > 1 else (1, *usual)

    order = sorted(groups, key=preference)
    chosen: set[int] = set()
    for group in order:
        if not rivals[group.atom] & chosen:
            chosen.add(group.atom)
    return [g for g in groups if g.atom in chosen]


def _note_rivals(analysis: Analysis, segment: tuple[object, ...], rivals: dict[int, set[int]], leading: set[int]) -> None:
    parts = [[f] if isinstance(f, int) else list(analysis.algebra.leaves(f)) for f in segment]  # type: ignore[arg-type]
    parts = [[a for a in part if a in rivals] for part in parts]
    parts = [part for part in parts if part]
    for i, part in enumerate(parts):
        others = {a for j, other in enumerate(parts) if j != i for a in other}
        for atom in part:
            rivals[atom] |= others - {atom}
            if i == 0 and others:
                leading.add(atom)
    for factor in segment:
        if not isinstance(factor, int):
            for inner in factor:  # type: ignore[attr-defined]
                _note_rivals(analysis, inner, rivals, leading)


def why(analysis: Analysis, name: str, dim: int) -> str:
    """Returns the composition of a parameter's dimension, and the first reason why its parts must stay."""
    algebra = analysis.algebra
    parts = []
    for atom in algebra.leaves(analysis.parameter_dims[name][dim]):
        size = algebra.sizes[atom]
        if algebra.frozen[atom]:
            parts.append(f"{size}: kept, {algebra.reasons.get(atom, 'frozen')}")
        elif atom in analysis.prunable():
            parts.append(f"{size}: can be pruned")
        else:
            parts.append(f"{size}: kept, no weight makes it")
    return f"{name}[{dim}] = {algebra.show(analysis.parameter_dims[name][dim])}; " + "; ".join(parts)


# --------------------------------------------------------------------------------------------------------------- scores
def group_scores(
    analysis: Analysis,
    groups: Sequence[ChannelGroup],
    elements: Mapping[str, Tensor],
    reduction: GroupReduction = "l2",
    *,
    normalize: bool = True,
    makers: bool = False,
) -> dict[int, Tensor]:
    """Returns one score per unit by atom, float64 (size,), or (rows, size) if rows choose their own units; higher = keep.

    Args:
        analysis: Analysis of the model.
        groups: Groups whose units are scored.
        elements: One value per weight by parameter name; members without values do not count.
        reduction: Function that combines the values of a unit's weights over all members.
        normalize: Whether to divide by the mean over the group, so that groups of different widths are comparable.
        makers: Whether only the members that make a unit count, because the values are those of filters.

    Raises:
        ScoreError: No member of a group has values, or a value is NaN.
    """
    chosen = {group.atom: scored_members(analysis, group, elements, makers=makers) for group in groups}
    scores, rows = {}, _Rows(analysis, elements, reduction, chain.from_iterable(chosen.values()))
    for group in groups:
        members = chosen[group.atom]
        if not members:
            named = ", ".join(m.name for m in group.members[:3])
            raise ScoreError(f"The score gives no value for any weight of the group of {group.size} channels of {named}.")
        score = _reduce(analysis, group, members, rows, reduction)
        if bool(score.isnan().any()):
            raise ScoreError(f"The score of the channels of {members[0].name!r} has NaN; look for non-finite weights there.")
        mean = float(score.abs().mean())
        alone = group.size == 1  # compared with similar groups, not with itself
        score = score / mean if normalize and mean > 0 and not alone else score
        scores[group.atom] = score if group.rows == 1 else score.view(group.rows, -1)
    return scores


def scored_members(
    analysis: Analysis, group: ChannelGroup, elements: Mapping[str, Tensor], *, makers: bool = False
) -> list[Member]:
    """Returns the members of a group that have values; ``makers``: those alone that make a unit."""
    known = [m for m in group.members if m.name in elements]
    return [m for m in known if not makers or (m.name, m.dim) in analysis.producers]


class _Rows:
    """One value per entry of a parameter's dimension, reduced over all other dimensions; each parameter is read once."""

    def __init__(
        self, analysis: Analysis, elements: Mapping[str, Tensor], how: GroupReduction, members: Iterable[Member]
    ) -> None:
        self.analysis, self.elements, self.how = analysis, elements, how
        self._known: dict[Member, tuple[Tensor, int]] = {}
        self._dims: dict[str, dict[int, None]] = {}
        for member in members:
            self._dims.setdefault(member.name, {})[member.dim] = None

    def __call__(self, member: Member) -> tuple[Tensor, int]:
        """Returns (values, float64 (entries,), the number of weights of each)."""
        if member not in self._known:
            self._known.update(self._reduced(member))
        return self._known[member]

    def _reduced(self, member: Member) -> dict[Member, tuple[Tensor, int]]:
        """Returns the values of a member, and those of the parameter's other members that the same pass gives."""
        values, square = self.elements[member.name].detach(), self.how == "l2"
        if self.how == "max":
            matrix = entry_rows(self.analysis, member, values)
            return {member: (matrix.amax(1).double().cpu(), matrix.shape[1])}
        if self._by_group(member.name, member.dim):
            matrix = entry_rows(self.analysis, member, values)
            return {member: (entry_sums(matrix, (0,), square=square)[0].cpu(), matrix.shape[1])}
        dims = [dim for dim in self._dims[member.name] if not self._by_group(member.name, dim)]
        sums = entry_sums(values, dims, square=square)
        return {Member(member.name, dim): (own.cpu(), values.numel() // max(1, len(own))) for dim, own in sums.items()}

    def _by_group(self, name: str, dim: int) -> bool:
        """Tells whether a dimension holds different channels in each group of a convolution."""
        return self.analysis.groups(name, dim) != UNIT


def entry_rows(analysis: Analysis, member: Member, values: Tensor) -> Tensor:
    """Returns a tensor as a matrix: entries of a dimension (in every group of a convolution) x all others."""
    groups = analysis.algebra.size(analysis.groups(member.name, member.dim))
    by_group = values.view(groups, -1, *values.shape[1:]).movedim(member.dim + 1, 1)
    return by_group.reshape(by_group.shape[0] * by_group.shape[1], -1)


def _reduce(analysis: Analysis, group: ChannelGroup, members: Sequence[Member], rows: _Rows, how: GroupReduction) -> Tensor:
    total = torch.full((group.rows * group.size,), -torch.inf if how == "max" else 0.0, dtype=torch.float64)
    count = torch.zeros(group.rows * group.size, dtype=torch.float64)
    for member in members:
        values, held = rows(member)
        place = analysis.algebra.coordinate(analysis.entries(member.name, member.dim), group.atom, group.rows)
        inside = place >= 0
        if how == "max":
            total.scatter_reduce_(0, place[inside], values[inside], "amax")
        else:
            total.index_add_(0, place[inside], values[inside])
        count.index_add_(0, place[inside], torch.full((int(inside.sum()),), float(held), dtype=torch.float64))
    if how == "l2":
        return total.sqrt()
    return total / count.clamp_min(1) if how == "mean" else total
