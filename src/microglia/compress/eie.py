"""EIE, the engine that multiplies from the compressed form: its layout, its result, its cycles, its energy.

b = W a for W (m, n) as codes. Element p of P owns the rows i with i mod P = p. For each column it stores a code and a run for
each of its entries: the run z is the number of its own zero rows since the entry before, at most 15. A longer run has fillers
(z = 15, code 0), each of which covers 16 rows. Pointers mark where columns begin. A column is skipped where a is zero.

Source: Han et al. 2016, "EIE: Efficient Inference Engine on Compressed Deep Neural Network".
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from microglia.core.errors import MicrogliaError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
RUN = 16
"""Rows that a filler covers: runs have four bits."""


@dataclass(frozen=True)
class Layout:
    """A matrix in the interleaved form; entries are sorted by (element, column, row), fillers included.

    Attributes:
        rows: Rows m of the matrix.
        columns: Columns n.
        elements: Elements P.
        codes: Codes, uint8 (entries,); 0 for a filler.
        runs: Zero rows before each entry, uint8 (entries,).
        pointers: Where each element's columns begin, int64 (P, n + 1), counted from the element's own first entry.
    """

    rows: int
    columns: int
    elements: int
    codes: npt.NDArray[np.uint8]
    runs: npt.NDArray[np.uint8]
    pointers: Ints

    @property
    def work(self) -> Ints:
        """Entries of each element in each column, int64 (P, n)."""
        return np.diff(self.pointers, axis=1)

    def places(self) -> tuple[Ints, Ints]:
        """Returns the row and the column of every entry, int64 (entries,); a filler's row is the last one it covers."""
        work = self.work.reshape(-1)
        segment = np.repeat(np.arange(work.size), work)
        steps = np.cumsum(self.runs.astype(np.int64) + 1)
        before = np.concatenate([[0], steps])[np.cumsum(work) - work]
        local = steps - before[segment] - 1
        return local * self.elements + segment // self.columns, segment % self.columns


def lay_out(codes: npt.ArrayLike, elements: int) -> Layout:
    """Returns the interleaved form of a matrix of codes.

    Args:
        codes: Codes below 256, (m, n); 0 is a zero.
        elements: Number of elements P, at least 1.

    Raises:
        MicrogliaError: The codes are no matrix, or there is no element.
    """
    matrix = np.asarray(codes)
    if matrix.ndim != 2 or elements < 1:
        raise MicrogliaError(f"EIE takes a matrix and at least one element; got the shape {matrix.shape} and {elements}.")
    rows, columns = matrix.shape
    row, column = np.nonzero(matrix)
    order = np.lexsort((row, column, row % elements))
    row, column = row[order], column[order]
    segment, local = (row % elements) * columns + column, row // elements
    first = np.concatenate([[True], segment[1:] != segment[:-1]]) if row.size else np.zeros(0, dtype=bool)
    zeros = local - np.where(first, -1, np.concatenate([[0], local[:-1]]) if row.size else local) - 1
    fillers = zeros // RUN
    ends = np.cumsum(fillers + 1)
    total = int(ends[-1]) if ends.size else 0
    stored, runs = np.zeros(total, dtype=np.uint8), np.full(total, RUN - 1, dtype=np.uint8)
    stored[ends - 1], runs[ends - 1] = matrix[row, column], zeros % RUN
    counts = np.bincount(segment, fillers + 1, minlength=elements * columns).astype(np.int64).reshape(elements, columns)
    pointers = np.concatenate([np.zeros((elements, 1), dtype=np.int64), np.cumsum(counts, axis=1)], axis=1)
    return Layout(rows, columns, elements, stored, runs, pointers)


def multiply(layout: Layout, table: npt.ArrayLike, activations: npt.ArrayLike, *, relu: bool = True) -> Floats:
    """Returns b = ReLU(W a), float64 (m,); only entries in columns of non-zero activations are used.

    Args:
        layout: The matrix.
        table: Value of each code, (k,); entry 0 is zero.
        activations: a, (n,).
        relu: Whether negative sums become zero.
    """
    values, a = np.asarray(table, dtype=np.float64), np.asarray(activations, dtype=np.float64)
    row, column = layout.places()
    used = np.flatnonzero((a[column] != 0) & (layout.codes != 0))
    products = values[layout.codes[used]] * a[column[used]]
    b: Floats = np.bincount(row[used], products, minlength=layout.rows).astype(np.float64)
    return np.maximum(b, 0.0) if relu else b


def multiply_fixed(
    layout: Layout, table: npt.ArrayLike, activations: npt.ArrayLike, *, fraction: int = 8, relu: bool = True
) -> Floats:
    """Returns the result of 16-bit fixed point: products are rounded, and every addition saturates, in the engine's order.

    Args:
        layout: The matrix.
        table: Value of each code, (k,).
        activations: a, (n,).
        fraction: Bits behind the point of values, activations and sums.
        relu: Whether negative sums become zero.
    """
    low, high, scale = -(2**15), 2**15 - 1, 2.0**fraction
    values, a = (np.clip(np.rint(np.asarray(x, dtype=np.float64) * scale), low, high) for x in (table, activations))
    row, column = layout.places()
    used = np.flatnonzero((a[column] != 0) & (layout.codes != 0))
    used = used[np.argsort(column[used], kind="stable")]
    products = np.rint(values[layout.codes[used]] * a[column[used]] / scale)
    sums = np.zeros(layout.rows)
    ends = np.searchsorted(column[used], np.arange(layout.columns + 1))
    for begin, end in pairwise(ends):  # a column has each row once
        own = row[used[begin:end]]
        sums[own] = np.clip(sums[own] + products[begin:end], low, high)
    return np.maximum(sums, 0.0) / scale if relu else sums / scale


@dataclass(frozen=True)
class Cycles:
    """The time of one product on the engine.

    Attributes:
        total: Cycles until the last element is done.
        work: Entries that all elements read together, fillers included.
        elements: Elements P.
    """

    total: int
    work: int
    elements: int

    @property
    def ideal(self) -> float:
        """Cycles of a perfectly balanced engine."""
        return self.work / self.elements

    @property
    def balance(self) -> float:
        """Load-balance efficiency: the fraction of cycles in which an element works, in [0, 1]."""
        return self.work / (self.elements * self.total) if self.total else 1.0


def simulate(layout: Layout, activations: npt.ArrayLike, *, depth: int = 8) -> Cycles:
    """Returns the cycles of one product with a queue of activations before each element.

    Activation j is broadcast at t_j, at most one in a cycle, and only if no queue is full: all elements have taken the
    activation ``depth`` places before. Element p takes it at s_pj, after its arrival and after its own earlier work. It then
    reads one entry in a cycle. A column without entries takes one cycle, that of its pointers:

        t_j = max(t_(j-1) + 1, max_p s_p(j-depth));  s_pj = max(t_j + 1, s_p(j-1) + max(1, entries_p(j-1)))

    Args:
        layout: The matrix.
        activations: a, (n,); zeros are skipped and take no time.
        depth: Length of the queues, at least 1.

    Raises:
        MicrogliaError: The depth is below 1.
    """
    if depth < 1:
        raise MicrogliaError(f"A queue has a depth of at least 1; got {depth}.")
    work = layout.work[:, np.flatnonzero(np.asarray(activations))]
    busy = np.maximum(work, 1).T
    free = np.zeros(layout.elements, dtype=np.int64)
    latest = np.zeros(len(busy), dtype=np.int64)  # when the last element takes each activation
    sent = -1
    for number, own in enumerate(busy):
        sent = max(sent + 1, int(latest[number - depth]) if number >= depth else 0)
        taken = np.maximum(free, sent + 1)
        latest[number] = taken.max()
        free = taken + own
    return Cycles(int(free.max()) if len(busy) else 0, int(work.sum()), layout.elements)


@dataclass(frozen=True)
class Costs:
    """Costs of one operation at 45 nm, and the power of an element.

    Attributes:
        dram: Picojoules of a 32-bit read from DRAM.
        multiply: Picojoules of a 32-bit floating-point product.
        add: Picojoules of a 32-bit floating-point sum.
        element: Milliwatts of one element at work, its memories included.

    Source: Han et al. 2016, "EIE", tables 1 and 2, as the specification quotes them from memory (corrections, C10).
    """

    dram: float = 640.0
    multiply: float = 3.7
    add: float = 0.9
    element: float = 9.157

    def engine(self, cycles: Cycles, clock: float) -> float:
        """Returns the microjoules of one product at a clock in MHz; an idle element is counted as one at work."""
        return self.element * cycles.elements * cycles.total / clock / 1000

    def dense(self, rows: int, columns: int) -> float:
        """Returns the microjoules of the dense product, all weights read once from DRAM."""
        return rows * columns * (self.dram + self.multiply + self.add) / 1e6
