"""Analysis: one forward pass of the rules over a traced graph gives the Dims of every tensor."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx

from microglia.graph.dims.algebra import Algebra
from microglia.graph.dims.atoms import UNIT, Dim, Misaligned, Segment
from microglia.graph.dims.nodes import concrete, named_arguments, operator_name, shape_of
from microglia.graph.dims.rules import rule_of
from microglia.graph.dims.trace import Trace

Dims = list[Dim]


class Arguments(dict[str, Any]):
    """A node's arguments by schema name, as attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass(frozen=True)
class Consumer:
    """A weight that contracts channels of a value.

    Attributes:
        node: The operator.
        source: The node whose value holds the channels.
        dim: Dimension of the source's value that holds them.
        weight: Name of the weight.
    """

    node: fx.Node
    source: fx.Node
    dim: int
    weight: str


class Analysis:
    """The Dims of every parameter and every intermediate tensor of one traced model.

    Attributes:
        trace: The analysed trace.
        algebra: The algebra with its atoms.
        dims: Node -> Dims of its value (nested lists for nodes with several values, None for numbers).
        parameter_dims: Parameter, buffer or constant -> its Dims; tied tensors share them.
        notes: Node -> Dims by name that its constants depend on (groups, repeats, pads).
        losses: (operation that could not be followed, the Dims that it froze).
        unknown: Operators without a rule, with their numbers of occurrences.
        made: Dims that a weight produces, that is, channels.
        producers: (weight, its dimension that makes channels).
        consumers: Weights that contract channels.
        grouped: Id of the weight of a grouped convolution -> (its dimension of channels per group, the groups).
        macs: Node -> Dims whose product is its multiply-accumulates.
        chosen: Buffers whose entries say which channels an operator takes (see `microglia.graph.selection`).
    """

    def __init__(self, trace: Trace, algebra: Algebra | None = None) -> None:
        self.trace, self.algebra = trace, algebra or Algebra()
        self.dims: dict[fx.Node, Any] = {}
        self.notes: dict[fx.Node, dict[Any, Any]] = {}
        self.losses: list[tuple[str, tuple[Dim, ...]]] = []
        self.unknown: dict[str, int] = {}
        self.made: list[Dim] = []
        self.producers: set[tuple[str, int]] = set()
        self.consumers: list[Consumer] = []
        self.grouped: dict[int, tuple[int, Dim]] = {}
        self.macs: dict[fx.Node, Dims] = {}
        self.chosen = _selections(trace)
        self.parameter_dims = self._of_tensors()
        for node in trace.graph.nodes:
            self._visit(node)

    def _of_tensors(self) -> dict[str, Dims]:
        """Returns one atom per dimension; integer tensors hold positions, so their atoms are frozen, but not of selections."""
        by_id: dict[int, Dims] = {}
        found = {}
        chosen = {self.trace.name_of[node.name] for node in self.chosen}
        for name, tensor in self.trace.tensors.items():
            why = None if tensor.is_floating_point() or name in chosen else f"{name} holds integers"
            if id(tensor) not in by_id:
                by_id[id(tensor)] = [self.algebra.fresh(n, why) for n in tensor.shape]
            found[name] = by_id[id(tensor)]
        return found

    # -------------------------------------------------------------------------------------------- for the rules
    def of(self, node: fx.Node) -> Dims:
        """Returns the Dims of a node's value, in normal form (a new list)."""
        return [self.algebra.normal(d) for d in self.dims[node]]

    def frozen(self, value: Any, why: str) -> Any:
        """Returns frozen Dims for a value or a nest of values."""
        if isinstance(value, Tensor):
            return [self.algebra.fresh(n, why) for n in shape_of(value)]
        if isinstance(value, list | tuple):
            return [self.frozen(v, why) for v in value]
        return None

    def unify(self, left: Dim, right: Dim, node: fx.Node) -> None:
        """States that two Dims are identical; a failure freezes both and is recorded as a loss."""
        if not self.algebra.unify(left, right, node.name):
            self.losses.append((f"{node.name}: {self.algebra.show(left)} against {self.algebra.show(right)}", (left, right)))

    def weighted(self, node: fx.Node, weight: fx.Node, out: int, contracted: int, source: fx.Node, at: int) -> None:  # noqa: PLR0917
        """Records that an operator makes channels with dimension ``out`` of a weight and contracts with ``contracted``."""
        self.made.append(self.dims[weight][out])
        name = self.trace.name_of.get(weight.name)
        if name is not None:
            self.producers.add((name, out))
            self.consumers.append(Consumer(node, source, at, name))

    def per_group(self, node: fx.Node, weight: fx.Node, dim: int, groups: Dim) -> None:
        """Records that entry i of a weight's dimension is a different channel in each group; groups are runs of dimension 0."""
        name = self.trace.name_of.get(weight.name)
        if name is not None and set(weight.users) == {node}:
            self.grouped[id(self.trace.tensors[name])] = dim, groups

    def broadcast(self, operands: Sequence[Dims], node: fx.Node) -> Dims:
        """Returns the Dims of a broadcast: aligned from the right; size 1 carries nothing, the others are unified."""
        out = []
        for k in range(max(len(x) for x in operands), 0, -1):
            here = [x[-k] for x in operands if len(x) >= k and self.algebra.size(self.algebra.normal(x[-k])) != 1]
            for other in here[1:]:
                self.unify(here[0], other, node)
            out.append(here[0] if here else UNIT)
        return out

    def cuts(self, node: fx.Node, dim: Dim, sizes: Sequence[int]) -> Dims:
        """Returns the pieces of a Dim cut to the given sizes."""
        pieces = []
        try:
            rest = self.algebra.normal(dim)
            for size in sizes[:-1]:
                piece, rest = self.algebra.cut(rest, size)
                pieces.append(piece)
        except Misaligned as error:
            self._lose(f"{node.name}: {error}", dim)
            self.algebra.freeze(dim, why=f"{node.name}: cut to {list(sizes)}")
            return [self.algebra.fresh(s, f"{node.name}: cut") for s in sizes]
        return [self.algebra.normal(p) for p in (*pieces, rest)]

    def _lose(self, what: str, dim: Dim) -> None:
        if not self.algebra.is_frozen(dim):
            self.losses.append((what, (dim,)))

    def cuts_rows(self, node: fx.Node, dim: Dim, size: int) -> tuple[Dim | None, Dim]:
        """Returns (rows, a row of the given size), or (None, the frozen Dim) if this split is impossible."""
        try:
            return self.algebra.factor(dim, size)
        except Misaligned as error:
            self._lose(f"{node.name}: {error}", dim)
            self.algebra.freeze(dim, why=f"{node.name}: rows of {size}")
            return None, dim

    def freeze_around(self, node: fx.Node, why: str) -> Any:
        """Freezes all inputs of a node, and returns frozen Dims for its outputs."""
        for source in node.all_input_nodes:
            for dim in _flat(self.dims.get(source)):
                if not self.algebra.is_frozen(dim):
                    self.losses.append((f"{node.name}: {why}", (dim,)))
                self.algebra.freeze(dim, why=f"{node.name}: {why}")
        return self.frozen(node.meta.get("val"), f"{node.name}: {why}")

    # ------------------------------------------------------------------------------------------------ the pass
    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            name = self.trace.name_of.get(node.name)
            self.dims[node] = self.parameter_dims[name] if name else self.frozen(node.meta["val"], "input of the model")
        elif node.op == "output":
            for source in node.all_input_nodes:
                self.algebra.freeze(*_flat(self.dims[source]), why="output of the model")
        elif node.op != "call_function":
            self.dims[node] = None
        elif node.target is operator.getitem:
            below = self.dims[node.args[0]]  # type: ignore[index]
            self.dims[node] = below[node.args[1]] if below is not None else None
        elif not isinstance(node.target, torch._ops.OpOverload) or not _has_tensor(node.meta.get("val")):
            number = not _has_tensor(node.meta.get("val"))
            self.dims[node] = None if number else self._unknown(node)
        else:
            self.dims[node] = self._by_rule(node)
            self._check(node)
            for dim in _flat(self.dims[node]):  # a whole dimension may be broadcast, so it stays
                if self.algebra.size(dim) == 1:
                    self.algebra.keep(dim)

    def _by_rule(self, node: fx.Node) -> Any:
        if (rule := rule_of(node)) is None:
            return self._unknown(node)
        try:
            return rule(self, node, Arguments(named_arguments(node)))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # an overload unknown to the rule
            return self._unknown(node, f" ({type(error).__name__} in its rule)")

    def _unknown(self, node: fx.Node, how: str = "") -> Any:
        name = operator_name(node) + how
        self.unknown[name] = self.unknown.get(name, 0) + 1
        return self.freeze_around(node, f"there is no rule for the operator {name}")

    def _check(self, node: fx.Node) -> None:
        """Raises if a rule's Dims do not have the tensor's shape, which is a mistake in the rule."""
        value = node.meta["val"]
        if isinstance(value, Tensor):
            got = [self.algebra.size(self.algebra.normal(d)) for d in self.dims[node]]
            if got != [concrete(s) for s in value.shape]:
                raise AssertionError(f"the rule of {operator_name(node)} gave {got} for {list(value.shape)}")

    # --------------------------------------------------------------------------------------------- for the reader
    def groups(self, name: str, dim: int) -> Dim:
        """Returns the groups of a convolution if a dimension of its weight holds different channels in each; else the unit."""
        at, groups = self.grouped.get(id(self.trace.tensors[name]), (-1, UNIT))
        return self.algebra.normal(groups) if at == dim else UNIT

    def entries(self, name: str, dim: int) -> Dim:
        """Returns a dimension of a parameter over all its groups, not in one group."""
        groups, own = self.groups(name, dim), self.parameter_dims[name][dim]
        return self.algebra.normal(own) if groups == UNIT else self.algebra.product(groups, own)

    @cached_property
    def rows(self) -> dict[int, int]:
        """Atom -> number of rows that may keep different units, equally many: channels in each group of a convolution.

        Rows are the factors directly before the atom in every dimension of every tensor that has it. Other atoms have no rows:
        their units are the same everywhere.
        """
        algebra = self.algebra
        leads: dict[int, Segment] = {}
        for dim in self._all():
            for segment in algebra.normal(dim):
                for i, factor in enumerate(segment):
                    if isinstance(factor, int):
                        leads[factor] = _common_end(leads.get(factor, segment[:i]), segment[:i])
                    else:
                        leads.update(dict.fromkeys(algebra.leaves(factor), ()))
        sizes = {atom: algebra.size((lead,)) for atom, lead in leads.items()}
        return {atom: rows for atom, rows in sizes.items() if rows > 1}

    def _all(self) -> Iterator[Dim]:
        """Yields every dimension of every tensor; dimensions of grouped weights are over all groups."""
        for node, dims in self.dims.items():
            if node.op != "placeholder" or node.name not in self.trace.name_of:
                yield from _flat(dims)
        for name, dims in self.parameter_dims.items():
            for k in range(len(dims)):
                yield self.entries(name, k)

    def used_parameters(self) -> list[str]:
        """Returns the tensors that some operator reads, in the order of the graph."""
        names = self.trace.name_of
        return [names[n.name] for n in self.trace.graph.nodes if n.op == "placeholder" and n.users and n.name in names]

    def prunable(self) -> list[int]:
        """Returns the atoms that can lose units: unfrozen channels that some weight makes, in a parameter that is used."""
        algebra = self.algebra
        made = {a for dim in self.made for a in algebra.leaves(dim)}
        order = dict.fromkeys(a for p in self.used_parameters() for d in self.parameter_dims[p] for a in algebra.leaves(d))
        return [a for a in order if a in made and not algebra.frozen[a]]

    def warnings(self) -> list[str]:
        """Returns the losses with Dims in a parameter; masks and index tables lose nothing."""
        mine = {a for name in self.used_parameters() for d in self.parameter_dims[name] for a in self.algebra.leaves(d)}
        return [text for text, dims in self.losses if any(a in mine for d in dims for a in self.algebra.leaves(d))]


def _selections(trace: Trace) -> set[fx.Node]:
    """Returns the placeholders of the model's own buffers that are only ever the index of ``index_select``."""
    found = set()
    for node in trace.graph.nodes:
        name = trace.name_of.get(node.name) if node.op == "placeholder" else None
        if name is None or name in trace.constants or not node.users:
            continue
        if all(operator_name(user) == "index_select" and user.args[2:3] == (node,) for user in node.users):
            found.add(node)
    return found


def _common_end(left: Segment, right: Segment) -> Segment:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(left), reversed(right), strict=False))
    return left[len(left) - sum(1 for _ in same) :]


def _flat(dims: Any) -> Iterator[Dim]:
    """Yields the Dims in a nest of lists; a Dim itself is a tuple."""
    if isinstance(dims, tuple):
        yield dims
    elif isinstance(dims, list):
        for d in dims:
            yield from _flat(d)


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(_has_tensor(v) for v in value))
