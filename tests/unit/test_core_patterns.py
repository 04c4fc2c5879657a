"""Patterns: units cover every weight once, hold what they say, and read back from their text."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microglia.core.errors import PatternError
from microglia.core.patterns import NM, Block, Channel, Pattern, Unstructured, parse_pattern

quick = settings(deadline=None, max_examples=40)
sides = st.integers(1, 9)
patterns = st.one_of(
    st.just(Unstructured()),
    st.just(Channel()),
    st.builds(Block, st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 5).flatmap(lambda m: st.builds(NM, st.integers(1, m), st.just(m))),
)
shapes = st.one_of(
    st.tuples(sides, sides),  # linear
    st.tuples(sides, sides, st.integers(1, 4)),  # convolutions in 1, 2 and 3 dimensions
    st.tuples(sides, sides, st.integers(1, 3), st.integers(1, 3)),
    st.tuples(sides, sides, st.integers(1, 2), st.integers(1, 3), st.integers(1, 2)),
)


def values_of(shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def total_by(owner: torch.Tensor, weights: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(sizes.numel(), dtype=weights.dtype)
    return total.index_add(0, owner.flatten(), weights.flatten()).view(sizes.shape)


@quick
@given(patterns, shapes)
def test_sizes_sum_to_the_number_of_weights(pattern: Pattern, shape: tuple[int, ...]) -> None:
    sizes = pattern.sizes(shape)
    assert sizes.dtype == torch.int64
    assert int(sizes.sum()) == math.prod(shape)
    assert sizes.shape == pattern.reduce(torch.ones(shape)).shape
    assert int(sizes.min()) >= (0 if isinstance(pattern, NM) else 1)


@quick
@given(patterns, shapes, st.sampled_from(["mean", "max"]))
def test_reduce_undoes_expand(pattern: Pattern, shape: tuple[int, ...], how: str) -> None:
    sizes = pattern.sizes(shape)
    units = values_of(tuple(sizes.shape))
    back = pattern.reduce(pattern.expand(units, shape), how)
    assert torch.allclose(back[sizes > 0], units[sizes > 0], rtol=1e-12)


@quick
@given(patterns, shapes)
def test_expand_gives_a_unit_one_value_at_as_many_weights_as_it_holds(pattern: Pattern, shape: tuple[int, ...]) -> None:
    sizes = pattern.sizes(shape)
    numbers = torch.arange(sizes.numel()).view(sizes.shape)
    owner = pattern.expand(numbers, shape)
    assert owner.shape == shape
    assert torch.equal(owner.flatten().bincount(minlength=sizes.numel()).view(sizes.shape), sizes)
    weights = values_of(shape)
    mean = total_by(owner, weights, sizes) / sizes.clamp(min=1)
    assert torch.allclose(pattern.expand(pattern.reduce(weights), shape), mean.flatten()[owner], rtol=1e-9)


@quick
@given(patterns, shapes)
def test_reductions_agree_with_their_definitions_on_every_unit(pattern: Pattern, shape: tuple[int, ...]) -> None:
    sizes, weights = pattern.sizes(shape), values_of(shape)
    owner = pattern.expand(torch.arange(sizes.numel()).view(sizes.shape), shape)
    real = sizes > 0
    largest = torch.full((sizes.numel(),), -torch.inf, dtype=weights.dtype)
    largest = largest.scatter_reduce(0, owner.flatten(), weights.flatten(), "amax").view(sizes.shape)
    assert torch.equal(pattern.reduce(weights, "max")[real], largest[real])
    assert torch.allclose(pattern.reduce(weights, "sum"), total_by(owner, weights, sizes), rtol=1e-9)
    assert torch.allclose(pattern.reduce(weights, "l2"), total_by(owner, weights.square(), sizes).sqrt(), rtol=1e-9)


def test_a_block_is_out_by_in_channels_at_one_kernel_position() -> None:
    shape, pattern = (5, 7, 2, 3), Block(2, 3)
    sizes = pattern.sizes(shape)
    owner = pattern.expand(torch.arange(sizes.numel()).view(sizes.shape), shape)
    members: dict[tuple[int, ...], set[int]] = {}
    for o in range(5):
        for i in range(7):
            for y in range(2):
                for x in range(3):
                    members.setdefault((o // 2, i // 3, y, x), set()).add(int(owner[o, i, y, x]))
    assert all(len(units) == 1 for units in members.values())
    assert len(set.union(*members.values())) == len(members) == sizes.numel()
    assert {int(s) for s in sizes.flatten()} == {6, 3, 2, 1}  # whole blocks, the edges and the corner
    stripes = [int(owner[o, 0, 0, 0]) // sizes.shape[1] for o in range(5)]
    assert stripes == [0, 0, 1, 1, 2]  # a row of units is a stripe of output channels


def test_a_row_of_n_m_is_m_neighbours_along_the_input_at_one_output_and_position() -> None:
    shape, pattern = (2, 6, 1, 2), NM(2, 4)
    weights = torch.arange(24.0).view(shape)
    rows = pattern.reduce(weights)
    real = pattern.sizes(shape) > 0
    seen = []
    for row, here in zip(rows, real, strict=True):
        places = [(int(v) // 12, int(v) % 12 // 2, int(v) % 2) for v in row[here]]  # (out, in, position)
        assert len({(o, p) for o, _, p in places}) == 1
        inputs = [i for _, i, _ in places]
        assert inputs == list(range(inputs[0], inputs[0] + len(inputs)))
        assert inputs[0] % 4 == 0
        seen += places
    assert len(set(seen)) == 24
    assert sorted(real.sum(1).tolist()) == [2] * 4 + [4] * 4


def test_a_channel_is_all_of_one_output() -> None:
    weights = torch.arange(24.0).view(2, 3, 4)
    assert Channel().reduce(weights, "sum").tolist() == [[66.0, 210.0]]
    assert Channel().reduce(weights).tolist() == [[5.5, 17.5]]


def test_only_n_m_prescribes_a_density() -> None:
    assert NM(2, 4).fixed_density == 0.5
    assert [p.fixed_density for p in (Unstructured(), Block(2, 2), Channel())] == [None] * 3


@quick
@given(patterns)
def test_the_text_of_a_pattern_reads_back(pattern: Pattern) -> None:
    assert parse_pattern(str(pattern)) == pattern
    assert parse_pattern(pattern) is pattern
    assert hash(pattern) == hash(parse_pattern(str(pattern)))


@pytest.mark.parametrize(
    "text",
    ["", "block", "block:", "block:16", "block:16x", "block:-1x2", "block:16X8", "block:1.5x2", "nm:2", "nm:2:4:8", "nm:2/4"],
)
def test_a_malformed_text_is_answered_with_the_forms(text: str) -> None:
    with pytest.raises(PatternError, match="block:OUTxIN"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["Unstructured", " unstructured", "channels", None, 5])
def test_what_names_no_pattern_is_answered_with_the_forms(text: str) -> None:
    with pytest.raises(PatternError, match="block:OUTxIN"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["block:0x4", "block:4x0", "nm:0:4", "nm:5:4", "nm:0:0"])
def test_impossible_numbers_are_refused(text: str) -> None:
    with pytest.raises(PatternError, match="got"):
        parse_pattern(text)


@pytest.mark.parametrize("pattern", [Block(2, 2), Channel()])
def test_an_unknown_reduction_is_refused(pattern: Pattern) -> None:
    with pytest.raises(PatternError, match="median"):
        pattern.reduce(torch.ones(4, 4), "median")  # type: ignore[arg-type]
