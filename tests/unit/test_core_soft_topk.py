"""The differentiable top-k: its sum, its limits, its gradient, against closed forms, brute force and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from microglia.core.errors import BudgetError, ScoreError
from microglia.core.soft_topk import soft_topk

TEMPERATURES = [1e3, 10.0, 1.0, 1e-2, 1e-4, 1e-6]


def noise(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask_of(scores: Tensor, keep: float, temperature: float, **settings: Tensor) -> Tensor:
    return soft_topk(scores, keep, temperature, **settings).mask


def jacobian(scores: Tensor, keep: float, temperature: float, sizes: Tensor | None = None) -> Tensor:
    return torch.autograd.functional.jacobian(lambda m: soft_topk(m, keep, temperature, sizes=sizes).mask, scores)


problems = st.tuples(
    st.integers(2, 40), st.floats(0.02, 0.98), st.sampled_from([30.0, 1.0, 0.2]), st.integers(0, 10_000), st.booleans()
)


def problem(drawn: tuple[int, float, float, int, bool]) -> tuple[Tensor, int, float]:
    n, share, temperature, seed, tied = drawn
    scores = noise(n, seed)
    return (scores * 2).round() / 2 if tied else scores, min(n - 1, max(1, round(share * n))), temperature


# ------------------------------------------------------------------------------------------------------------- the mask
def test_worked_example_of_the_note() -> None:
    scores = torch.tensor([-4.5951, -2.1972, -3.1781, 0.0, -1.1527])
    mask, threshold = soft_topk(scores, 3, 1.0)
    torch.testing.assert_close(mask, torch.tensor([0.1462, 0.6531, 0.4139, 0.9443, 0.8426]), atol=1e-3, rtol=0)
    assert float(-threshold) == pytest.approx(2.8301, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("n", [2, 10, 200_000])
def test_the_sum_is_k(n: int, temperature: float, tied: bool, dtype: torch.dtype) -> None:
    scores = noise(n, n, dtype)
    scores = (scores * 3).round() / 3 if tied else scores
    for keep in {1, max(1, n // 3), n - 1}:
        total = float(mask_of(scores, keep, temperature).double().sum())
        assert abs(total - keep) <= (1e-6 if dtype == torch.float32 else 1e-9) * keep


def test_the_sum_of_ten_million() -> None:
    scores = noise(10_000_000, 1, torch.float32)
    mask = mask_of(scores, 1_000_000, 1e-2)
    assert abs(float(mask.double().sum()) - 1e6) <= 1e-5 * 1e6


@given(problems)
@settings(max_examples=60, deadline=None)
def test_order_shift_scale_complement_and_permutation(drawn: tuple[int, float, float, int, bool]) -> None:
    scores, keep, temperature = problem(drawn)
    mask = mask_of(scores, keep, temperature)
    order = scores.argsort()
    assert bool((mask[order].diff() > -1e-15).all())  # T2: order preserving, but for the last bit of the sigmoid
    assert float(((mask[:, None] - mask).abs() * (scores[:, None] == scores)).max()) < 1e-15
    close = {"atol": 1e-9, "rtol": 0.0}
    shuffle = torch.randperm(len(scores), generator=torch.Generator().manual_seed(drawn[3]))
    torch.testing.assert_close(mask_of(scores[shuffle], keep, temperature), mask[shuffle], **close)  # T3
    torch.testing.assert_close(mask_of(scores + 3, keep, temperature), mask, **close)  # T4
    torch.testing.assert_close(mask_of(scores * 7, keep, temperature * 7), mask, **close)  # T5
    torch.testing.assert_close(mask_of(-scores, len(scores) - keep, temperature), 1 - mask, **close)  # T6
    if keep + 1 < len(scores):
        assert bool((mask_of(scores, keep + 1, temperature) > mask).all())  # T9


@given(st.integers(2, 100), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_a_low_temperature_is_the_hard_top_k(n: int, seed: int) -> None:
    scores = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).double()  # gaps of 1
    keep = 1 + seed % (n - 1)
    mask = mask_of(scores, keep, 1 / 100)
    assert float((mask - (scores >= n - keep).double()).abs().max()) < 1e-6  # T7


def test_a_high_temperature_is_uniform() -> None:
    torch.testing.assert_close(mask_of(noise(50), 20, 1e6), torch.full((50,), 0.4, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tied_units_share_the_places_they_compete_for(dtype: torch.dtype) -> None:
    scores = torch.tensor([3.0, 1, 1, 1, 1, 0, -1], dtype=dtype)
    expected = torch.tensor([1, 0.5, 0.5, 0.5, 0.5, 0, 0], dtype=dtype)
    torch.testing.assert_close(mask_of(scores, 3, 1e-5), expected, atol=1e-6, rtol=0)  # T10


@pytest.mark.parametrize("scores", [torch.ones(5), torch.tensor([2.0]), torch.tensor([1e6, -1e6, 0, 1e6, -1e6])])
@pytest.mark.parametrize("temperature", [1e3, 1.0, 1e-6])
def test_edges_are_finite_with_finite_gradients(scores: Tensor, temperature: float) -> None:
    own = scores.clone().requires_grad_()
    for keep in range(len(own) + 1):
        mask = mask_of(own, keep, temperature)
        (gradient,) = torch.autograd.grad(mask, own, torch.arange(1.0, len(own) + 1))
        assert bool(mask.isfinite().all())
        assert bool(gradient.isfinite().all())
        assert float(mask.detach().sum()) == pytest.approx(keep, abs=1e-5)
        if keep in (0, len(own)):
            assert torch.equal(mask, torch.full_like(mask, float(keep > 0)))
            assert not gradient.any()


def test_equal_scores_get_equal_shares() -> None:
    torch.testing.assert_close(mask_of(torch.full((8,), 0.3), 2, 1e-4), torch.full((8,), 0.25))


def test_infinite_scores_are_always_and_never_kept() -> None:
    inf = math.inf
    scores = torch.tensor([inf, 0.3, -inf, 0.1, 0.2, inf], requires_grad=True)
    mask = mask_of(scores, 3, 0.1)
    assert mask[0] == mask[5] == 1
    assert mask[2] == 0
    torch.testing.assert_close(mask[[1, 3, 4]], mask_of(torch.tensor([0.3, 0.1, 0.2]), 1, 0.1))
    (gradient,) = torch.autograd.grad(mask, scores, torch.arange(6.0))
    assert gradient[[0, 2, 5]].tolist() == [0, 0, 0]
    assert bool(gradient[[1, 3, 4]].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    scores = noise(1000, 3, torch.float32).to(dtype)
    mask = mask_of(scores, 300, 0.1)
    assert mask.dtype == dtype
    torch.testing.assert_close(mask, mask_of(scores.float(), 300, 0.1).to(dtype))


def test_weighted_units_meet_the_weighted_sum() -> None:
    scores, sizes = noise(5000, 5), torch.randint(1, 129, (5000,), generator=torch.Generator().manual_seed(0)).double()
    for temperature in (10.0, 0.1, 1e-3):
        mask = mask_of(scores, 0.3 * float(sizes.sum()), temperature, sizes=sizes)
        assert float((mask * sizes).sum()) == pytest.approx(0.3 * float(sizes.sum()), rel=1e-9)
    torch.testing.assert_close(
        mask_of(scores, 3000.0, 0.1, sizes=torch.full_like(scores, 2.0)), mask_of(scores, 1500, 0.1), atol=1e-9, rtol=0
    )


def test_a_warm_start_changes_nothing_but_the_work() -> None:
    scores = noise(100_000, 7, torch.float32)
    cold = soft_topk(scores, 30_000, 1e-2)
    moved = scores + 1e-3 * noise(100_000, 8, torch.float32)
    warm = soft_topk(moved, 30_000, 0.99e-2, start=cold.threshold)
    torch.testing.assert_close(warm.mask, mask_of(moved, 30_000, 0.99e-2), atol=1e-4, rtol=0)
    far = soft_topk(moved, 30_000, 0.99e-2, start=torch.tensor(1e9, dtype=torch.float64))
    torch.testing.assert_close(far.mask, warm.mask, atol=1e-4, rtol=0)


def test_same_bits_twice_and_with_any_number_of_threads() -> None:
    scores = noise(600_000, 9, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            own = scores.clone().requires_grad_()
            mask = mask_of(own, 100_000, 1e-3)
            found.append((mask.detach(), *torch.autograd.grad(mask, own, scores.cos())))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# --------------------------------------------------------------------------------------------------------- the gradient
@pytest.mark.parametrize("temperature", [10.0, 1.0, 0.1])
def test_gradient_against_finite_differences(temperature: float) -> None:
    scores = noise(30, 11).requires_grad_()
    sizes = torch.arange(1, 31, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: mask_of(m, 9, temperature), [scores])
    assert torch.autograd.gradcheck(lambda m: mask_of(m, 100.0, temperature, sizes=sizes), [scores])
    assert torch.autograd.gradcheck(lambda m: mask_of(m.view(-1, 5), 2, temperature), [scores])


@given(problems)
@settings(max_examples=30, deadline=None)
def test_the_jacobian_is_the_closed_form(drawn: tuple[int, float, float, int, bool]) -> None:
    scores, keep, temperature = problem(drawn)
    f = mask_of(scores, keep, temperature)
    v = f * (1 - f)
    expected = (v.diag() - torch.outer(v, v) / v.sum()) / temperature
    found = jacobian(scores, keep, temperature)
    torch.testing.assert_close(found, expected, atol=1e-7 / temperature, rtol=1e-6)
    for dim in (0, 1):
        assert float(found.sum(dim).abs().max()) <= 1e-7 / temperature


def test_the_weighted_jacobian_is_not_symmetric() -> None:
    scores, sizes = noise(6, 13), torch.arange(1.0, 7, dtype=torch.float64)
    f = mask_of(scores, 9.0, 0.5, sizes=sizes)
    v = f * (1 - f)
    expected = (v.diag() - torch.outer(v, sizes * v) / (sizes * v).sum()) / 0.5
    found = jacobian(scores, 9.0, 0.5, sizes)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-6)
    assert float((found - found.T).abs().max()) > 1e-2


def test_a_constant_gradient_vanishes_and_a_shift_changes_nothing() -> None:
    scores = noise(500, 15).requires_grad_()
    mask = mask_of(scores, 100, 0.3)
    u = noise(500, 16)
    plain, shifted = (torch.autograd.grad(mask, scores, g, retain_graph=True)[0] for g in (u, u + 5))
    torch.testing.assert_close(plain, shifted, atol=1e-12, rtol=1e-9)
    assert float(torch.autograd.grad(mask, scores, torch.ones(500, dtype=torch.float64))[0].abs().max()) < 1e-12


def test_nothing_but_the_scores_is_kept_for_the_gradient() -> None:
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    scores = noise(100_000, 17, torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mask_of(scores, 1000, 0.1)
    assert {t.data_ptr() for t in saved if t.numel() > 1} == {scores.data_ptr()}
    assert sum(t.numel() for t in saved) <= scores.numel() + 4


def test_it_compiles_without_a_break() -> None:
    def step(scores: Tensor) -> Tensor:
        return (soft_topk(scores, 40, 0.3).mask * torch.arange(100.0)).sum()

    scores = noise(100, 19, torch.float32).requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    plain, fast = step(scores), compiled(scores)
    assert torch.equal(plain, fast)
    assert torch.equal(*(torch.autograd.grad(value, scores)[0] for value in (plain, fast)))


# ------------------------------------------------------------------------------------------------------------- the rows
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_rows_are_single_problems(temperature: float) -> None:
    scores = noise(400, 21).view(100, 4)
    together = soft_topk(scores, 2, temperature)
    for row, mask, threshold in zip(scores, *together, strict=True):
        alone = soft_topk(row, 2, temperature)
        torch.testing.assert_close(mask, alone.mask, atol=1e-9, rtol=0)
        if temperature >= 0.1:  # else the root is flat
            torch.testing.assert_close(threshold, alone.threshold, atol=1e-6 * temperature, rtol=1e-6)


def test_rows_of_different_counts_with_padding() -> None:
    inf = math.inf
    scores = torch.tensor([[1.0, 2, -inf, -inf], [1, 2, 3, -inf], [4, 1, inf, 2], [1, 2, 3, 4]], requires_grad=True)
    mask = mask_of(scores, torch.tensor([2, 2, 2, 0]), 0.1)
    torch.testing.assert_close(mask.sum(1), torch.tensor([2.0, 2, 2, 0]))
    assert mask[0].tolist() == [1, 1, 0, 0]
    assert mask[2, 2] == 1
    assert mask[3].tolist() == [0, 0, 0, 0]
    (gradient,) = torch.autograd.grad(mask, scores, torch.rand(4, 4, generator=torch.Generator().manual_seed(0)))
    assert bool(gradient.isfinite().all())
    assert not gradient[0].any()
    assert not gradient[3].any()
    assert float(gradient[1].sum().abs()) < 1e-6


def test_many_rows_in_chunks() -> None:
    scores = noise(400_000, 23, torch.float32).view(-1, 4)
    first = soft_topk(scores, 2, 1e-2)
    assert float((first.mask.double().sum(1) - 2).abs().max()) < 2e-6
    again = soft_topk(scores, 2, 1e-2, start=first.threshold)
    torch.testing.assert_close(again.mask, first.mask, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    ("scores", "keep", "temperature", "error", "text"),
    [
        (torch.ones(3), 4, 1.0, BudgetError, "cannot keep 4: its scores admit 0 to 3"),
        (torch.ones(3), -1, 1.0, BudgetError, "cannot keep -1"),
        (torch.tensor([1.0, math.inf, -math.inf]), 0, 1.0, BudgetError, "admit 1 to 2"),
        (torch.ones(2, 3), 4, 1.0, BudgetError, "of a row"),
        (torch.ones(3), 1, 0.0, BudgetError, "above 0; got 0"),
        (torch.ones(3), 1, math.nan, BudgetError, "above 0; got nan"),
        (torch.tensor([1.0, math.nan]), 1, 1.0, ScoreError, "1 of 2 scores"),
        (torch.tensor([[1.0, math.nan]]), 1, 1.0, ScoreError, "1 of 2 scores"),
        (torch.ones(2, 2, 2), 1, 1.0, ScoreError, "or \\(rows, m\\)"),
        (torch.ones(3, dtype=torch.int64), 1, 1.0, ScoreError, "floating-point"),
    ],
)
def test_wrong_input_is_explained(scores: Tensor, keep: int, temperature: float, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        soft_topk(scores, keep, temperature)
