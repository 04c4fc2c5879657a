"""Numbers known beforehand: layer densities of RigL's ERK, the cubic schedule, the budgets of ShrinkBench."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microglia.core.allocation import layer_counts
from microglia.core.budget import Budget
from microglia.core.schedules import schedules

LENET = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
RESNET20 = {"conv": (16, 3, 3, 3), "fc": (10, 64)} | {
    f"layer{g}.{b}.conv{c}": (16 * 2**g, 16 * 2 ** (g - 1 if g and b == 0 and c == 1 else g), 3, 3)
    for g in range(3)
    for b in range(3)
    for c in (1, 2)
}

layers = st.lists(
    st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=8
)


def counts_of(shapes: dict[str, tuple[int, ...]], keep: int) -> dict[str, int]:
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return layer_counts(shapes, keep, "erk", low=dict.fromkeys(shapes, 0), high=sizes)


def rigl_densities(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """The loop of RigL: solve for the factor, make layers above density 1 dense, solve again (survey section 9)."""
    dense: set[str] = set()
    while True:
        rest = [n for n in shapes if n not in dense]
        wanted = density * sum(math.prod(s) for s in shapes.values()) - sum(math.prod(shapes[n]) for n in dense)
        factor = wanted / sum(sum(shapes[n]) for n in rest) if rest else 0.0
        raw = {n: factor * sum(shapes[n]) / math.prod(shapes[n]) for n in rest}
        if not (over := {n for n, d in raw.items() if d > 1}):
            return {n: raw.get(n, 1.0) for n in shapes}
        dense |= over


@settings(deadline=None)
@given(layers, st.floats(0.01, 0.99))
def test_erk_agrees_with_the_loop_of_rigl_and_its_total_is_exact(shapes: list[tuple[int, ...]], density: float) -> None:
    named = {str(i): shape for i, shape in enumerate(shapes)}
    total = sum(math.prod(s) for s in shapes)
    keep = round(density * total)
    counts, expected = counts_of(named, keep), rigl_densities(named, keep / total)
    assert sum(counts.values()) == keep
    for name, shape in named.items():
        assert abs(counts[name] - expected[name] * math.prod(shape)) < 1 + 1e-6


def test_erk_of_lenet_300_100_at_one_tenth() -> None:
    # 26,620 kept; fc3 would get 110 * 16.7 = 1837 > 1000, so it is dense; 25,620 / 1,484 = 17.264... for each dimension
    assert counts_of(LENET, 26_620) == {"fc1": 18_714, "fc2": 6_906, "fc3": 1_000}


def test_erk_of_resnet_20_at_one_tenth() -> None:
    counts = counts_of(RESNET20, 26_834)
    assert sum(counts.values()) == 26_834
    assert sum(math.prod(s) for s in RESNET20.values()) == 268_336  # survey 0.5
    density = {name: counts[name] / math.prod(RESNET20[name]) for name in RESNET20}
    assert density["conv"] == density["fc"] == 1.0
    assert density["layer0.0.conv1"] / density["layer2.2.conv2"] == pytest.approx((38 / 2304) / (134 / 36864), rel=2e-3)


@pytest.mark.parametrize(("step", "sparsity"), [(0, 0.0), (25, 0.5203125), (50, 0.7875), (75, 0.8859375), (100, 0.9)])
def test_the_cubic_schedule_of_gradual_magnitude_pruning(step: int, sparsity: float) -> None:
    assert 1 - schedules["cubic"](step / 100, 1.0, 0.1) == pytest.approx(sparsity)


def test_the_cubic_schedule_is_steepest_at_the_start() -> None:
    path = [schedules["cubic"](i / 50, 1.0, 0.05) for i in range(51)]
    steps = [a - b for a, b in pairwise(path)]
    assert steps == sorted(steps, reverse=True)


def test_ten_rounds_of_a_lottery_ticket_keep_four_fifths_each() -> None:
    path = [schedules["geometric"](i / 10, 1.0, 0.8**10) for i in range(11)]
    assert path == pytest.approx([0.8**i for i in range(11)])


@pytest.mark.parametrize(
    ("total", "prunable"), [(266_610, 266_200), (272_474, 270_896), (853_018, 848_944), (14_724_042, 14_715_584)]
)  # survey 0.5: LeNet-300-100, ResNet-20, ResNet-56, VGG-16
@pytest.mark.parametrize("compression", [1, 2, 4, 8, 16, 32, 64])
def test_the_fraction_to_keep_of_shrinkbench(total: int, prunable: int, compression: int) -> None:
    kept = Budget(params=1 / compression).kept_weights(prunable, total)
    fraction = (total / compression - (total - prunable)) / prunable
    assert kept == pytest.approx(fraction * prunable, abs=0.51)
    assert total / (total - prunable + kept) == pytest.approx(compression, rel=compression / total)
