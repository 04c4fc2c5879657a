"""The algebra of dimensions against tensors of masks that are cut and reshaped the same way."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microglia.graph.dims.algebra import Algebra
from microglia.graph.dims.atoms import UNIT, Misaligned

SIZES = st.integers(2, 6)
PROPERTY = settings(deadline=None, max_examples=60)


@st.composite
def dims(draw, algebra, depth=1):
    """Draws a Dim of the algebra: a sum of products, nested up to the given depth."""
    segments = []
    for _ in range(draw(st.integers(1, 3))):
        factors = []
        for _ in range(draw(st.integers(1, 2))):
            if depth and draw(st.booleans()):
                factors.append(draw(dims(algebra, depth - 1)))
            else:
                factors.append(algebra.fresh(draw(SIZES)))
        segments.append(algebra.product(*factors))
    return algebra.sum(*segments)


@st.composite
def algebra_and_dim(draw):
    algebra = Algebra()
    return algebra, draw(dims(algebra))


def choice(algebra, seed):
    """Draws kept units for every atom that is not bound and not frozen, at least one of each."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for atom, size in enumerate(algebra.sizes):
        if algebra.bound[atom] is None and not algebra.frozen[atom]:
            kept[atom] = torch.rand(size, generator=generator) < 0.6
            kept[atom][int(torch.randint(size, (1,), generator=generator))] = True
    return kept


def counts(kept):
    return {atom: int(mask.sum()) for atom, mask in kept.items()}


def outer(algebra, dims, kept):
    """The mask of a tensor with the given Dims."""
    mask = torch.ones((), dtype=torch.bool)
    for dim in dims:
        mask = mask[..., None] & algebra.mask(dim, kept)
    return mask


def brute_mask(algebra, dim, kept):
    """The mask by going through every entry: the digits of its index in each segment."""
    found = []
    for segment in algebra.normal(dim):
        factors = [
            [bool(kept[f][i]) if f in kept else True for i in range(algebra.sizes[f])]
            if isinstance(f, int)
            else brute_mask(algebra, f, kept)
            for f in segment
        ]
        for entry in range(math.prod(len(f) for f in factors)):
            stays, rest = True, entry
            for factor in reversed(factors):
                rest, digit = divmod(rest, len(factor))
                stays &= factor[digit]
            found.append(stays)
    return found


# ------------------------------------------------------------------------------------------------------------ kept sets
@PROPERTY
@given(algebra_and_dim(), st.integers(0, 99))
def test_mask_is_the_brute_force_one_and_count_its_sum(drawn, seed):
    algebra, dim = drawn
    kept = choice(algebra, seed)
    mask = algebra.mask(dim, kept)
    assert mask.tolist() == brute_mask(algebra, dim, kept)
    assert algebra.count(dim, counts(kept)) == int(mask.sum())
    assert len(mask) == algebra.size(dim)


@PROPERTY
@given(algebra_and_dim(), st.integers(0, 99))
def test_an_entry_stays_where_all_its_coordinates_do(drawn, seed):
    algebra, dim = drawn
    kept = choice(algebra, seed)
    stays = torch.ones(algebra.size(dim), dtype=torch.bool)
    for atom in set(algebra.leaves(dim)):
        place = algebra.coordinate(dim, atom)
        assert set(place.tolist()) <= set(range(-1, algebra.sizes[atom]))
        if atom in kept:
            stays &= torch.where(place >= 0, kept[atom][place.clamp_min(0)], torch.tensor(True))
    assert torch.equal(stays, algebra.mask(dim, kept))


def test_everything_stays_unless_named():
    algebra = Algebra()
    dim = algebra.product(algebra.fresh(3), algebra.fresh(4))
    assert algebra.mask(dim, {}).all()
    assert algebra.count(dim, {}) == 12
    assert algebra.count(UNIT, {}) == 1
    assert algebra.mask(UNIT, {}).tolist() == [True]


# ------------------------------------------------------------------------------------------------- cut, factor, regroup
@PROPERTY
@given(algebra_and_dim(), st.data(), st.integers(0, 99))
def test_a_cut_is_the_cut_mask(drawn, data, seed):
    algebra, dim = drawn
    size = algebra.size(dim)
    at = data.draw(st.integers(0, size))
    left, right = algebra.cut(dim, at)
    kept = choice(algebra, seed)
    assert algebra.size(left) == at
    assert algebra.size(right) == size - at
    assert torch.equal(torch.cat([algebra.mask(left, kept), algebra.mask(right, kept)]), algebra.mask(dim, kept))


@PROPERTY
@given(algebra_and_dim(), st.data(), st.integers(0, 99))
def test_a_factor_is_the_reshaped_mask(drawn, data, seed):
    algebra, dim = drawn
    before = algebra.size(dim)
    size = data.draw(st.sampled_from([n for n in range(1, before + 1) if before % n == 0]))
    try:
        lead, trail = algebra.factor(dim, size)
    except Misaligned:
        assert algebra.size(algebra.normal(dim)) == before
        return
    kept = choice(algebra, seed)
    assert algebra.size(lead) * algebra.size(trail) == before
    assert algebra.size(trail) == size
    assert torch.equal(outer(algebra, [lead, trail], kept), algebra.mask(dim, kept).view(-1, size))


@PROPERTY
@given(st.data(), st.integers(0, 99))
def test_a_reshape_is_the_reshaped_mask(data, seed):
    algebra = Algebra()
    before = [data.draw(dims(algebra)) for _ in range(data.draw(st.integers(1, 2)))]
    sizes = [algebra.size(d) for d in before]
    shape, rest = [], math.prod(sizes)
    while rest > 1:
        n = data.draw(st.sampled_from([n for n in range(2, rest + 1) if rest % n == 0]))
        shape.append(n)
        rest //= n
    after, lost = algebra.regroup(before, shape, "reshape")
    kept = choice(algebra, seed)
    assert [algebra.size(d) for d in after] == shape
    assert torch.equal(outer(algebra, after, kept), outer(algebra, before, kept).reshape(shape))
    assert all(algebra.is_frozen(d) for d in lost)


@PROPERTY
@given(st.data(), st.integers(0, 99))
def test_what_is_one_has_one_mask(data, seed):
    algebra = Algebra()
    left = data.draw(dims(algebra))
    right, rest = (), algebra.size(left)
    while rest:  # another sum of products of the same size
        n = data.draw(st.integers(1, rest))
        split = data.draw(st.sampled_from([k for k in range(1, n + 1) if n % k == 0]))
        right += algebra.product(algebra.fresh(split), algebra.fresh(n // split))
        rest -= n
    one = algebra.unify(left, right)
    kept = choice(algebra, seed)
    assert algebra.size(algebra.normal(left)) == algebra.size(algebra.normal(right))
    if not one:
        assert algebra.is_frozen(left)
        assert algebra.is_frozen(right)
    assert torch.equal(algebra.mask(left, kept), algebra.mask(right, kept))


@PROPERTY
@given(st.data(), st.integers(0, 99))
def test_earlier_statements_survive_later_ones(data, seed):
    """A random history of operations on dimensions; each states an equality of masks, and all hold at its end."""
    algebra = Algebra()
    known = [data.draw(dims(algebra)) for _ in range(3)]
    statements = []
    for _ in range(data.draw(st.integers(1, 6))):
        what = data.draw(st.sampled_from(["cut", "factor", "cat", "times", "unify", "fresh"]))
        one, other = (known[data.draw(st.integers(0, len(known) - 1))] for _ in range(2))
        size = algebra.size(one)
        if what == "cut" and size > 1:
            at = data.draw(st.integers(1, size - 1))
            made = algebra.cut(one, at)
            statements.append((one, lambda kept, made=made: torch.cat([algebra.mask(d, kept) for d in made])))
        elif what == "factor":
            n = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
            try:
                made = algebra.factor(one, n)
            except Misaligned:
                continue
            statements.append((one, lambda kept, made=made: outer(algebra, made, kept).flatten()))
        elif what == "cat" and size + algebra.size(other) <= 60:
            made = (algebra.sum(one, other),)
            pieces = (one, other)
            statements.append((made[0], lambda kept, pieces=pieces: torch.cat([algebra.mask(d, kept) for d in pieces])))
        elif what == "times" and size * algebra.size(other) <= 60:
            made = (algebra.product(one, other),)
            pieces = (one, other)
            statements.append((made[0], lambda kept, pieces=pieces: outer(algebra, pieces, kept).flatten()))
        elif what == "unify" and size == algebra.size(other):
            algebra.unify(one, other)
            statements.append((one, lambda kept, other=other: algebra.mask(other, kept)))
            continue
        else:
            made = (algebra.fresh(data.draw(SIZES)),)
        known += made
    kept = choice(algebra, seed)
    for dim, other in statements:
        assert torch.equal(algebra.mask(dim, kept), other(kept))
        assert algebra.count(dim, counts(kept)) == int(algebra.mask(dim, kept).sum())


# ------------------------------------------------------------------------------------------------------- closed forms
def atoms(algebra, dim):
    return [algebra.sizes[a] for a in algebra.leaves(dim)]


def test_a_sum_inside_a_product():
    """Pitfall 1: view(B, N, 4, 9).split([2, 2, 5], -1) makes the weight's dimension 4 x (2 + 2 + 5)."""
    algebra = Algebra()
    weight = algebra.fresh(36)
    heads, width = algebra.factor(weight, 9)
    q, rest = algebra.cut(width, 2)
    k, v = algebra.cut(rest, 2)
    assert [algebra.size(d) for d in (heads, q, k, v)] == [4, 2, 2, 5]
    (segment,) = algebra.normal(weight)
    assert segment[0] == heads[0][0]
    assert segment[1] == (q[0], k[0], v[0])
    head, unit = heads[0][0], v[0][0]
    kept = {head: torch.tensor([True, False, True, True]), unit: torch.tensor([True, True, False, False, True])}
    row = torch.tensor([True] * 4 + [True, True, False, False, True])
    assert torch.equal(algebra.mask(weight, kept), torch.cat([row, torch.zeros(9, dtype=torch.bool), row, row]))
    assert algebra.count(weight, counts(kept)) == 3 * 7


def test_products_compound():
    """Pitfall 3: half of the groups and half of each group leave a quarter of the channels."""
    algebra = Algebra()
    channels = algebra.fresh(32)
    groups, inside = algebra.factor(channels, 4)
    kept = {groups[0][0]: 4, inside[0][0]: 2}
    assert algebra.count(channels, kept) == 8


def test_one_atom_for_all_stages():
    """Pitfall 3: stages that double through grouped convolutions share one atom, 48 x 2 x 2 x 2."""
    algebra = Algebra()
    stages = [algebra.fresh(48 * 2**i) for i in range(4)]
    for narrow, wide in itertools.pairwise(stages):
        assert algebra.unify(wide, algebra.product(narrow, algebra.fresh(2)))
    assert [atoms(algebra, s) for s in stages] == [[48], [48, 2], [48, 2, 2], [48, 2, 2, 2]]
    assert len({next(algebra.leaves(s)) for s in stages}) == 1


def test_a_channel_shuffle_with_an_odd_half():
    """Pitfall 5: 58 -> 29 x 2, cut in the middle again: the cut goes through a row, which is unrolled."""
    algebra = Algebra()
    channels = algebra.fresh(58)
    lead, trail = algebra.factor(channels, 2)
    left, right = algebra.cut(algebra.product(lead, trail), 29)
    assert algebra.size(left) == algebra.size(right) == 29
    assert atoms(algebra, lead) == [14, 1, 14]  # the row in the middle can still go by itself
    kept = choice(algebra, 3)
    assert torch.equal(algebra.mask(channels, kept), torch.cat([algebra.mask(left, kept), algebra.mask(right, kept)]))


def test_a_row_is_unrolled_in_two_parts():
    """lead x tail cut inside row q is q x (u + v) + u and v + r x (u + v)."""
    algebra = Algebra()
    lead, tail = algebra.fresh(7), algebra.fresh(5)
    whole = algebra.product(lead, tail)
    left, right = algebra.cut(whole, 3 * 5 + 2)
    assert [[algebra.size((s,)) for s in algebra.normal(d)] for d in (left, right)] == [[15, 2], [3, 15]]
    assert atoms(algebra, tail) == [2, 3]
    assert atoms(algebra, lead) == [3, 1, 3]  # row 3, between them, can go by itself
    kept = {next(algebra.leaves(tail)): torch.tensor([True, False])}
    expected = torch.tensor([True, False, True, True, True] * 7)
    assert torch.equal(algebra.mask(whole, kept), expected)


def test_concatenated_halves_have_one_shuffle_factor():
    algebra = Algebra()
    one, other = algebra.fresh(6), algebra.fresh(10)
    lead, trail = algebra.factor(algebra.sum(one, other), 2)
    assert atoms(algebra, lead) == [3, 5]
    assert atoms(algebra, trail) == [2]
    assert atoms(algebra, one) == [3, 2]
    assert atoms(algebra, other) == [5, 2]
    assert list(algebra.leaves(one))[1] == list(algebra.leaves(other))[1]


def test_heads_and_width():
    algebra = Algebra()
    weight = algebra.fresh(12)
    out, lost = algebra.regroup([algebra.fresh(2), weight], [2, 3, 4], "reshape")
    assert lost == []
    assert algebra.normal(weight) == (out[1][0] + out[2][0],)


# ---------------------------------------------------------------------------------------------------------------- flags
def test_flags_spread_to_the_parts_and_the_first_reason_stays():
    algebra = Algebra()
    dim = algebra.fresh(12)
    (atom,) = algebra.leaves(dim)
    algebra.freeze(dim, why="first")
    algebra.freeze(dim, why="second")
    algebra.renormalize(dim)
    lead, trail = algebra.factor(dim, 3)
    left, right = algebra.cut(trail, 1)
    assert algebra.size(left) == 1
    parts = [*algebra.leaves(lead), *algebra.leaves(right)]
    assert [algebra.sizes[p] for p in parts] == [4, 2]
    assert all(algebra.frozen[p] and algebra.renormalized[p] for p in parts)
    assert {algebra.reasons[p] for p in [atom, *parts]} == {"first"}


def test_a_split_before_the_freeze_freezes_the_parts_only():
    algebra = Algebra()
    dim = algebra.fresh(6)
    left, right = algebra.cut(dim, 2)
    algebra.freeze(left, why="positions")
    assert algebra.is_frozen(left)
    assert not algebra.is_frozen(right)
    assert not algebra.is_frozen(dim)


def test_a_frozen_dim_freezes_what_it_meets():
    algebra = Algebra()
    frozen, free = algebra.fresh(4, "input"), algebra.fresh(4)
    for one, other in ((frozen, free), (algebra.fresh(4), frozen)):
        assert algebra.unify(one, other)
        assert algebra.is_frozen(one)
        assert algebra.is_frozen(other)
    assert algebra.reasons[next(algebra.leaves(free))] == "input"


def test_a_fresh_dim_of_one_entry_is_the_unit():
    algebra = Algebra()
    assert algebra.fresh(1) == UNIT
    assert algebra.sizes == []
    assert algebra.product(UNIT, algebra.fresh(3), UNIT) == ((0,),)


# ------------------------------------------------------------------------------------------------------------- failures
def test_sizes_that_differ_freeze_both():
    algebra = Algebra()
    four, five = algebra.fresh(4), algebra.fresh(5)
    assert not algebra.unify(four, five, "add")
    assert algebra.is_frozen(four)
    assert algebra.is_frozen(five)
    assert algebra.reasons[0] == "add: sizes differ"


def test_no_common_refinement():
    algebra = Algebra()
    one = algebra.product(algebra.fresh(6), algebra.fresh(4))
    other = algebra.product(algebra.fresh(8), algebra.fresh(3))
    with pytest.raises(Misaligned):
        algebra.factor(one, 3)
    assert not algebra.unify(one, other, "add")
    assert algebra.is_frozen(one)
    assert algebra.is_frozen(other)
    assert "misaligned" in algebra.reasons[next(algebra.leaves(one))]


def test_a_reshape_without_common_refinement_freezes_that_group_alone():
    algebra = Algebra()
    before = [algebra.fresh(5), algebra.product(algebra.fresh(2), algebra.fresh(3)), algebra.fresh(4)]
    after, lost = algebra.regroup(before, [5, 8, 3], "reshape")
    assert [algebra.size(d) for d in after] == [5, 8, 3]
    assert not algebra.is_frozen(after[0])
    assert all(algebra.is_frozen(d) for d in [*before[1:], *after[1:]])
    assert lost


def test_an_atom_is_bound_once_and_to_its_own_size():
    algebra = Algebra()
    algebra.fresh(6)
    with pytest.raises(Misaligned):
        algebra.bind(0, algebra.fresh(5))
    algebra.bind(0, algebra.fresh(6))
    with pytest.raises(Misaligned):
        algebra.bind(0, algebra.fresh(6))


def test_a_reshape_of_nothing():
    algebra = Algebra()
    out, lost = algebra.regroup([algebra.fresh(4), algebra.fresh(0)], [0, 4], "empty")
    assert [algebra.size(d) for d in out] == [0, 4]
    assert lost == []


def test_a_dim_for_people():
    algebra = Algebra()
    heads, key, value = algebra.fresh(4), algebra.fresh(2, "causal"), algebra.fresh(5)
    algebra.renormalize(value)
    assert algebra.show(algebra.product(heads, algebra.sum(key, value))) == "a0:4 x (a1:2! + a2:5~)"
    assert algebra.show(UNIT) == "1"
