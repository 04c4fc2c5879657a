"""Further cases of the differentiable top-k: annealing when compiled, weighted and long rows, wrong shapes, memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from microglia.core import soft_topk as module
from microglia.core.errors import BudgetError, MicrogliaError, ScoreError
from microglia.core.soft_topk import soft_topk


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_a_compiled_step_anneals_without_compiling_again() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda m, k, t: soft_topk(m * 2, k, t).mask * 3, backend="aot_eager", fullgraph=True)
    for step in range(12):  # one compilation for each number would fail at the eighth
        scores = noise(50, seed=step).requires_grad_()
        plain = soft_topk(scores * 2, 40 / (step + 1), 1 / (step + 1)).mask * 3
        fast = compiled(scores, 40 / (step + 1), 1 / (step + 1))
        assert torch.equal(plain, fast)
        assert torch.equal(*(torch.autograd.grad(mask, scores, scores.detach().cos())[0] for mask in (plain, fast)))


@pytest.mark.parametrize(("shape", "sized", "started"), [((30,), False, False), ((30,), True, True), ((5, 6), True, True)])
def test_the_operator_is_registered_as_torch_wants_it(shape: tuple[int, ...], sized: bool, started: bool) -> None:
    scores = noise(*shape, dtype=torch.float64).requires_grad_()
    keep, temperature = (torch.tensor(v, dtype=torch.float64) for v in (2.0, 0.3))
    sizes = torch.ones(shape, dtype=torch.float64) if sized else None
    start = torch.zeros(shape[:-1], dtype=torch.float64) if started else None
    found = torch.library.opcheck(module._forward, (scores, keep, temperature, sizes, start))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("temperature", [10.0, 0.3, 1e-3])
@pytest.mark.parametrize("columns", [3, 40, 9000])
def test_weighted_rows_are_single_problems(columns: int, temperature: float) -> None:
    scores, sizes = noise(5, columns, dtype=torch.float64), noise(5, columns, seed=1, dtype=torch.float64).abs() + 0.1
    scores.requires_grad_()
    keep = sizes.sum(1) * torch.linspace(0, 1, 5, dtype=torch.float64)  # the first keeps nothing, the last everything
    arrived = noise(5, columns, seed=2, dtype=torch.float64)
    together = soft_topk(scores, keep, temperature, sizes=sizes)
    (gradient,) = torch.autograd.grad(together.mask, scores, arrived)
    for row in range(5):
        own = scores[row].detach().requires_grad_()
        alone = soft_topk(own, keep[row], temperature, sizes=sizes[row])
        torch.testing.assert_close(together.mask[row], alone.mask, atol=1e-10, rtol=0)
        (expected,) = torch.autograd.grad(alone.mask, own, arrived[row])
        torch.testing.assert_close(gradient[row], expected, atol=1e-8 / temperature, rtol=1e-6)
    assert together.mask[0].tolist() == [0] * columns
    assert together.mask[4].tolist() == [1] * columns


def test_the_gradient_of_weighted_rows_against_finite_differences() -> None:
    scores, sizes = noise(4, 5, dtype=torch.float64).requires_grad_(), noise(4, 5, seed=1, dtype=torch.float64).abs() + 0.5
    assert torch.autograd.gradcheck(lambda m: soft_topk(m, sizes.sum(1) / 3, 0.4, sizes=sizes).mask, [scores])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_sizes_of_any_type(dtype: torch.dtype) -> None:
    sizes = (torch.arange(2000) % 7 + 1).to(dtype)
    mask = soft_topk(noise(2000), 3000, 0.05, sizes=sizes).mask
    assert mask.dtype == torch.float32
    assert float((mask.double() * sizes).sum()) == pytest.approx(3000, rel=1e-6)


def test_a_budget_of_everything_may_be_a_sum_in_float32() -> None:
    sizes = noise(10_000, seed=3).abs() + 0.5
    above = float(sizes.sum(dtype=torch.float64)) * (1 + 5e-7)
    assert soft_topk(noise(10_000), above, 0.1, sizes=sizes).mask.tolist() == [1] * 10_000
    with pytest.raises(BudgetError):
        soft_topk(noise(10_000), above * (1 + 1e-5), 0.1, sizes=sizes)


@pytest.mark.parametrize("keep", [0.5, 1, 66_667, 199_999.5])
@pytest.mark.parametrize("temperature", [1e3, 1.0, 1e-6])
def test_equal_scores_get_equal_shares_to_the_last_digit(keep: float, temperature: float) -> None:
    mask, _ = soft_topk(torch.full((200_000,), 0.3), keep, temperature)
    assert mask.unique().numel() == 1
    assert float(mask.double().sum()) == pytest.approx(keep, rel=1e-7)


@pytest.mark.parametrize("temperature", [1e3, 1e-2, 1e-4, 1e-6])
def test_many_ties_among_many_scores(temperature: float) -> None:
    scores = (noise(300_000) * 20).round() / 20
    mask = soft_topk(scores, 90_000.25, temperature).mask.double()
    assert float(mask.sum()) == pytest.approx(90_000.25, rel=1e-6)


def test_what_is_decided_is_exactly_so_and_gets_no_gradient() -> None:
    scores = noise(20_000).requires_grad_()
    mask = soft_topk(scores, 5000, 1e-4).mask
    (gradient,) = torch.autograd.grad(mask, scores, noise(20_000, seed=1))
    decided = (scores.detach() - scores.detach().sort(descending=True).values[5000]).abs() > 0.02
    assert set(mask[decided].tolist()) == {0.0, 1.0}
    assert not gradient[decided].any()
    assert gradient[~decided].any()


def test_views_and_expanded_gradients() -> None:
    table = noise(300, 4).requires_grad_()
    for own in (table[:, 1], table.t()):
        plain, copied = soft_topk(own, 90.5, 0.1).mask, soft_topk(own.contiguous(), 90.5, 0.1).mask
        assert torch.equal(plain, copied)
        weights = noise(300, seed=4)
        assert torch.equal(*(torch.autograd.grad((mask * weights).sum(), table)[0] for mask in (plain, copied)))
        assert float(torch.autograd.grad(soft_topk(own, 90.5, 0.1).mask.sum(), table)[0].abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_a_few_times_the_scores(dtype: torch.dtype) -> None:
    scores = noise(1_000_000).to(dtype).requires_grad_()
    arrived = noise(1_000_000, seed=1).to(dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        gradient = torch.autograd.grad(soft_topk(scores, 300_000, 0.01).mask, scores, arrived)[0]
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    own = scores.numel() * scores.element_size()
    assert gradient.numel() * gradient.element_size() == own
    assert own < peak < 2.7 * own  # the mask, its gradient and buffers; beside the scores and what arrives


def test_rows_have_the_same_bits_with_any_number_of_threads() -> None:
    scores, before, found = noise(70_000, 4).requires_grad_(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            mask, threshold = soft_topk(scores, 2, 0.1)
            found.append((mask, threshold, *torch.autograd.grad(mask, scores, scores.detach().cos())))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_threshold_carries_no_gradient_and_the_mask_none_to_what_is_not_scores() -> None:
    scores, keep = noise(50).requires_grad_(), torch.tensor(10.0, requires_grad=True)
    mask, threshold = soft_topk(scores, keep, 0.1)
    assert not threshold.requires_grad
    assert torch.autograd.grad(mask.square().sum(), [scores, keep], allow_unused=True)[1] is None


def test_nothing_breaks_in_inference_mode() -> None:
    scores = noise(300_000)
    with torch.inference_mode():
        mask = soft_topk(scores, 1000, 0.1).mask
    assert torch.equal(mask, soft_topk(scores, 1000, 0.1).mask)


@pytest.mark.parametrize(
    ("scores", "keep", "settings", "error", "text"),
    [
        (torch.ones(2, 3), torch.ones(3), {}, ScoreError, "keep is shaped \\(2,\\); got \\(3,\\)"),
        (torch.ones(3), 1, {"sizes": torch.ones(2)}, ScoreError, "sizes is shaped \\(3,\\); got \\(2,\\)"),
        (torch.ones(2, 3), 1, {"start": torch.ones(3)}, ScoreError, "start is shaped \\(2,\\); got \\(3,\\)"),
        (torch.ones(0), 0, {}, ScoreError, "at least one"),
        (torch.ones(3), math.nan, {}, BudgetError, "cannot keep nan"),
        (torch.ones(2, 3), math.nan, {}, BudgetError, "cannot keep nan"),
        (torch.ones(2, 3), torch.tensor([1.0, 4.0]), {}, BudgetError, "cannot keep 4 of a row, number 1"),
        (torch.ones(3), 1, {"temperature": 1e-44}, BudgetError, "from 1e-30"),
        (torch.ones(3), 1, {"temperature": torch.tensor(-1.0)}, BudgetError, "got -1"),
    ],
)
def test_wrong_shapes_and_numbers_are_explained(
    scores: Tensor, keep: float | Tensor, settings: dict, error: type[MicrogliaError], text: str
) -> None:
    with pytest.raises(error, match=text):
        soft_topk(scores, keep, **{"temperature": 1.0, **settings})
