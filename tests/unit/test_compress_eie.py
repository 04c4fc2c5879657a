"""EIE: its result is the dense product, its work is counted, its cycles follow the queues."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import microglia as mg
from microglia.compress import open_packed
from microglia.compress.eie import Costs, Layout, lay_out, multiply, multiply_fixed, simulate
from microglia.compress.engine_rows import Machine, engine_rows
from microglia.compress.relative_index import decode_gaps, encode_gaps
from microglia.core.errors import FileError, MicrogliaError

RANDOM = np.random.default_rng(0)
TABLE = np.concatenate([[0], RANDOM.integers(-9, 10, size=15)])
ELEMENTS = pytest.mark.parametrize("elements", [1, 3, 4, 64])


def matrix(rows: int, columns: int, density: float) -> np.ndarray:
    codes = RANDOM.integers(1, 16, size=(rows, columns))
    return np.where(RANDOM.random((rows, columns)) < density, codes, 0)


def activations(columns: int, density: float = 0.4) -> np.ndarray:
    return np.where(RANDOM.random(columns) < density, RANDOM.integers(1, 9, size=columns), 0)


@ELEMENTS
@pytest.mark.parametrize(
    ("rows", "columns", "density"), [(130, 17, 0.1), (65, 40, 0.02), (7, 9, 1.0), (200, 5, 0.0), (1, 1, 1.0)]
)
def test_the_result_is_the_dense_product(elements: int, rows: int, columns: int, density: float) -> None:
    """Exact in integers, with fillers, ragged rows and empty columns."""
    codes, a = matrix(rows, columns, density), activations(columns)
    layout = lay_out(codes, elements)
    assert np.array_equal(multiply(layout, TABLE, a, relu=False), TABLE[codes] @ a)
    assert np.array_equal(multiply(layout, TABLE, a), np.maximum(TABLE[codes] @ a, 0))
    kept = layout.codes != 0
    row, column = layout.places()
    again = np.zeros_like(codes)
    again[row[kept], column[kept]] = layout.codes[kept]
    assert np.array_equal(again, codes)


def test_runs_are_local_to_the_element_and_long_ones_have_fillers() -> None:
    codes = np.zeros((100, 1), dtype=int)
    codes[[0, 34, 36, 98], 0] = [1, 2, 3, 4]  # of element 0 of 2: its rows 0, 17, 18, 49
    layout = lay_out(codes, 2)
    assert layout.runs.tolist() == [0, 15, 0, 0, 15, 14]
    assert layout.codes.tolist() == [1, 0, 2, 3, 0, 4]
    assert layout.pointers.tolist() == [[0, 6], [0, 0]]


def test_one_element_is_the_relative_index_of_each_column() -> None:
    codes = matrix(300, 6, 0.03)
    layout = lay_out(codes, 1)
    for column in range(6):
        positions = np.flatnonzero(codes[:, column])
        runs = layout.runs[layout.pointers[0, column] : layout.pointers[0, column + 1]]
        gaps, entries = encode_gaps(positions, 4)
        assert np.array_equal(runs, gaps)
        assert np.array_equal(decode_gaps(runs)[entries], positions)


@ELEMENTS
def test_the_work_is_that_of_the_columns_in_use(elements: int) -> None:
    codes, a = matrix(150, 30, 0.05), activations(30)
    layout = lay_out(codes, elements)
    expected = sum(int(layout.work[:, j].sum()) for j in np.flatnonzero(a))
    found = simulate(layout, a)
    assert found.work == expected
    assert found.work >= np.count_nonzero(codes[:, a != 0])
    assert found.total >= found.ideal
    assert 0 < found.balance <= 1
    assert simulate(layout, np.zeros(30)).total == simulate(layout, np.zeros(30)).work == 0


def slow(layout: Layout, a: np.ndarray, depth: int) -> int:
    """The engine cycle by cycle: real queues, real counters."""
    work, pending = layout.work, [int(j) for j in np.flatnonzero(a)]
    queues: list[list[int]] = [[] for _ in range(layout.elements)]
    left, cycle = [0] * layout.elements, 0
    while pending or any(queues) or any(left):
        for p, queue in enumerate(queues):
            left[p] = max(0, left[p] - 1)
            if left[p] == 0 and queue:
                left[p] = max(1, int(work[p, queue.pop(0)]))
        if pending and all(len(queue) < depth for queue in queues):
            j = pending.pop(0)
            for queue in queues:
                queue.append(j)
        cycle += 1
    return cycle - 1 if a.any() else 0


@pytest.mark.parametrize(("elements", "depth"), list(itertools.product([1, 3, 8], [1, 2, 8, 100])))
def test_the_cycles_are_those_of_an_engine_stepped_by_hand(elements: int, depth: int) -> None:
    for density in (0.02, 0.2, 0.7):
        codes, a = matrix(40, 25, density), activations(25, 0.7)
        layout = lay_out(codes, elements)
        assert simulate(layout, a, depth=depth).total == slow(layout, a, depth)


def test_deeper_queues_balance_the_load() -> None:
    layout, a = lay_out(matrix(512, 300, 0.1), 64), activations(300, 0.5)
    balances = [simulate(layout, a, depth=depth).balance for depth in (1, 2, 4, 8, 64)]
    assert balances == sorted(balances)
    assert balances[-1] > balances[0] + 0.1


def test_saturation_and_its_absence() -> None:
    codes, a = matrix(50, 20, 0.3), activations(20)
    layout, table = lay_out(codes, 4), TABLE / 8
    np.testing.assert_allclose(multiply_fixed(layout, table, a / 4), multiply(layout, table, a / 4))  # exact in the fraction
    full = lay_out(np.ones((3, 40), dtype=int), 2)
    assert multiply_fixed(full, [0, 100.0], np.ones(40), fraction=8).tolist() == [(2**15 - 1) / 256] * 3
    assert multiply_fixed(full, [0, -100.0], np.ones(40), fraction=8, relu=False).tolist() == [-128.0] * 3


def test_energy_is_power_times_time() -> None:
    found = simulate(lay_out(matrix(64, 50, 0.2), 4), np.ones(50))
    assert Costs().engine(found, 800) == pytest.approx(4 * 9.157e-3 * found.total / 800e6 * 1e6)
    assert Costs().dense(1000, 1000) == pytest.approx(644.6)


def test_a_file_without_shared_linear_layers_is_refused(tmp_path: Path) -> None:
    mg.pack(nn.Sequential(nn.Linear(30, 30)), tmp_path / "m.mgpack")
    with pytest.raises(FileError, match="--bits 4"):
        engine_rows(open_packed(tmp_path / "m.mgpack"), Machine())


def test_wrong_input() -> None:
    with pytest.raises(MicrogliaError, match="matrix"):
        lay_out(np.zeros(3), 2)
    with pytest.raises(MicrogliaError, match="at least one element"):
        lay_out(np.zeros((3, 3)), 0)
    with pytest.raises(MicrogliaError, match="depth"):
        simulate(lay_out(np.ones((3, 3)), 1), np.ones(3), depth=0)
