"""Movable groups: channels that can be reordered, their dimensions, and the reasons why others cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from microglia.core.patterns import Block
from microglia.graph.channels.groups import ChannelGroup, channel_groups
from microglia.graph.cutting.parts import Part
from microglia.graph.order.order_search import Stripes


def tensors_of(part: Part, group: ChannelGroup) -> tuple[str, ...]:
    """Returns the tensors of the model that hold a group's channels, by name."""
    return tuple(dict.fromkeys(part.name(member.name) for member in group.members))


def shared_dims(part: Part, group: ChannelGroup, block: Block) -> list[tuple[str, int]]:
    """Returns the tensors and dimensions (0 for outputs) in which a group's channels share blocks with others."""
    named = ((name, dim) for name in tensors_of(part, group) for dim in (0, 1))
    return [(name, dim) for name, dim in named if _entries(part, group, block, name, dim) is not None]


def stripes(part: Part, group: ChannelGroup, block: Block, name: str, *, score: Tensor, keep: int) -> list[Stripes]:
    """Returns a layer's scores, (out, in, *kernel), along each dimension in which the channels share blocks with others."""
    found = []
    for dim in (0, 1):
        places = _entries(part, group, block, name, dim)
        if places is not None:
            found.append(_stripes(block, score, dim, places, keep))
    return found


def _entries(part: Part, group: ChannelGroup, block: Block, name: str, dim: int) -> Tensor | None:
    """Returns the entries of each unit, (units, entries); None if their order makes no difference."""
    dims = part.dims_of(name)
    side = (block.out, block.in_)[dim]
    if len(dims) < 2 or side == 1:
        return None
    unit = part.analysis.algebra.coordinate(dims[dim], group.atom)
    inside = (unit >= 0).nonzero()[:, 0]
    if not len(inside) or len(unit) <= side or len(inside) % group.size:
        return None
    return inside[unit[inside].argsort(stable=True)].view(group.size, -1)


def _stripes(block: Block, score: Tensor, dim: int, places: Tensor, keep: int) -> Stripes:
    side, across = (block.out, block.in_) if dim == 0 else (block.in_, block.out)
    matrix = score.flatten(2) if score.ndim > 2 else score[..., None]
    matrix = matrix.transpose(0, dim)
    entries, others, kernel = matrix.shape
    padded = functional.pad(matrix, (0, 0, 0, -others % across))
    blocks = padded.reshape(entries, -1, across, kernel).sum(2).flatten(1)
    stripe = torch.arange(entries) // side
    alone = torch.ones(entries, dtype=torch.bool).index_fill_(0, places.flatten(), False)
    rest = torch.zeros(-(-entries // side), blocks.shape[1]).index_add_(0, stripe[alone], blocks[alone])
    sizes = _lengths(entries, side)[:, None] * _lengths(others, across).repeat_interleave(kernel)
    return Stripes(blocks[places], stripe[places], rest, sizes, keep)


def _lengths(length: int, side: int) -> Tensor:
    return torch.arange(0, length, side).neg().add(length).clamp(max=side)


def movable(part: Part) -> list[tuple[ChannelGroup, str]]:
    """Returns the groups of several channels, each with the reason why it must stay; empty for a movable group."""
    unread = _unread(part)
    saved = part.module.state_dict().keys()
    found = []
    for group in channel_groups(part.analysis):
        if group.size == 1:
            continue
        lost = next((m.name for m in group.members if m.name not in saved), "")
        reason = f"{lost} is not saved with the weights, so that a loaded model would have it in the old order" if lost else ""
        if unread:
            reason = f"{part.name(unread)} is not read in evaluation; what it would read in training is not known"
        found.append((group, reason))
    return found


def _unread(part: Part) -> str:
    """Returns the name of a parameter unused in evaluation, such as an auxiliary head's; empty if there is none."""
    named = dict(part.module.named_parameters(remove_duplicate=False))
    read = {id(named[name]) for name in part.analysis.used_parameters() if name in named}
    return next((name for name, parameter in named.items() if id(parameter) not in read), "")


def tensor_orders(part: Part, orders: Mapping[int, Tensor]) -> dict[str, dict[str, list[int]]]:
    """Returns the old entry for each new position, by tensor of the model and dimension, if any entry moves."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, dims in part.analysis.parameter_dims.items():
        for k, dim in enumerate(dims):
            order = part.analysis.algebra.order(dim, orders)
            if not torch.equal(order, torch.arange(len(order))):
                found.setdefault(part.name(name), {})[str(k)] = order.tolist()
    return found


def unmoved(part: Part, names: Sequence[str], moved: set[int], reasons: Mapping[int, str]) -> dict[str, str]:
    """Returns the layers without a moved output, each with the first reason."""
    algebra, found = part.analysis.algebra, {}
    for name in part.analysis.parameter_dims:
        dims = part.dims_of(part.name(name))
        atoms = list(algebra.leaves(dims[0])) if dims else []
        if part.name(name) not in names or set(atoms) & moved:
            continue
        given = [reasons.get(a) or (algebra.reasons.get(a, "frozen") if algebra.frozen[a] else "") for a in atoms]
        found[part.name(name)] = next((text for text in given if text), "no order was found that keeps more")
    return found
