"""The k largest: bit for bit what a stable sort says, on every branch and for data made to mislead the sample."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from microglia.core import largest as order
from microglia.core.largest import largest, zeros

CHUNK = 128  # small enough that a few thousand elements pass through every branch
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = ("normal", "few values", "mostly zeros", "constant", "infinite", "sorted", "strided", "two values")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "CHUNK", CHUNK)
    monkeypatch.setattr(order, "SMALL", 0)


def data_of(kind: str, n: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator)
    if kind == "few values":
        x = x.round()
    elif kind == "mostly zeros":
        x = torch.where(torch.rand(n, generator=generator) < 0.02, x.abs(), 0.0)
    elif kind == "constant":
        x = torch.full((n,), -1.5)
    elif kind == "infinite":
        x = torch.where(x > 1, math.inf, torch.where(x < -0.5, -math.inf, x))
    elif kind == "sorted":
        x = x.sort().values
    elif kind == "strided":  # a sample at the stride of the bracket sees one value alone
        x[:: order._stride(n)] = 3.0
    elif kind == "two values":
        x = (x > 0.3).float()
    return x.to(dtype)


def oracle(tensors: Sequence[Tensor], k: int) -> list[Tensor]:
    """A stable sort by (-score, flat index), in a type wide enough for all."""
    flat = torch.cat([t.double() for t in tensors])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[(-flat).argsort(stable=True)[:k]] = True
    return list(mask.split([len(t) for t in tensors]))


def agrees(tensors: Sequence[Tensor], k: int) -> bool:
    found = largest(tensors, k)
    expected = oracle(tensors, k)
    value = min(t[m].min().item() for t, m in zip(tensors, expected, strict=True) if m.any())
    return found.value == value and all(torch.equal(a, b) for a, b in zip(found.masks, expected, strict=True))


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(st.integers(0, 2000), min_size=1, max_size=4),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
    chunk=st.sampled_from([CHUNK, 3 * CHUNK, 1 << 15]),
)
def test_equals_a_stable_sort(kind: str, dtype: torch.dtype, lengths: list[int], share: float, seed: int, chunk: int) -> None:
    lengths = [*lengths, 1]
    tensors = data_of(kind, sum(lengths), dtype, seed).split(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "CHUNK", chunk)
        patch.setattr(order, "SMALL", 0)
        assert agrees(tensors, max(1, round(share * sum(lengths))))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_stable_sort_at_both_ends_and_around_the_ties(kind: str) -> None:
    tensors = data_of(kind, 3000, torch.float32, 1).split([1700, 1, 999, 300])
    nonzero = int((torch.cat(tensors) > 0).sum())
    ranks = {1, 2, 7, 1500, 2998, 2999, 3000, nonzero - 1, nonzero, nonzero + 1}
    assert all(agrees(tensors, k) for k in ranks if 1 <= k <= 3000)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bracket", [(-5.0, -4.0), (4.0, 5.0), (0.1, 0.2), (-math.inf, 0.0), (0.0, math.inf), (0.5, 0.5)])
@pytest.mark.parametrize("k", [1, 900, 1500, 2100, 3000])
def test_a_wrong_bracket_costs_time_only(monkeypatch: pytest.MonkeyPatch, bracket: tuple[float, float], k: int) -> None:
    real, misled = order._bracket, []

    def wrong_once(tensors: Sequence[Tensor], total: int, rank: int) -> tuple[float, float]:
        if misled:
            return real(tensors, total, rank)
        misled.append(True)
        return bracket

    monkeypatch.setattr(order, "_bracket", wrong_once)
    found = largest([data_of("normal", 3000, torch.float32, 2)], k)
    assert torch.equal(found.masks[0], oracle([data_of("normal", 3000, torch.float32, 2)], k)[0])


def test_real_sizes_and_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    lengths = [300_001, 7, 8 * order.CHUNK, 1]  # blocks with and without a rest, whole counts by eight
    for dtype in (torch.float32, torch.bfloat16):
        tensors = data_of("normal", sum(lengths), dtype, 3).split(lengths)
        assert agrees(tensors, sum(lengths) // 3)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [0, 1234, 2999])
@pytest.mark.parametrize("k", [1, 1500, 3000])
def test_nan_is_told(kind: str, where: int, k: int) -> None:
    data = data_of(kind, 3000, torch.float32, 4)
    data[where] = math.nan
    found = largest(data.split([1000, 2000]), k)
    assert math.isnan(found.value)
    assert not found.masks


def test_nan_alone_is_told() -> None:
    assert math.isnan(largest([torch.full((100_000,), math.nan)], 50_000).value)


@pytest.mark.usefixtures("small_chunks")
def test_inside_inference_mode_the_masks_are_ordinary_tensors() -> None:
    with torch.inference_mode():
        tensors = [data_of("normal", 3000, torch.float32, 5)]
        found = largest(tensors, 1000)
    assert not found.masks[0].is_inference()
    assert torch.equal(found.masks[0], oracle(tensors, 1000)[0])


def test_the_input_stays_as_it_was() -> None:
    data = data_of("normal", 100_000, torch.float32, 6)
    before = data.clone()
    largest([data], 30_000)
    assert torch.equal(data, before)


@settings(deadline=None)
@given(st.integers(0, 70), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_positions_of_false(length: int, seed: int, share: float) -> None:
    mask = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < share
    before = mask.clone()
    assert zeros(mask).tolist() == [place for place, value in enumerate(mask.tolist()) if not value]
    assert torch.equal(mask, before)
    assert torch.equal(zeros(mask[1:]), (~mask[1:]).nonzero().squeeze(1))  # not aligned to eight bytes


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=6), st.integers(0, 99))
def test_small_tensors_are_answered_as_one(lengths: list[int], seed: int) -> None:
    lengths = [*lengths, 3]
    tensors = data_of("few values", sum(lengths), torch.float32, seed).split(lengths)
    for small in (0, order.SMALL):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(order, "SMALL", small)
            assert all(agrees(tensors, k) for k in range(1, sum(lengths) + 1, 7))


def test_a_sample_in_step_with_the_layers_sees_all_of_their_channels() -> None:
    strides = [order._stride(total) for total in (10**5, 10**6, 14_714_688, 10**8)]
    assert all(math.gcd(stride, 64 * 9) == 1 for stride in strides)
    assert strides == sorted(strides)


@pytest.mark.parametrize("length", [1, 7, 31, 32, 33, 64, 1000])
@pytest.mark.parametrize("bracket", [(-0.5, 0.5), (0.25, 0.25), (-math.inf, 0.0), (0.0, math.inf), (-math.inf, -math.inf)])
def test_the_compiled_pass_equals_the_one_in_torch(
    length: int, bracket: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.linspace(-1, 1, length)
    places = values[:: max(1, length // 5)]
    places.copy_(torch.tensor([math.nan, math.inf, -math.inf, 0.25, -0.0]).repeat(2)[: len(places)])

    def look() -> tuple[int, int, list[int], list[bool]]:
        mask = torch.empty(length, dtype=torch.bool)
        sides = order._sides(order._Block(values, mask), *bracket)
        return sides.at_least, sides.larger, sides.inside.tolist(), mask.tolist()

    found = look()
    monkeypatch.setattr(order, "_compiled_pass", lambda: None)
    assert found == look()
