"""Atoms and Dims: the composition of the size of a tensor's dimension, read through all bindings.

A `Dim` is a sum of segments, in order; a segment is a product of factors, row-major, the empty product being the size 1; a
factor is an *atom* (an int) or a nested sum: ``heads x (q + k + v)`` needs the nesting. An atom may be *bound* to a Dim, and
every Dim is read through the bindings. `microglia.graph.dims.algebra` finds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Union

import torch
from torch import Tensor

Factor = Union[int, "Dim"]
Segment = tuple[Factor, ...]
Dim = tuple[Segment, ...]

UNIT: Dim = ((),)
"""The dimension of size 1; it never unifies and never splits."""


class Misaligned(Exception):
    """Two factorizations of one size have no common refinement, such as 6 x 4 and 8 x 3."""


class Atoms:
    """The atoms of one model: their sizes, bindings and known properties, and Dims read through these.

    Attributes:
        sizes: Size of each atom. An atom of size 1 is one entry that was cut off a longer dimension and can still be removed;
            if it has to be broadcast, or is a whole dimension, it is kept (see `keep`).
        bound: The Dim to which the atom is bound, or None.
        frozen: Whether it must be kept whole.
        renormalized: Whether a reduction runs over it (a norm, a mean), so that removing units differs from zeroing.
        reasons: Atom -> the first reason why it was frozen.
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

    def keep(self, dim: Dim) -> None:
        """Keeps every single entry in a Dim of size 1 for ever: it becomes the unit."""
        for atom in list(self.leaves(dim)):
            self.bind(atom, UNIT)

    def product(self, *dims: Dim) -> Dim:
        """Returns the row-major product; the first factor is the slowest."""
        return (tuple(f for d in dims for f in factors_of(self.normal(d))),)

    def sum(self, *dims: Dim) -> Dim:
        """Returns the concatenation."""
        return self.normal(tuple(s for d in dims for s in d))

    # ---------------------------------------------------------------------------------------------------- measuring
    def size(self, dim: Dim) -> int:
        """Returns the number of entries of a Dim."""
        return sum(self._segment_size(s) for s in dim)

    def _segment_size(self, segment: Segment) -> int:
        return math.prod(self._factor_size(f) for f in segment)

    def _factor_size(self, factor: Factor) -> int:
        return self.sizes[factor] if isinstance(factor, int) else self.size(factor)

    def count(self, dim: Dim, kept: Mapping[int, int]) -> int:
        """Returns the number of entries that stay for given units per atom; other atoms keep all."""
        total = 0
        for segment in self.normal(dim):
            n = 1
            for f in segment:
                n *= kept.get(f, self.sizes[f]) if isinstance(f, int) else self.count(f, kept)
            total += n
        return total

    # -------------------------------------------------------------------------------------------------- normal form
    def normal(self, dim: Dim) -> Dim:
        """Returns the Dim read through all bindings, with nested products and nested sums flattened."""
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
                factors.extend(factors_of(seen))
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
        """Freezes every atom of the Dims; the first reason is kept."""
        for dim in dims:
            for atom in self.leaves(dim):
                if not self.frozen[atom]:
                    self.frozen[atom] = True
                    self.reasons.setdefault(atom, why)

    def renormalize(self, *dims: Dim) -> None:
        """Records that a reduction runs over the Dims."""
        for dim in dims:
            for atom in self.leaves(dim):
                self.renormalized[atom] = True

    def is_frozen(self, dim: Dim) -> bool:
        """Tells whether no entry of a Dim can be removed."""
        return all(self.frozen[a] for a in self.leaves(dim))

    def bind(self, atom: int, dim: Dim) -> None:
        """States that an atom equals this Dim; the atom's known properties pass on to the parts."""
        if self.bound[atom] is not None or self.size(dim) != self.sizes[atom]:
            raise Misaligned(f"an atom of size {self.sizes[atom]} cannot be bound to {self.show(dim)}")
        dim = self.normal(dim)
        if self.frozen[atom]:
            self.freeze(dim, why=self.reasons.get(atom, "frozen"))
        if self.renormalized[atom]:
            self.renormalize(dim)
        self.bound[atom] = dim

    # ---------------------------------------------------------------------------------------------------- kept sets
    def mask(self, dim: Dim, kept: Mapping[int, Tensor]) -> Tensor:
        """Returns the entries of a Dim that stay, boolean (size,), from the units of each atom that stay.

        An atom's units are (size,), or (rows, size) if the rows before it keep different units.
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
        """Returns the unit of an atom to which each entry of a Dim belongs, int64 (size,); -1 for none.

        With rows before the atom, unit u of row r is r * size + u. The result is a cached tensor, because most dimensions of a
        model are the same Dim; do not write to it.
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
        """Returns the entry of a Dim for each position, int64 (size,), from the orders of units in some atoms."""
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
        """Returns a Dim as readable text: ``a3:12 x (a4:64 + a5:32!)``; ``!`` is frozen, ``~`` renormalized."""

        def one(f: Factor) -> str:
            if not isinstance(f, int):
                return f"({self.show(f)})"
            return f"a{f}:{self.sizes[f]}" + "!" * self.frozen[f] + "~" * self.renormalized[f]

        return " + ".join(" x ".join(one(f) for f in s) or "1" for s in self.normal(dim))


def factors_of(dim: Dim) -> Segment:
    """Returns a Dim as factors: the factors of its only segment, or itself as one nested factor."""
    return dim[0] if len(dim) == 1 else (dim,)
