"""SparseGPT on one layer: against exact solutions, the published algorithm, and its own reported loss."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from microglia.core.layers import prunable_layers
from microglia.core.patterns import NM, Block, Unstructured
from microglia.methods.layerwise_rules import Wish, rules
from microglia.methods.reconstruction import inverse_factor, largest_of_run, reconstruct, segments
from microglia.scores.second_moments import Moments, matrix_of, rows_of, weight_of

ROOT = Path(__file__).resolve().parents[2]


def correlated(rows=400, columns=24, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, columns, generator=generator, dtype=dtype)
    noise = torch.randn(rows, columns, generator=generator, dtype=dtype)
    return torch.randn(rows, 8, generator=generator, dtype=dtype) @ mixing / 3 + noise / 2


def problem(out=6, columns=24, seed=0):
    x = correlated(columns=columns, seed=seed)
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    moments = (x.T @ x / len(x))[None]
    hessian = 2 * moments[0]
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    return weight, moments, hessian


def quadratic(new, old, hessian):
    delta = new - old
    return float((delta @ hessian * delta).sum() / 2)


def least_squares(weight, mask, hessian):
    """Returns the weights with this mask and the least quadratic error, row by row."""
    best = torch.zeros_like(weight)
    for row, (values, kept) in enumerate(zip(weight, mask, strict=True)):
        best[row, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ values)
    return best


def test_the_factor_holds_the_whole_sequence_of_inverses():
    _, moments, hessian = problem()
    upper = inverse_factor(moments).upper[0]
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(hessian), rtol=1e-9, atol=1e-12)
    assert torch.equal(upper, upper.triu())
    for j in range(24):
        rest = torch.linalg.inv(hessian[j:, j:])
        torch.testing.assert_close(upper[j, j] * upper[j, j:], rest[0], rtol=1e-9, atol=1e-12)


def test_the_inverse_by_halves_is_the_inverse():
    x = correlated(rows=2000, columns=700)
    factor = inverse_factor((x.T @ x / len(x))[None])
    hessian = 2 * x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(700, dtype=torch.float64)
    torch.testing.assert_close(factor.upper[0] @ hessian @ factor.upper[0].T, torch.eye(700, dtype=torch.float64))


def test_pruning_the_first_column_is_exact_obs():
    weight, moments, hessian = problem()
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:, 0] = False
    found = reconstruct(weight, inverse_factor(moments), Unstructured(), 0, mask=mask)
    inverse = torch.linalg.inv(hessian)
    exact = weight - weight[:, :1] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(found.weight, exact.masked_fill(~mask, 0), rtol=1e-9, atol=1e-12)
    assert found.loss == pytest.approx(float((weight[:, 0] ** 2 / (2 * inverse[0, 0])).sum()), rel=1e-9)
    assert found.loss == pytest.approx(quadratic(found.weight, weight, hessian), rel=1e-9)


def test_columns_before_all_kept_ones_give_masked_least_squares():
    weight, moments, hessian = problem()
    mask = torch.ones_like(weight, dtype=torch.bool)
    for row, count in enumerate((0, 1, 5, 9, 12, 23)):
        mask[row, :count] = False
    found = reconstruct(weight, inverse_factor(moments), Unstructured(), 0, mask=mask)
    torch.testing.assert_close(found.weight, least_squares(weight, mask, hessian), rtol=1e-8, atol=1e-10)
    assert found.loss == pytest.approx(quadratic(found.weight, weight, hessian), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_any_mask_lies_between_least_squares_and_zeroing(seed):
    weight, moments, hessian = problem(seed=seed)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    found = reconstruct(weight, inverse_factor(moments), Unstructured(), 0, mask=mask)
    error = quadratic(found.weight, weight, hessian)
    assert quadratic(least_squares(weight, mask, hessian), weight, hessian) <= error * (1 + 1e-9)
    assert error < quadratic(weight * mask, weight, hessian)
    assert not found.weight[~mask].any()


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(3, 2)])
def test_the_update_block_changes_nothing_but_rounding(pattern):
    weight, moments, _ = problem()
    factor = inverse_factor(moments)
    one, other = (reconstruct(weight, factor, pattern, 72, mask_block=8, update_block=block) for block in (1, 16))
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), NM(1, 4)])
@pytest.mark.parametrize("rule", ["sparsegpt", "wanda"])
def test_masks_are_those_of_the_published_algorithm(pattern, rule):
    spec = importlib.util.spec_from_file_location("benchmark_layerwise", ROOT / "benchmarks" / "layerwise.py")
    assert spec is not None
    assert spec.loader is not None
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(24, 256, generator=generator, dtype=torch.float64), correlated(700, 256)
    expected = {"sparsegpt": plain.plain_sparsegpt, "wanda": plain.plain_wanda}[rule](weight, [x[:300], x[300:]], pattern)
    module = nn.Linear(256, 24, bias=False).double()
    moments = Moments(prunable_layers(module)["weight"], whole=rule == "sparsegpt")
    moments.add(module, x[:300])
    moments.add(module, x[300:])
    wish = Wish(pattern, 12 * 256)
    found = rules[rule].prune(weight, rules[rule].prepare(moments.mean(), wish), wish)
    assert torch.equal(found.mask, expected[1])
    torch.testing.assert_close(found.weight, expected[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", list(rules))
@pytest.mark.parametrize("density", [0.1, 0.37, 0.5, 1.0])
def test_counts_are_exact_and_density_one_changes_nothing(name, density):
    weight, moments, _ = problem(out=7)
    keep = round(density * weight.numel())
    wish = Wish(Unstructured(), keep, mask_block=5)
    given = {"none": None, "diagonal": moments.diagonal(dim1=-2, dim2=-1), "whole": moments}[rules[name].needs]
    found = rules[name].prune(weight, rules[name].prepare(given, wish), wish)
    assert int(found.mask.sum()) == keep
    assert not found.weight[~found.mask].any()
    if density == 1:
        assert torch.equal(found.weight, weight)
        assert not found.loss
    if name == "wanda":
        assert int(found.mask.sum(1).max()) - int(found.mask.sum(1).min()) <= 1


@pytest.mark.parametrize("name", list(rules))
@pytest.mark.parametrize("kept", [(2, 4), (1, 4), (4, 4), (3, 8)])
def test_n_of_m_is_exact_in_every_run(name, kept):
    weight, moments, _ = problem()
    pattern = NM(*kept)
    wish = Wish(pattern, 0)
    given = {"none": None, "diagonal": moments.diagonal(dim1=-2, dim2=-1), "whole": moments}[rules[name].needs]
    found = rules[name].prune(weight, rules[name].prepare(given, wish), wish)
    assert torch.equal(found.mask.view(-1, pattern.m).sum(1), torch.full((weight.numel() // pattern.m,), pattern.n))


def test_smaller_mask_blocks_and_compensation_reduce_the_error():
    weight, moments, hessian = problem(out=64, columns=64)
    factor, keep = inverse_factor(moments), 32 * 64
    errors = {block: reconstruct(weight, factor, Unstructured(), keep, mask_block=block).loss for block in (64, 16)}
    plain = rules["magnitude"].prune(weight, None, Wish(Unstructured(), keep))
    assert errors[16] < errors[64] < quadratic(plain.weight, weight, hessian)


def test_a_dead_input_goes_first_and_costs_nothing():
    weight, moments, _ = problem()
    moments[0, 5], moments[0, :, 5] = 0, 0
    found = reconstruct(weight, inverse_factor(moments), Unstructured(), 23 * 6, mask_block=24)
    assert not found.mask[:, 5].any()
    assert found.loss == 0
    others = torch.arange(24) != 5
    assert torch.equal(found.weight[:, others], weight[:, others])


def test_dampening_rises_until_there_is_a_factor():
    x = correlated(rows=3, columns=24).float()
    moments = (x.T @ x / len(x))[None]
    assert inverse_factor(moments, 0.01).dampening == 0.01
    assert 0 < inverse_factor(moments, 0.0).dampening <= 1e-2
    wrong = moments - 100 * torch.eye(24)
    identity = inverse_factor(wrong)
    assert identity.dampening == float("inf")
    assert torch.equal(identity.upper[0], torch.eye(24))


def test_the_largest_of_a_run_are_exact_with_ties():
    values = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0])[None, :, None]
    assert largest_of_run(values, 2)[0, :, 0].tolist() == [False, True, True, False, False]


def test_segments_do_not_cross_kernel_positions():
    assert segments(12, 6, NM(2, 3), 128) == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert segments(12, 6, Block(2, 4), 5) == [(0, 4), (4, 6), (6, 10), (10, 12)]
    assert segments(12, 6, Unstructured(), 5) == [(0, 5), (5, 10), (10, 12)]


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, (3, 2), stride=2, dilation=(1, 2), groups=2, bias=False),
        nn.Conv1d(4, 8, 3, padding="same", padding_mode="circular", groups=4, bias=False),
        nn.Conv3d(2, 4, 2, bias=False),
        nn.Linear(4, 6, bias=False),
    ],
)
def test_unfolded_rows_times_the_matrix_are_the_layers_outputs(module):
    sizes = {nn.Linear: (5, 4), nn.Conv1d: (2, 4, 9), nn.Conv2d: (2, 4, 9, 8), nn.Conv3d: (2, 2, 4, 5, 4)}
    x = torch.randn(sizes[type(module)], generator=torch.Generator().manual_seed(0))
    rows, matrix = rows_of(module, x), matrix_of(module.weight)
    assert torch.equal(weight_of(matrix, tuple(module.weight.shape)), module.weight)
    groups = rows @ matrix.view(len(rows), -1, matrix.shape[1]).transpose(1, 2)  # (groups, positions, outputs)
    outputs = module(x).movedim(1, -1) if x.ndim > 2 else module(x)
    torch.testing.assert_close(groups.movedim(0, 1).reshape(outputs.shape), outputs, rtol=1e-4, atol=1e-5)
