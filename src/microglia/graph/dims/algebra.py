"""Dimension algebra: what the size of a tensor's dimension is made of, and which of its parts are one and the same.

A `Dim` is a sum of segments, in order; a segment is a product of factors, row-major, the empty product being the size 1; a
factor is an *atom* (an int) or a nested sum: ``heads x (q + k + v)`` needs the nesting. There is one operation, `bind` an atom
to a Dim: to another atom (they are one), to a product of fresh atoms (split by a reshape) or to a sum of fresh atoms (cut by
a slice). Every Dim is read through the bindings, so a split is seen everywhere at once and one pass over a graph is enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Union

import torch
from torch import Tensor

Factor = Union[int, "Dim"]
Segment = tuple[Factor, ...]
Dim = tuple[Segment, ...]

UNIT: Dim = ((),)
"""The dimension of size 1: it never unifies and never splits."""


class Misaligned(Exception):
    """Two factorizations of one size have no common refinement, such as 6 x 4 and 8 x 3."""


class Algebra:
    """The atoms of one model: their sizes, what they are bound to, and what is known of them.

    Attributes:
        sizes: Size of each atom. An atom of size 1 is one entry that was cut off a longer dimension and can still be removed;
            where it would have to be broadcast, or be a dimension of its own, it is kept (see `keep`).
        bound: What the atom was found to be, or None.
        frozen: Whether it must be kept whole.
        renormalized: Whether a reduction runs over it (a norm, a mean), so that removing units is not the same as zeroing.
        reasons: Atom -> why it was frozen first.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.bound: list[Dim | None] = []
        self.frozen: list[bool] = []
        self.renormalized: list[bool] = []
        self.reasons: dict[int, str] = {}
        self._places: dict[tuple[Dim, int, int], Tensor] = {}

    # ------------------------------------------------------------------------------------------------- making dims
    def fresh(self, size: int, frozen: str | None = None) -> Dim:
        """Returns a Dim of one new atom, frozen for the given reason if there is one."""
        if size == 1:
            return UNIT
        self.sizes.append(size)
        self.bound.append(None)
        self.frozen.append(frozen is not None)
        self.renormalized.append(False)
        atom = len(self.sizes) - 1
        if frozen is not None:
            self.reasons[atom] = frozen
        return ((atom,),)

    def _piece(self, size: int) -> Dim:
        """Returns a new atom for a part of a dimension, also where that is a single entry."""
        if size != 1:
            return self.fresh(size)
        self.sizes.append(1)
        self.bound.append(None)
        self.frozen.append(False)
        self.renormalized.append(False)
        return ((len(self.sizes) - 1,),)

    def keep(self, dim: Dim) -> None:
        """Lets every single entry in a Dim of size 1 stay for good: it becomes the unit."""
        for atom in list(self.leaves(dim)):
            self.bind(atom, UNIT)

    def product(self, *dims: Dim) -> Dim:
        """Returns the row-major product, the first the slowest."""
        return (tuple(f for d in dims for f in _factors(self.normal(d))),)

    def sum(self, *dims: Dim) -> Dim:
        """Returns the concatenation."""
        return self.normal(tuple(s for d in dims for s in d))

    # ---------------------------------------------------------------------------------------------------- measuring
    def size(self, dim: Dim) -> int:
        """Returns how many entries a Dim has."""
        return sum(self._segment_size(s) for s in dim)

    def _segment_size(self, segment: Segment) -> int:
        return math.prod(self._factor_size(f) for f in segment)

    def _factor_size(self, factor: Factor) -> int:
        return self.sizes[factor] if isinstance(factor, int) else self.size(factor)

    def count(self, dim: Dim, kept: Mapping[int, int]) -> int:
        """Returns how many entries stay when each atom keeps so many units; atoms not named keep all."""
        total = 0
        for segment in self.normal(dim):
            n = 1
            for f in segment:
                n *= kept.get(f, self.sizes[f]) if isinstance(f, int) else self.count(f, kept)
            total += n
        return total

    # -------------------------------------------------------------------------------------------------- normal form
    def normal(self, dim: Dim) -> Dim:
        """Returns the Dim read through all bindings, products in products and sums in sums flattened."""
        out: list[Segment] = []
        for segment in dim:
            factors: list[Factor] = []
            for f in segment:
                if isinstance(f, int):
                    below = self.bound[f]
                    if below is None:
                        factors.append(f)
                        continue
                    self.bound[f] = seen = self.normal(below)  # path compression
                else:
                    seen = self.normal(f)
                factors.extend(_factors(seen))
            if len(factors) == 1 and not isinstance(factors[0], int):
                out.extend(factors[0])  # a segment that is only a sum
            else:
                out.append(tuple(factors))
        return tuple(out)

    def leaves(self, dim: Dim) -> Iterator[int]:
        """Yields the atoms of a Dim, in order."""
        for segment in self.normal(dim):
            for f in segment:
                if isinstance(f, int):
                    yield f
                else:
                    yield from self.leaves(f)

    def freeze(self, *dims: Dim, why: str) -> None:
        """Keeps every atom of the Dims whole; the first reason is remembered."""
        for dim in dims:
            for atom in self.leaves(dim):
                if not self.frozen[atom]:
                    self.frozen[atom] = True
                    self.reasons.setdefault(atom, why)

    def renormalize(self, *dims: Dim) -> None:
        """Notes that a reduction runs over the Dims."""
        for dim in dims:
            for atom in self.leaves(dim):
                self.renormalized[atom] = True

    def is_frozen(self, dim: Dim) -> bool:
        """Tells whether nothing of a Dim can be removed."""
        return all(self.frozen[a] for a in self.leaves(dim))

    # ---------------------------------------------------------------------------------------------------- splitting
    def bind(self, atom: int, dim: Dim) -> None:
        """States that an atom is this Dim; what is known of the atom is handed on to its parts."""
        if self.bound[atom] is not None or self.size(dim) != self.sizes[atom]:
            raise Misaligned(f"an atom of size {self.sizes[atom]} cannot be bound to {self.show(dim)}")
        dim = self.normal(dim)
        if self.frozen[atom]:
            self.freeze(dim, why=self.reasons.get(atom, "frozen"))
        if self.renormalized[atom]:
            self.renormalize(dim)
        self.bound[atom] = dim

    def cut(self, dim: Dim, n: int) -> tuple[Dim, Dim]:
        """Returns (the first n entries, the rest), splitting atoms everywhere they occur; never fails."""
        dim = self.normal(dim)
        left: Dim = ()
        for i, segment in enumerate(dim):
            size = self._segment_size(segment)
            if n >= size:
                left, n = (*left, segment), n - size
                continue
            if n == 0:
                return left, dim[i:]
            head, tail = self._cut_segment(segment, n)
            return self.normal(left + head), self.normal(tail + dim[i + 1 :])
        return self.normal(left), ()

    def _cut_segment(self, segment: Segment, n: int) -> tuple[Dim, Dim]:
        row = self._segment_size(segment[1:])
        if n % row:
            return self._cut_inside_row(segment, *divmod(n, row))
        head, tail = self._cut_factor(segment[0], n // row)
        return _times(head, segment[1:]), _times(tail, segment[1:])

    def _cut_inside_row(self, segment: Segment, rows: int, rest: int) -> tuple[Dim, Dim]:
        """Unrolls the one row that the cut goes through: rows before it, the row itself in two parts, rows after it."""
        first, second = self.cut((segment[1:],), rest)
        row, lead = self.normal(first + second), self.normal((segment[:1],))
        before, lead = self.cut(lead, rows) if rows else ((), lead)
        one, after = self.cut(lead, 1)
        left = (self.product(before, row) if before else ()) + self.product(one, first)
        return left, self.product(one, second) + (self.product(after, row) if after else ())

    def _cut_factor(self, factor: Factor, n: int) -> tuple[Dim, Dim]:
        if not isinstance(factor, int):
            return self.cut(factor, n)
        left, right = self._piece(n), self._piece(self.sizes[factor] - n)
        self.bind(factor, left + right)
        return self.normal(left), self.normal(right)

    def factor(self, dim: Dim, size: int) -> tuple[Dim, Dim]:
        """Returns (lead, trail) with dim = lead x trail and the trail of this size, splitting atoms everywhere.

        Raises:
            Misaligned: The sizes do not divide at a factor's boundary.
        """
        dim = self.normal(dim)
        if size == 1:
            return dim, UNIT
        if self.size(dim) == size:
            return UNIT, dim
        return self._factor_sum(dim, size) if len(dim) > 1 else self._factor_segment(dim[0], size)

    def _factor_sum(self, dim: Dim, size: int) -> tuple[Dim, Dim]:
        """Every run of segments that fills whole rows is lead_i x the same trail."""
        if self.is_frozen(dim) and any(self._segment_size(s) % size for s in dim):
            raise Misaligned(f"a factor {size} of a sum of {[self._segment_size(s) for s in dim]}")
        leads: Dim = ()
        trail: Dim | None = None
        run: Dim = ()
        for segment in dim:
            run += (segment,)
            if self.size(run) % size:
                continue
            for lead, end in [self.factor(run, size)] if len(run) == 1 else [(UNIT, r) for r in self._rows(run, size)]:
                if trail is None:
                    trail = end
                else:
                    self._unify(trail, end)
                leads += lead
            run = ()
        if trail is None or run:
            raise Misaligned(f"a factor {size} of {self.size(dim)}")
        return self.normal(leads), self.normal(trail)

    def _rows(self, run: Dim, size: int) -> list[Dim]:
        rows = []
        while self.size(run) > size:
            row, run = self.cut(run, size)
            rows.append(row)
        return [*rows, run]

    def _factor_segment(self, segment: Segment, size: int) -> tuple[Dim, Dim]:
        trail: Segment = ()
        while size > 1:
            factor, segment = segment[-1], segment[:-1]
            held = self._factor_size(factor)
            if size % held == 0:
                trail, size = (factor, *trail), size // held
                continue
            if held % size:
                raise Misaligned(f"a factor {size} of {held}")
            if isinstance(factor, int):
                lead, end = self.fresh(held // size), self.fresh(size)
                self.bind(factor, self.product(lead, end))
            else:
                lead, end = self.factor(factor, size)
            segment, trail, size = segment + _factors(self.normal(lead)), _factors(self.normal(end)) + trail, 1
        return self.normal((segment,)), self.normal((trail,))

    # -------------------------------------------------------------------------------------------------- unification
    def unify(self, left: Dim, right: Dim, why: str = "") -> bool:
        """States that two Dims are one and the same; where they have no common form both are frozen and False is returned."""
        if self.size(self.normal(left)) != self.size(self.normal(right)):
            self.freeze(left, right, why=f"{why}: sizes differ")
            return False
        try:
            self._unify(left, right)
        except Misaligned as error:  # what was bound before the failure is sound: it only states equalities
            self.freeze(left, right, why=f"{why}: misaligned, {error}")
            return False
        return True

    def _unify(self, left: Dim, right: Dim) -> None:
        left, right = self.normal(left), self.normal(right)
        if left == right:
            return
        for one, other in ((left, right), (right, left)):
            atom = _lone_atom(one)
            if atom is not None:
                if atom in set(self.leaves(other)):  # itself times single entries
                    self._without_units(other)
                else:
                    self.bind(atom, other)
                return
        if self.size(left) == 1:
            self.keep(left)
            self.keep(right)
            return
        left, right = self._without_units(left), self._without_units(right)
        if len(left) == 1 and len(right) == 1:  # product against product: trailing factors first
            n = min(self._factor_size(left[0][-1]), self._factor_size(right[0][-1]))
            (left_lead, left_trail), (right_lead, right_trail) = self.factor(left, n), self.factor(right, n)
            self._unify(left_trail, right_trail)
            self._unify(left_lead, right_lead)
            return
        n = min(self._segment_size(left[0]), self._segment_size(right[0]))  # leading segment first
        if n == self.size(left):
            raise Misaligned("nested sums")
        (left_head, left_tail), (right_head, right_tail) = self.cut(left, n), self.cut(right, n)
        self._unify(left_head, right_head)
        self._unify(left_tail, right_tail)

    def _without_units(self, dim: Dim) -> Dim:
        """Returns a product without its single entries, which are kept; a sum is returned as it is."""
        if len(dim) != 1:
            return dim
        for factor in dim[0]:
            if self._factor_size(factor) == 1:
                self.keep(((factor,),))
        return self.normal(dim)

    # ------------------------------------------------------------------------------------------------------ reshape
    def regroup(self, dims: Sequence[Dim], shape: Sequence[int], why: str) -> tuple[list[Dim], list[Dim]]:
        """Returns (Dims of the row-major reshape to ``shape``, those that had to be frozen)."""
        dims = [self.normal(d) for d in dims]
        sizes = [self.size(d) for d in dims]
        if 0 in sizes or 0 in shape:
            return [self.fresh(n, why) for n in shape], []
        out: list[Dim] = []
        lost: list[Dim] = []
        for before, after in _matching_groups(sizes, shape):
            try:
                rest, found = self.product(*dims[before]), []
                for n in reversed(shape[after]):
                    rest, dim = self.factor(rest, n)
                    found.append(dim)
                self.keep(rest)
                out += found[::-1]
            except Misaligned:
                lost += [d for d in dims[before] if not self.is_frozen(d)]
                self.freeze(*dims[before], why=f"{why}: {sizes[before]} to {list(shape[after])}")
                out += [self.fresh(n, why) for n in shape[after]]
        return out, lost

    # ---------------------------------------------------------------------------------------------------- kept sets
    def mask(self, dim: Dim, kept: Mapping[int, Tensor]) -> Tensor:
        """Returns which entries of a Dim stay, boolean (size,), given which units of each atom stay.

        An atom's units are (size,), or (rows, size) where the rows it stands behind keep units of their own.
        """
        parts = []
        for segment in self.normal(dim):
            mask = torch.ones(1, dtype=torch.bool)
            for f in segment:
                if isinstance(f, int):
                    below = kept[f] if f in kept else torch.ones(self.sizes[f], dtype=torch.bool)
                else:
                    below = self.mask(f, kept)
                rows = len(below) if below.ndim == 2 else 1
                mask = (mask.view(-1, rows, 1) & below).reshape(-1)
            parts.append(mask)
        return torch.cat(parts) if parts else torch.ones(0, dtype=torch.bool)

    def coordinate(self, dim: Dim, atom: int, rows: int = 1) -> Tensor:
        """Returns for each entry of a Dim which unit of the atom it belongs to, int64 (size,); -1 where to none.

        Where the atom stands behind so many rows, unit u of row r is r * size + u. The same tensor each time, for most
        dimensions of a model are the same Dim: it is not to be written to.
        """
        dim = self.normal(dim)
        if (dim, atom, rows) not in self._places:
            self._places[dim, atom, rows] = self._coordinate(dim, atom) if rows == 1 else self._in_rows(dim, atom, rows)
        return self._places[dim, atom, rows]

    def _in_rows(self, dim: Dim, atom: int, rows: int) -> Tensor:
        parts = []
        for segment in dim:
            place = torch.full((self._segment_size(segment),), -1)
            if atom in segment:
                behind = self._segment_size(segment[segment.index(atom) + 1 :])
                place = torch.arange(len(place)) // behind % (rows * self.sizes[atom])
            parts.append(place)
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def _coordinate(self, dim: Dim, atom: int) -> Tensor:
        parts = []
        for segment in dim:
            place = torch.full((1,), -1)
            for f in segment:
                if isinstance(f, int):
                    below = torch.arange(self.sizes[f]) if f == atom else torch.full((self.sizes[f],), -1)
                else:
                    below = self._coordinate(f, atom)
                place = torch.maximum(place[:, None], below[None, :]).reshape(-1)
            parts.append(place)
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def order(self, dim: Dim, orders: Mapping[int, Tensor]) -> Tensor:
        """Returns which entry of a Dim comes to each place, int64 (size,), given which unit does in some atoms."""
        parts, start = [], 0
        for segment in self.normal(dim):
            place = torch.zeros(1, dtype=torch.int64)
            for f in segment:
                below = self.order(f, orders) if not isinstance(f, int) else orders.get(f, torch.arange(self.sizes[f]))
                place = (place[:, None] * len(below) + below[None, :]).reshape(-1)
            parts.append(place + start)
            start += len(place)
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def show(self, dim: Dim) -> str:
        """Returns a Dim for people: ``a3:12 x (a4:64 + a5:32!)``; ``!`` is frozen, ``~`` renormalized."""

        def one(f: Factor) -> str:
            if not isinstance(f, int):
                return f"({self.show(f)})"
            return f"a{f}:{self.sizes[f]}" + "!" * self.frozen[f] + "~" * self.renormalized[f]

        return " + ".join(" x ".join(one(f) for f in s) or "1" for s in self.normal(dim))


def _factors(dim: Dim) -> Segment:
    """Returns a Dim as factors: those of its only segment, or itself as one nested factor."""
    return dim[0] if len(dim) == 1 else (dim,)


def _times(dim: Dim, tail: Segment) -> Dim:
    """Returns dim x tail; a sum before a tail becomes a nested factor."""
    return (_factors(dim) + tail,) if len(dim) > 1 and tail else tuple(s + tail for s in dim)


def _lone_atom(dim: Dim) -> int | None:
    return dim[0][0] if len(dim) == 1 and len(dim[0]) == 1 and isinstance(dim[0][0], int) else None


def _matching_groups(sizes: Sequence[int], shape: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yields the least runs of dimensions of equal product on both sides of a reshape."""
    i = j = 0
    while i < len(sizes) or j < len(shape):
        i0, j0, left, right = i, j, 1, 1
        if i < len(sizes):
            left, i = sizes[i], i + 1
        if j < len(shape):
            right, j = shape[j], j + 1
        while left != right:
            if left < right:
                left, i = left * sizes[i], i + 1
            else:
                right, j = right * shape[j], j + 1
        yield slice(i0, i), slice(j0, j)
