"""Targets of the gates: both rules against brute force, the example of the poster, nesting, symmetries, dead layers, NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from microglia.core.errors import BudgetError, UnknownNameError
from microglia.dynamic import RULES, Rule, mass, targets
from microglia.dynamic.targets import TOLERANCE

POSTER = torch.tensor([[5.5, 7.9, 0.3, 8.6, 2.2, 3.1, 0.9]])
PEAKS = st.lists(
    st.one_of(st.just(0.0), st.integers(1, 12).map(float), st.floats(2.0**-23, 100, width=32)), min_size=1, max_size=8
)
R = st.one_of(st.floats(0.01, 1), st.sampled_from([0.25, 0.5, 0.75, 0.999, 0.99999, 0.9999999, 1.0]))


def share_of(peaks: list[float]) -> Tensor:
    return mass(torch.tensor([peaks])[:, :, None, None])


def ranked(share: list[float]) -> list[int]:
    """The filters by falling share, of equal ones the first first."""
    return sorted(range(len(share)), key=lambda c: (-share[c], c))


def brute_force(share: list[float], r: float, rule: Rule) -> set[int]:
    """Tries every number of leading filters."""
    order, count = ranked(share), len(share)
    prefixes = [order[:k] for k in range(count + 1)]
    held = [sum(share[c] for c in prefix) for prefix in prefixes]
    if rule == "prefix_le":
        fits = [k for k in range(count + 1) if held[k] <= r + TOLERANCE and all(share[c] > TOLERANCE for c in prefixes[k])]
        best = max(fits)
    else:
        fits = [k for k in range(count + 1) if held[k] >= r - TOLERANCE or k == sum(s > 0 for s in share)]
        best = min(fits)
    return set(order[: max(1, best)])


def kept(mask: Tensor) -> set[int]:
    return set(mask[0].nonzero()[:, 0].tolist())


def near_a_boundary(share: list[float], r: float) -> bool:
    """Whether the order of the sums in float64 decides."""
    total = 0.0
    for c in ranked(share):
        total += share[c]
        if min(abs(total - r - TOLERANCE), abs(total - r + TOLERANCE)) < 1e-12:
            return True
    return False


@pytest.mark.parametrize("rule", ["prefix_le", "cover_ge"])
@given(peaks=PEAKS, r=R)
@settings(max_examples=150, deadline=None)
def test_every_prefix_tried(rule: Rule, peaks: list[float], r: float) -> None:
    share = share_of(peaks)
    values = share.double()[0].tolist()
    if not near_a_boundary(values, r):
        assert kept(targets(share, r, rule)) == brute_force(values, r, rule)


def test_the_example_of_the_poster() -> None:
    """Cumulative .302 .579 .772 .881 .958 .989 1: of 0.95 the published rule keeps 4, the smallest set that has it is 5."""
    share = mass(POSTER[:, :, None, None])
    torch.testing.assert_close(share.sort(descending=True).values.cumsum(1)[0, :5],
                               torch.tensor([0.302, 0.579, 0.772, 0.881, 0.958]), atol=6e-4, rtol=0)  # fmt: skip
    assert kept(targets(share, 0.95)) == {3, 1, 0, 5}
    assert kept(targets(share, 0.95, "cover_ge")) == {3, 1, 0, 5, 4}
    assert int(targets(share, 1.0).sum()) == 7


@given(peaks=PEAKS)
@settings(max_examples=60, deadline=None)
def test_shares_sum_to_one_or_to_nothing(peaks: list[float]) -> None:
    share = share_of(peaks)
    assert share.dtype == torch.float32
    assert float(share.sum()) == pytest.approx(1.0 if any(peaks) else 0.0, abs=1e-6)
    assert (share >= 0).all()


def test_the_peak_counts_whatever_its_sign_and_place() -> None:
    maps = torch.zeros(1, 3, 4, 5)
    maps[0, 0, 3, 1], maps[0, 1, 0, 0], maps[0, 2] = -6.0, 3.0, 1.0
    torch.testing.assert_close(mass(maps), torch.tensor([[0.6, 0.3, 0.1]]))
    torch.testing.assert_close(mass(maps.flatten(2)), mass(maps))  # of a signal, of a volume
    torch.testing.assert_close(mass(maps[..., None]), mass(maps))
    torch.testing.assert_close(mass(torch.tensor([[-6.0, 3.0, 1.0]])), mass(maps))


@pytest.mark.parametrize("rule", RULES)
@given(peaks=PEAKS, first=R, second=R)
@settings(max_examples=150, deadline=None)
def test_nested_in_r(rule: Rule, peaks: list[float], first: float, second: float) -> None:
    share = share_of(peaks)
    less, more = (targets(share, r, rule) for r in sorted((first, second)))
    assert not (less & ~more).any()


@pytest.mark.parametrize("rule", RULES)
def test_nested_up_to_one_in_a_wide_layer_with_a_faint_tail(rule: Rule) -> None:
    """At r = 1 filters below 1e-5 do not count as firing; a little below they may not come back."""
    share = mass(torch.cat([torch.ones(1, 50), torch.full((1, 100), 1e-5), torch.zeros(1, 50)], 1))
    before = torch.zeros_like(share, dtype=torch.bool)
    for r in (0.5, 0.99, 0.999, 0.9999, 0.99998, 0.99999, 0.999999, 0.99999994, 1.0):
        now = targets(share, r, rule)
        assert not (before & ~now).any(), r
        before = now
    assert not before[0, -50:].any()


@pytest.mark.parametrize("rule", RULES)
@given(peaks=PEAKS, r=R, scale=st.sampled_from([2.0**-20, 0.25, 4.0, 2.0**30]), seed=st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_scale_sign_permutation_and_company_change_nothing(
    rule: Rule, peaks: list[float], r: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.tensor(peaks).reshape(1, -1, 1, 1) * torch.rand(1, len(peaks), 3, 3, generator=generator)
    wanted = targets(mass(maps), r, rule)
    assert torch.equal(targets(mass(maps * scale), r, rule), wanted)
    assert torch.equal(targets(mass(-maps), r, rule), wanted)
    company = torch.cat([torch.rand(2, len(peaks), 3, 3, generator=generator), maps])
    assert torch.equal(targets(mass(company), r, rule)[2:], wanted)
    order = torch.randperm(len(peaks), generator=generator)
    mine, theirs = mass(maps), mass(maps[:, order])
    torch.testing.assert_close(theirs, mine[:, order])
    if len(set(mine[0].tolist())) == len(peaks):  # among equals the first wins, which a permutation changes
        assert torch.equal(targets(mine[:, order], r, rule), wanted[:, order])


@pytest.mark.parametrize("rule", RULES)
def test_a_dead_layer_keeps_the_least(rule: Rule) -> None:
    share = mass(torch.zeros(3, 5, 4, 4))
    assert torch.equal(share, torch.zeros(3, 5))
    for least in (1, 2):
        assert targets(share, 0.9, rule, least=least).sum(1).tolist() == [least] * 3
    assert not targets(share, 0.9, rule, least=0).any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("r", [0.01, 0.5, 0.9, 1.0])
def test_a_dominant_filter_stays(rule: Rule, r: float) -> None:
    assert targets(mass(torch.tensor([[0.0, 1000.0, 1.0]])), r, rule)[0, 1]
    assert kept(targets(mass(torch.tensor([[0.0, 5.0, 0.0]])), r, rule)) == {1}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_own_input_alone(rule: Rule, bad: float) -> None:
    maps = torch.rand(3, 6, 2, 2) + 0.1
    clean = targets(mass(maps), 0.7, rule)
    maps[1, 2, 0, 1] = bad
    spoiled = targets(mass(maps), 0.7, rule)
    assert spoiled[1].sum() == 1
    assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])


@given(count=st.integers(1, 40), r=st.floats(0.001, 1))
@settings(max_examples=100, deadline=None)
def test_uniform_keeps_the_strongest_of_a_fixed_number(count: int, r: float) -> None:
    share = mass(torch.rand(2, count, generator=torch.Generator().manual_seed(count)) + 0.1)
    mask = targets(share, r, "uniform")
    number = max(1, count - int((1 - r) * count + TOLERANCE))
    assert mask.sum(1).tolist() == [number] * 2
    for row, values in zip(mask, share, strict=True):
        assert number == count or values[row].min() >= values[~row].max()


def test_uniform_leaves_out_what_does_not_fire() -> None:
    assert kept(targets(mass(torch.tensor([[1.0, 0.0, 2.0, 0.0]])), 0.75, "uniform")) == {0, 2}


def test_ties_go_to_the_lower_index() -> None:
    share = mass(torch.ones(1, 8))
    assert kept(targets(share, 0.5)) == {0, 1, 2, 3}
    assert kept(targets(share, 0.45, "cover_ge")) == {0, 1, 2, 3}
    assert kept(targets(share, 0.5, "uniform")) == {0, 1, 2, 3}


def test_no_gradient_comes_through() -> None:
    maps = torch.rand(2, 4, 3, 3, requires_grad=True)
    share = mass(maps)
    assert not share.requires_grad
    assert not targets(share, 0.5).requires_grad
    assert targets(share, 0.5).dtype == torch.bool


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_floating_point(dtype: torch.dtype) -> None:
    maps = torch.rand(2, 300, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype) * 500  # 300 x 500 is beyond float16
    share = mass(maps)
    torch.testing.assert_close(share.sum(1), torch.ones(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("r", [0.0, -0.5, 1.01, float("nan")])
def test_r_out_of_range(r: float) -> None:
    with pytest.raises(BudgetError, match=r"in \(0, 1\]"):
        targets(torch.ones(1, 3), r)


def test_a_rule_of_another_name() -> None:
    with pytest.raises(UnknownNameError, match="cover_ge"):
        targets(torch.ones(1, 3), 0.5, "cover_gt")  # type: ignore[arg-type]
