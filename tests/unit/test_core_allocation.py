"""Allocation: exact totals within bounds, in proportion."""

import math
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from microglia.core.allocation import apportion, check_scope, erk_shares, layer_counts
from microglia.core.errors import BudgetError, UnknownNameError

quick = settings(deadline=None, max_examples=100)
bounded = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20), st.integers(0, 30)), min_size=1, max_size=6)


@quick
@given(bounded, st.data())
def test_apportion_meets_the_total_and_the_bounds(parts: list[tuple[int, int, int]], data: st.DataObject) -> None:
    shares, low, high = [float(s) for s, _, _ in parts], [lo for _, lo, _ in parts], [lo + more for _, lo, more in parts]
    total = data.draw(st.integers(sum(low), sum(high)))
    counts = apportion(shares, total, low, high)
    assert sum(counts) == total
    assert all(lo <= c <= hi for c, lo, hi in zip(counts, low, high, strict=True))
    free = [i for i, c in enumerate(counts) if low[i] < c < high[i]]
    for i in free:  # counts off their bounds stand in the ratio of the shares, up to the rounding of each
        for j in free:
            assert (counts[i] - 1) * shares[j] < (counts[j] + 1) * shares[i]


@quick
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(0, 500))
@example([1, 1, 2, 8, 248, 1000, 64, 378], 92)  # 8 and 378 have equal remainders, which floats do not show
def test_without_bounds_apportion_is_the_largest_remainder_method(shares: list[int], total: int) -> None:
    quotas = [Fraction(total * s, sum(shares)) for s in shares]
    expected = [math.floor(q) for q in quotas]
    for i in sorted(range(len(shares)), key=lambda i: expected[i] - quotas[i])[: total - sum(expected)]:
        expected[i] += 1
    assert apportion([float(s) for s in shares], total, [0] * len(shares), [10**9] * len(shares)) == expected


@pytest.mark.parametrize("total", [2, 31])
def test_bounds_that_do_not_admit_the_total_are_named(total: int) -> None:
    with pytest.raises(BudgetError, match="admit 3 to 30"):
        apportion([1.0, 1.0, 1.0], total, [1, 1, 1], [10, 10, 10])


def test_large_counts_stay_exact() -> None:
    sizes = [10**9 + 7, 3 * 10**8 + 1, 11]
    counts = apportion([float(s) for s in sizes], 123_456_789, [1, 1, 1], sizes)
    assert sum(counts) == 123_456_789
    assert counts[2] == 1


def test_the_layer_scope_gives_each_layer_the_same_density() -> None:
    shapes = {"a": (100, 50), "b": (20, 10), "c": (7, 3)}
    counts = layer_counts(shapes, 1044, "layer", low=dict.fromkeys(shapes, 1), high={"a": 5000, "b": 200, "c": 21})
    assert counts == {"a": 1000, "b": 40, "c": 4}
    assert counts == layer_counts(shapes, 1044, "row", low=dict.fromkeys(shapes, 1), high={"a": 5000, "b": 200, "c": 21})


def test_protected_layers_and_those_with_little_left_hand_on_their_share() -> None:
    shapes = {"a": (10, 10), "b": (10, 10), "c": (10, 10)}
    high = {"a": 100, "b": 100, "c": 7}
    assert layer_counts(shapes, 127, "layer", low=dict.fromkeys(shapes, 1), high=high) == {"a": 60, "b": 60, "c": 7}
    protected = layer_counts(shapes, 127, "layer", low=dict.fromkeys(shapes, 1), high=high, protected=["a"])
    assert protected == {"a": 100, "b": 20, "c": 7}


def test_given_densities_round_half_up_and_ignore_the_total() -> None:
    shapes, low = {"a": (5, 1), "b": (4, 1)}, {"a": 0, "b": 0}
    counts = layer_counts(shapes, 999, {"a": 0.5, "b": 0.25}, low=low, high={"a": 5, "b": 4})
    assert counts == {"a": 3, "b": 1}


def test_erk_shares_are_the_sums_of_the_dimensions() -> None:
    assert erk_shares({"a": (8, 4, 3, 3), "b": (10, 5)}) == {"a": 18.0, "b": 15.0}


def test_scopes_are_checked_by_name() -> None:
    assert check_scope("erk") == "erk"
    assert check_scope({"a": 0.5}) == {"a": 0.5}
    with pytest.raises(UnknownNameError, match="Known: erk, global, layer, row"):
        check_scope("uniform")  # type: ignore[arg-type]
