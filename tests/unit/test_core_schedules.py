"""Schedules: end points exactly, never backwards, their formulas."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microglia.core.errors import UnknownNameError
from microglia.core.schedules import schedules

quick = settings(deadline=None)
densities = st.floats(0.001, 1)
progress = st.floats(-1, 2)


@pytest.mark.parametrize("name", list(schedules))
@quick
@given(start=densities, end=densities)
def test_end_points_are_exact_and_clamped(name: str, start: float, end: float) -> None:
    schedule = schedules[name]
    assert schedule(1.0, start, end) == schedule(7.0, start, end) == end
    assert schedule(0.0, start, end) == schedule(-7.0, start, end) == (end if name == "oneshot" else start)


@pytest.mark.parametrize("name", list(schedules))
@quick
@given(start=densities, end=densities, one=progress, other=progress)
def test_never_backwards_and_never_outside(name: str, start: float, end: float, one: float, other: float) -> None:
    earlier, later = (schedules[name](t, start, end) for t in sorted((one, other)))
    slack = 1e-12
    assert min(start, end) - slack <= later <= max(start, end) + slack
    assert (later - earlier) * (end - start) >= -slack


@quick
@given(densities, densities, st.floats(0, 1))
def test_linear_and_cubic_formulas(start: float, end: float, t: float) -> None:
    assert schedules["linear"](t, start, end) == pytest.approx(start + t * (end - start))
    sparsity = (1 - end) + ((1 - start) - (1 - end)) * (1 - t) ** 3  # survey 10.1, in the paper's sparsity
    assert schedules["cubic"](t, start, end) == pytest.approx(1 - sparsity, abs=1e-12)


@quick
@given(densities, densities, st.integers(1, 30))
def test_equal_steps_of_the_geometric_schedule_keep_the_same_fraction(start: float, end: float, steps: int) -> None:
    path = [schedules["geometric"](i / steps, start, end) for i in range(steps + 1)]
    for before, after in pairwise(path):
        assert after / before == pytest.approx((end / start) ** (1 / steps))


def test_unknown_schedules_are_answered() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'cubic'"):
        schedules["kubic"]
