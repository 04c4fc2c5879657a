"""Selection: the exact count, the order with ties by position, scopes, what was pruned or is protected, and the errors."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from microglia.core.allocation import ScopeName
from microglia.core.errors import BudgetError, ScoreError, SelectorError, UnknownNameError
from microglia.core.masks import MaskSet
from microglia.core.patterns import NM, Block, Channel, Pattern, Unstructured
from microglia.core.selection import keep_best, keep_best_rows, select

quick = settings(deadline=None, max_examples=40)
SHAPES = {"a": (4, 6, 3, 3), "b": (1, 1), "c": (10, 7), "d": (3, 5, 2)}
TOTAL = sum(math.prod(s) for s in SHAPES.values())
FREE = Unstructured()


def scores_of(seed: int = 0, levels: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random scores; with ``levels`` so many distinct values, hence ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: ((s * levels).floor() if levels else s).to(dtype) for name, s in scores.items()}


def oracle(scores: dict[str, Tensor], keep: int) -> dict[str, Tensor]:
    flat = torch.cat([s.flatten().double() for s in scores.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[(-flat).argsort(stable=True)[:keep]] = True
    parts = mask.split([s.numel() for s in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


# T0.3: exact counts


@quick
@given(st.integers(0, TOTAL), st.integers(0, 6), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_keep_best_equals_a_stable_sort(keep: int, levels: int, dtype: torch.dtype) -> None:
    scores = scores_of(1, levels, dtype)
    assert MaskSet(keep_best(scores, keep)).same(oracle(scores, keep))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("keep", [0, 1, 7, 8, TOTAL - 1, TOTAL])
def test_all_equal_scores_keep_the_first(value: float, keep: int) -> None:
    masks = keep_best({name: torch.full(shape, value) for name, shape in SHAPES.items()}, keep)
    assert torch.cat([m.flatten() for m in masks.values()]).tolist() == [i < keep for i in range(TOTAL)]


def test_zeros_fill_up_in_order_when_the_count_reaches_into_them() -> None:
    masks = keep_best({"a": torch.tensor([0.0, 2.0, 0.0]), "b": torch.tensor([0.0, 1.0, -1.0])}, 4)
    assert [m.tolist() for m in masks.values()] == [[True, True, True], [False, True, False]]


def test_zeros_of_an_earlier_pruning_at_exactly_its_density() -> None:
    score = torch.zeros(200_000)
    score[torch.randperm(200_000, generator=torch.Generator().manual_seed(0))[:5000]] = 1 + torch.rand(5000)
    assert torch.equal(keep_best({"a": score}, 5000)["a"], score > 0)
    assert int(keep_best({"a": score}, 5001)["a"].sum()) == 5001


def test_negative_zero_ties_with_zero() -> None:
    assert keep_best({"a": torch.tensor([-0.0, 0.0, -0.0])}, 2)["a"].tolist() == [True, True, False]


def test_scores_that_are_not_contiguous() -> None:
    score = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(keep_best({"a": score}, 5)["a"], score > 6)


@pytest.mark.parametrize("keep", [-1, TOTAL + 1])
@pytest.mark.parametrize("sized", [False, True])
def test_a_count_out_of_range_is_refused(keep: int, sized: bool) -> None:
    scores = scores_of()
    sizes = {name: torch.arange(s.numel()).view(s.shape) % 2 + 1 for name, s in scores.items()}
    with pytest.raises(BudgetError, match="Cannot keep"):
        keep_best(scores, keep * (2 if keep > 0 else 1), sizes if sized else None)


# nested, scopes, layers


@quick
@given(st.sampled_from(["global", "layer", "erk"]), st.integers(4, TOTAL - 1), st.sampled_from([0, 3]))
def test_more_budget_keeps_what_less_kept(scope: ScopeName, keep: int, levels: int) -> None:
    small, large = (select(scores_of(2, levels), pattern=FREE, keep=k, scope=scope, allow_empty=True) for k in (keep, keep + 1))
    assert (small.kept, large.kept) == (keep, keep + 1)
    if scope == "global":  # elsewhere the largest remainders may move a weight between layers
        assert small.nested_in(large)


@quick
@given(st.sampled_from(["global", "layer", "row", "erk"]), st.integers(4, TOTAL), st.integers(0, 3))
def test_every_scope_keeps_the_exact_count_and_empties_no_layer(scope: ScopeName, keep: int, levels: int) -> None:
    masks = select(scores_of(3, levels), pattern=FREE, keep=keep, scope=scope)
    assert masks.kept == keep
    assert all(bool(m.any()) for m in masks.values())


@pytest.mark.parametrize("scope", ["layer", "row", {"a": 0.25, "b": 1.0, "c": 0.25, "d": 0.25}])
def test_the_layer_scope_keeps_the_best_of_each_layer(scope: object) -> None:
    scores, keep = scores_of(4), round(0.25 * TOTAL)
    masks = select(scores, pattern=FREE, keep=keep, scope=scope)  # type: ignore[arg-type]
    for name, mask in masks.items():
        count = int(mask.sum())
        assert abs(count - 0.25 * mask.numel()) <= 1
        if scope == "row":
            per_row = mask.flatten(1).sum(1)
            assert int(per_row.max() - per_row.min()) <= 1
            assert all(
                scores[name][i][m].min() > scores[name][i][~m].max() for i, m in enumerate(mask) if 0 < m.sum() < m.numel()
            )
        else:
            assert torch.equal(mask, oracle({name: scores[name]}, count)[name])


def test_a_layer_that_would_be_emptied_keeps_its_best_and_takes_no_other_layers_last() -> None:
    scores = {"a": torch.tensor([[10.0, 8.0]]), "b": torch.tensor([[5.0]]), "c": torch.tensor([[1.0, 2.0]])}
    kept = {n: m.flatten().tolist() for n, m in select(scores, pattern=FREE, keep=3).items()}
    assert kept == {"a": [True, False], "b": [True], "c": [False, True]}
    assert select(scores, pattern=FREE, keep=3, allow_empty=True)["c"].sum() == 0


def test_emptying_is_refused_with_the_count_it_takes() -> None:
    with pytest.raises(BudgetError, match=re.escape("one unit in each of the 4 layers takes 4 weights")):
        select(scores_of(), pattern=FREE, keep=3)
    with pytest.raises(BudgetError, match="admit 4 to"):
        select(scores_of(), pattern=FREE, keep=3, scope="layer")


def test_given_densities_empty_no_layer_unless_allowed() -> None:
    given_densities = dict.fromkeys(SHAPES, 0.001)
    assert [int(m.sum()) for m in select(scores_of(), pattern=FREE, keep=0, scope=given_densities).values()] == [1] * 4
    assert select(scores_of(), pattern=FREE, keep=0, scope=given_densities, allow_empty=True).kept == 0


def test_wrong_scopes_are_answered() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'global'"):
        select(scores_of(), pattern=FREE, keep=9, scope="globl")  # type: ignore[arg-type]
    with pytest.raises(SelectorError, match=re.escape("missing ['d'], unknown ['e']")):
        select(scores_of(), pattern=FREE, keep=9, scope={"a": 0.1, "b": 1, "c": 1, "e": 1})
    with pytest.raises(BudgetError, match=r"'a' is 1\.5"):
        select(scores_of(), pattern=FREE, keep=9, scope=dict.fromkeys(SHAPES, 1.5))


# NaN, infinities, what was pruned before, what is protected


@pytest.mark.parametrize("scope", ["global", "layer", "row", "erk"])
@pytest.mark.parametrize("pattern", [FREE, NM(1, 2), Block(3, 2), Channel()])
@pytest.mark.parametrize("keep", [TOTAL // 2, TOTAL])
def test_nan_is_an_error_that_names_the_layer(scope: ScopeName, pattern: Pattern, keep: int) -> None:
    scores = scores_of()
    scores["c"][2, 3] = math.nan
    with pytest.raises(ScoreError, match="'c'"):
        select(scores, pattern=pattern, keep=keep, scope=scope)


@pytest.mark.parametrize("keep", [0, 5])
def test_nan_is_an_error_for_any_count(keep: int) -> None:
    with pytest.raises(ScoreError, match=re.escape("'a' has 1 NaN of 6")):
        keep_best({"a": torch.tensor([1.0, 2.0, 3.0, 4.0, math.nan, 0.0])}, keep)
    with pytest.raises(ScoreError, match="'a'"):
        keep_best({"a": torch.tensor([1.0, math.nan])}, keep % 3, {"a": torch.tensor([1, 2])})


@pytest.mark.parametrize("sizes", [None, {"a": torch.tensor([1, 2, 1, 1])}])
def test_infinities_protect_and_bury(sizes: dict[str, Tensor] | None) -> None:
    score = {"a": torch.tensor([-math.inf, 3.0, math.inf, 4.0])}
    assert keep_best(score, 1, sizes)["a"].tolist() == [False, False, True, False]
    assert keep_best(score, 4 if sizes else 3, sizes)["a"].tolist() == [False, True, True, True]
    with pytest.raises(BudgetError, match=r"only [34] are still alive"):
        keep_best(score, 5 if sizes else 4, sizes)
    with pytest.raises(BudgetError, match=r"[23] (units|weights) are protected"):
        keep_best({"a": torch.tensor([0.0, math.inf, math.inf, 0.0])}, 1, sizes)


@quick
@given(
    pattern=st.sampled_from([FREE, Block(2, 2), Channel(), NM(2, 4)]),
    scope=st.sampled_from(["global", "layer", "row", "erk"]),
    density=st.floats(0.05, 0.5),
    old=st.sampled_from([FREE, Block(2, 2), Channel(), NM(2, 4)]),
)
def test_nothing_pruned_grows_back(pattern: Pattern, scope: ScopeName, density: float, old: Pattern) -> None:
    alive = select(scores_of(5), pattern=old, keep=round(0.7 * TOTAL), allow_empty=True)
    try:
        masks = select(scores_of(6), pattern=pattern, keep=int(density * TOTAL), scope=scope, alive=alive, allow_empty=True)
    except BudgetError as error:
        assert "still alive" in str(error)  # noqa: PT017 (a row or stripe may have too few left)
    else:
        assert masks.nested_in(alive)
        assert not masks.same(alive)


@pytest.mark.parametrize("scope", ["global", "layer", "erk", dict.fromkeys("abd", 0.3)])
def test_protected_layers_stay_dense_and_count(scope: object) -> None:
    keep = 150
    masks = select(scores_of(7), pattern=FREE, keep=keep, scope=scope, protect=["c"])  # type: ignore[arg-type]
    assert bool(masks["c"].all())
    assert masks.kept == (keep if isinstance(scope, str) else 70 + 65 + 1 + 9)  # 0.3 of 216, 1 and 30, at least one each
    alive = {"c": torch.arange(70).view(10, 7) % 7 != 0}
    later = select(scores_of(7), pattern=FREE, keep=100, scope=scope, protect=["c"], alive=alive)  # type: ignore[arg-type]
    assert torch.equal(later["c"], alive["c"])
    assert not isinstance(scope, str) or later.kept == 100


def test_too_many_protected_weights_are_an_error() -> None:
    with pytest.raises(BudgetError, match=re.escape("216 units are protected, but only 100")):
        select(scores_of(), pattern=FREE, keep=100, protect=["a"])
    with pytest.raises(BudgetError, match="admit 219 to"):
        select(scores_of(), pattern=FREE, keep=100, protect=["a"], scope="layer")


# patterns


@quick
@given(st.integers(1, 5).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))), st.sampled_from([0, 2]))
def test_n_m_keeps_n_of_every_m_and_of_a_shorter_tail(numbers: tuple[int, int], levels: int) -> None:
    n, m = numbers
    scores, pattern = scores_of(8, levels), NM(n, m)
    masks = select(scores, pattern=pattern, keep=0)
    for name, mask in masks.items():
        rows, held = pattern.reduce(mask.long()), pattern.sizes(mask.shape).sum(1)
        assert torch.equal(rows.sum(1), held.clamp(max=n))
        values = pattern.reduce(scores[name])
        for row, value, real in zip(rows.bool(), values, held, strict=True):
            expected = sorted(range(int(real)), key=lambda i, v=value: (-v[i], i))[:n]  # type: ignore[misc]
            assert row.nonzero().flatten().tolist() == sorted(expected)


def test_n_m_keeps_more_only_while_the_budget_is_above_it() -> None:
    scores = {"a": torch.rand(4, 8)}
    rows = [int(select(scores, pattern=NM(1, 4), keep=keep)["a"].view(8, 4).sum(1).unique()) for keep in (32, 24, 16, 8, 0)]
    assert rows == [4, 3, 2, 1, 1]


@quick
@given(st.sampled_from([Block(2, 3), Block(16, 1), Block(3, 2)]), st.floats(0.1, 1), st.integers(0, 5))
def test_kept_blocks_are_whole_and_the_count_is_the_nearest(pattern: Block, density: float, seed: int) -> None:
    scores, keep = scores_of(seed), round(density * TOTAL)
    masks = select(scores, pattern=pattern, keep=keep, allow_empty=True)
    for name, mask in masks.items():
        assert set(pattern.reduce(mask.float()).unique().tolist()) <= {0.0, 1.0}
        assert mask.shape == SHAPES[name]
    assert abs(masks.kept - keep) <= pattern.out * pattern.in_ / 2


@quick
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=8), st.data())
def test_units_of_unequal_size_keep_the_nearest_prefix(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    values, sizes = [v for v, _ in pairs], [s for _, s in pairs]
    keep = data.draw(st.integers(0, sum(sizes)))
    order = sorted((i for i in range(len(pairs)) if sizes[i]), key=lambda i: (-values[i], i))
    prefixes = [order[:p] for p in range(len(order) + 1)]
    best = min(prefixes, key=lambda p: (abs(sum(sizes[i] for i in p) - keep), len(p)))  # brute force
    mask = keep_best({"a": torch.tensor(values).float()}, keep, {"a": torch.tensor(sizes)})["a"]
    assert mask.nonzero().flatten().tolist() == sorted(best)


@quick
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_rows_choose_each_for_itself(rows: int, columns: int, data: st.DataObject) -> None:
    scores = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns))).float()
    counts = torch.tensor(data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows)))
    mask = keep_best_rows(scores.view(rows, columns), counts, torch.ones(rows, columns, dtype=torch.int64))
    for row, score, count in zip(mask, scores.view(rows, columns), counts, strict=True):
        assert torch.equal(row, oracle({"": score}, int(count))[""])


def test_channels_are_kept_by_their_mean_and_the_reduction_asked_for() -> None:
    score = torch.tensor([[3.0, -3.0], [1.0, 1.0], [4.0, -9.0]])
    chosen = {
        how: select({"a": score}, pattern=Channel(), keep=2, reduction=how)["a"].all(1).tolist()
        for how in ("mean", "max", "l2")
    }  # type: ignore[arg-type]
    assert chosen == {"mean": [False, True, False], "max": [False, False, True], "l2": [False, False, True]}


@pytest.mark.parametrize("ties", [False, True])
def test_rows_of_equal_units_keep_what_a_stable_sort_keeps(ties):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(3, (40, 9), generator=generator).float() if ties else torch.randn(40, 9, generator=generator)
    scores[0, :4], scores[1, :2] = -torch.inf, torch.inf
    counts = torch.randint(10, (40,), generator=generator)
    counts[0], counts[1] = 5, 3
    wanted = torch.zeros(40, 9, dtype=torch.bool)
    for row, (values, count) in enumerate(zip(scores, counts.tolist(), strict=True)):
        wanted[row, values.argsort(descending=True, stable=True)[:count]] = True
    assert torch.equal(keep_best_rows(scores, counts, torch.ones((), dtype=torch.int64).expand(40, 9)), wanted)
    counts[0] = 6
    with pytest.raises(BudgetError, match="only"):
        keep_best_rows(scores, counts, torch.ones(40, 9, dtype=torch.int64))
    counts[0], counts[1] = 5, 1
    with pytest.raises(BudgetError, match="protected"):
        keep_best_rows(scores, counts, torch.ones(40, 9, dtype=torch.int64))
