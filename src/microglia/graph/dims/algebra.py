"""Dimension algebra: finds the parts of a model's dimensions that are identical.

There is one operation, `bind` an atom to a Dim (see `microglia.graph.dims.atoms`): to another atom (both are identical), to a
product of fresh atoms (split by a reshape) or to a sum of fresh atoms (cut by a slice). Every Dim is read through the bindings,
so a split takes effect everywhere at once, and one pass over a graph is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from microglia.graph.dims.atoms import UNIT, Atoms, Dim, Factor, Misaligned, Segment, factors_of


class Algebra(Atoms):
    """Splits, cuts and unifies Dims by binding atoms."""

    # ---------------------------------------------------------------------------------------------------- splitting
    def _piece(self, size: int) -> Dim:
        """Returns a new atom for a part of a dimension, which may be a single entry."""
        if size != 1:
            return self.fresh(size)
        self.sizes.append(1)
        self.bound.append(None)
        self.frozen.append(False)
        self.renormalized.append(False)
        return ((len(self.sizes) - 1,),)

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
        """Factors a sum: every run of segments that fills whole rows is lead_i x the same trail."""
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
            segment, trail, size = segment + factors_of(self.normal(lead)), factors_of(self.normal(end)) + trail, 1
        return self.normal((segment,)), self.normal((trail,))

    # -------------------------------------------------------------------------------------------------- unification
    def unify(self, left: Dim, right: Dim, why: str = "") -> bool:
        """States that two Dims are identical; without a common form both are frozen and False is returned."""
        if self.size(self.normal(left)) != self.size(self.normal(right)):
            self.freeze(left, right, why=f"{why}: sizes differ")
            return False
        try:
            self._unify(left, right)
        except Misaligned as error:  # bindings before the failure are sound: they only state equalities
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
        """Returns a product without its single entries, which are kept; a sum is returned unchanged."""
        if len(dim) != 1:
            return dim
        for factor in dim[0]:
            if self._factor_size(factor) == 1:
                self.keep(((factor,),))
        return self.normal(dim)

    # ------------------------------------------------------------------------------------------------------ reshape
    def regroup(self, dims: Sequence[Dim], shape: Sequence[int], why: str) -> tuple[list[Dim], list[Dim]]:
        """Returns (Dims of the row-major reshape to ``shape``, Dims that had to be frozen)."""
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


def _times(dim: Dim, tail: Segment) -> Dim:
    """Returns dim x tail; a sum before a tail becomes a nested factor."""
    return (factors_of(dim) + tail,) if len(dim) > 1 and tail else tuple(s + tail for s in dim)


def _lone_atom(dim: Dim) -> int | None:
    return dim[0][0] if len(dim) == 1 and len(dim[0]) == 1 and isinstance(dim[0][0], int) else None


def _matching_groups(sizes: Sequence[int], shape: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yields the minimal runs of dimensions with equal product on both sides of a reshape."""
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
