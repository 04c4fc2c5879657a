"""Budgets: counts from fractions, and clear answers to wrong ones."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microglia.core.budget import Budget
from microglia.core.errors import BudgetError

quick = settings(deadline=None)
counts = st.integers(1, 10**9).flatmap(lambda prunable: st.tuples(st.just(prunable), st.integers(prunable, 2 * prunable)))


@quick
@given(counts, st.floats(1, 64))
def test_params_hit_the_overall_compression_within_one_weight(count: tuple[int, int], compression: float) -> None:
    prunable, total = count
    fraction = (total / compression - (total - prunable)) / prunable  # ShrinkBench, survey section 6
    if fraction * prunable < -0.5:
        with pytest.raises(BudgetError, match="cannot be met"):
            Budget(params=1 / compression).kept_weights(prunable, total)
    elif fraction * prunable > 0.51:
        kept = Budget(params=1 / compression).kept_weights(prunable, total)
        assert abs(kept - fraction * prunable) < 0.51
        assert abs(kept + total - prunable - total / compression) < 0.51
        assert 0 < kept <= prunable


@quick
@given(counts, st.floats(1e-9, 1))
def test_density_is_the_nearest_count(count: tuple[int, int], density: float) -> None:
    kept = Budget(density=density).kept_weights(*count)
    assert abs(kept - density * count[0]) <= 0.5 + 1e-6
    assert 0 <= kept <= count[0]


@quick
@given(counts, st.floats(0.01, 1), st.floats(0.6, 1))
def test_several_together_take_the_tightest(count: tuple[int, int], density: float, params: float) -> None:
    alone = Budget(density=density).kept_weights(*count)
    try:
        other = Budget(params=params).kept_weights(*count)
    except BudgetError:
        with pytest.raises(BudgetError, match="params"):
            Budget(density=density, params=params).kept_weights(*count)
    else:
        assert Budget(density=density, params=params).kept_weights(*count) == min(alone, other)


def test_halves_round_up() -> None:
    assert [Budget(density=0.5).kept_weights(n, n) for n in (1, 3, 5)] == [1, 2, 3]
    assert Budget(density=1.0).kept_weights(7, 9) == 7


def test_an_infeasible_compression_names_the_limit() -> None:
    # LeNet-300-100: 410 biases of 266,610 parameters
    with pytest.raises(BudgetError, match=r"410 of 266,610 parameters .* above 0\.0015"):
        Budget(params=0.0015).kept_weights(266_200, 266_610)
    assert Budget(params=1 / 600).kept_weights(266_200, 266_610) == 444 - 410


@pytest.mark.parametrize("name", ["density", "params"])
@pytest.mark.parametrize("value", [0, 1.5, -1, "abc", True, math.nan, math.inf, [0.5]])
def test_wrong_values_are_answered_with_their_name(name: str, value: object) -> None:
    with pytest.raises(BudgetError, match=rf"^{name} is "):
        Budget(**{name: value})  # type: ignore[arg-type]


def test_hints() -> None:
    with pytest.raises(BudgetError, match=r"Did you mean 0\.2\?"):
        Budget(density=20)
    with pytest.raises(BudgetError, match="Nothing would be left"):
        Budget(density=0)
    with pytest.raises(BudgetError, match="at least one of density, params"):
        Budget()


def test_text() -> None:
    assert str(Budget(density=0.2, params=0.25)) == "density 0.2, params 0.25"
    assert str(Budget(params=0.25)) == "params 0.25"
