"""Codebooks, the relative index and the entropy code: each against its definition, its optimum or a plain loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microglia.compress import entropy
from microglia.compress.codebook import kmeans, nearest, share
from microglia.compress.entropy import canonical_codes, code_lengths, decode, encode, stored_size
from microglia.compress.relative_index import decode_gaps, encode_gaps, filler_rate, gap_counts
from microglia.core.errors import MicrogliaError

RANDOM = np.random.default_rng(0)
INITIAL = pytest.mark.parametrize("initial", ["linear", "density", "random"])


def cost(values: np.ndarray, centroids: np.ndarray) -> float:
    return float(((values[:, None] - centroids) ** 2).min(1).sum())


def optimum(values: np.ndarray, count: int) -> float:
    """The best of all ways to cut the sorted values into intervals."""
    values = np.sort(values)
    cuts = itertools.combinations(range(1, len(values)), count - 1)
    return min(
        sum(((values[a:b] - values[a:b].mean()) ** 2).sum() for a, b in itertools.pairwise((0, *cut, len(values))))
        for cut in cuts
    )


class TestCodebook:
    @given(st.lists(st.integers(-20, 20), min_size=2, max_size=11), st.integers(1, 4))
    @settings(max_examples=60, deadline=None)
    def test_the_exact_optimum_is_the_best_of_all_intervals(self, values: list[int], count: int) -> None:
        given_ = np.array(values, dtype=float)
        found = kmeans(given_, count, exact=True)
        assert cost(given_, found.centroids) == pytest.approx(optimum(given_, min(count, len(values))), abs=1e-9)
        assert found.errors[-1] == pytest.approx(cost(given_, found.centroids), abs=1e-9)
        assert len(found.centroids) <= min(count, len(set(values)))

    @INITIAL
    def test_the_error_never_rises_and_ends_at_a_fixed_point(self, initial: str) -> None:
        values = np.concatenate([RANDOM.normal(size=3000), RANDOM.normal(5, 0.1, size=50)])
        found = kmeans(values, 15, initial=initial)  # type: ignore[arg-type]
        assert len(found.errors) > 3
        assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(found.errors))
        assert found.errors[-1] == pytest.approx(cost(values, found.centroids))
        codes = nearest(values, found.centroids)
        means = [values[codes == k].mean() for k in range(15) if (codes == k).any()]
        np.testing.assert_allclose(means, [c for k, c in enumerate(found.centroids) if (codes == k).any()])
        assert found.errors[-1] >= kmeans(values, 15, exact=True).errors[-1] * (1 - 1e-12)

    def test_one_round_equals_a_plain_loop(self) -> None:
        values = RANDOM.normal(size=200)
        start = np.linspace(values.min(), values.max(), 6)
        owner = ((values[:, None] - start) ** 2).argmin(1)
        plain = [values[owner == k].mean() if (owner == k).any() else start[k] for k in range(6)]
        np.testing.assert_allclose(kmeans(values, 6, rounds=1).centroids, plain)

    def test_an_empty_cluster_keeps_its_centroid(self) -> None:
        values = np.array([0.0, 0.1, 0.2, 0.3, 10.0])
        assert kmeans(values, 3, rounds=1).centroids[1] == pytest.approx(5.0)

    def test_linear_keeps_rare_large_weights(self) -> None:
        values = np.concatenate([RANDOM.normal(size=10_000) * 0.01, [3.0]])
        assert kmeans(values, 7).centroids[-1] == pytest.approx(3.0)

    def test_random_follows_its_seed(self) -> None:
        values = RANDOM.normal(size=500)
        one, again, other = (kmeans(values, 5, initial="random", seed=s, rounds=1).centroids for s in (1, 1, 2))
        assert np.array_equal(one, again)
        assert not np.array_equal(one, other)

    def test_few_different_values_are_kept_exactly(self) -> None:
        found = kmeans([3.0, -1.0, 3.0, 0.5], 8)
        assert found.centroids.tolist() == [-1.0, 0.5, 3.0]

    @pytest.mark.parametrize(("values", "count"), [([], 3), ([1.0, float("nan")], 3), ([float("inf")], 2), ([1.0], 0)])
    def test_wrong_input_ends_in_a_sentence(self, values: list[float], count: int) -> None:
        with pytest.raises(MicrogliaError, match="Clusters need finite numbers"):
            kmeans(values, count)

    def test_an_unknown_start_and_a_table_too_large_are_refused(self) -> None:
        with pytest.raises(MicrogliaError, match="linear"):
            kmeans([1.0, 2.0], 1, initial="forgy")  # type: ignore[arg-type]
        with pytest.raises(MicrogliaError, match="exact=False"):
            kmeans(np.arange(2**20), 200, exact=True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    def test_shared_weights_are_near_and_zeros_stay(self, dtype: torch.dtype) -> None:
        weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
        weight[weight.abs() < 0.8] = 0
        codes, table = share(weight, 4)
        assert (codes.dtype, table.dtype, codes.shape) == (torch.uint8, dtype, weight.shape)
        assert len(table) == 16
        assert table[0] == 0
        shared = table[codes.long()]
        assert torch.equal(shared == 0, weight == 0)
        assert (shared - weight).abs().max() < 0.4

    def test_a_weight_of_zeros_has_no_centroid(self) -> None:
        codes, table = share(torch.zeros(3, 3), 4)
        assert table.tolist() == [0]
        assert not codes.any()

    @pytest.mark.parametrize("bits", [0, 9, 2.0, True, "4"])
    def test_bits_out_of_range_are_refused(self, bits: object) -> None:
        with pytest.raises(MicrogliaError, match="1 to 8 bits"):
            share(torch.ones(2, 2), bits)  # type: ignore[arg-type]


class TestRelativeIndex:
    def plain(self, positions: list[int], bits: int) -> tuple[list[int], list[int]]:
        """The paper's loop."""
        size, codes, entries, before = 1 << bits, [], [], -1
        for position in positions:
            gap = position - before
            while gap > size:
                codes.append(size - 1)
                gap -= size
            entries.append(len(codes))
            codes.append(gap - 1)
            before = position
        return codes, entries

    @given(st.sets(st.integers(0, 2000), max_size=80), st.integers(1, 8))
    @settings(max_examples=150, deadline=None)
    def test_it_equals_the_loop_and_returns(self, positions: set[int], bits: int) -> None:
        ordered = np.array(sorted(positions), dtype=np.int64)
        codes, entries = encode_gaps(ordered, bits)
        assert (codes.tolist(), entries.tolist()) == self.plain(ordered.tolist(), bits)
        assert decode_gaps(codes)[entries].tolist() == ordered.tolist()
        assert np.bincount(codes, minlength=1 << bits).tolist() == gap_counts(ordered, bits).tolist()

    @pytest.mark.parametrize("gap", [1, 7, 8, 9, 15, 16, 17, 24])
    def test_gaps_around_the_longest_one(self, gap: int) -> None:
        codes, entries = encode_gaps(np.array([0, gap]), 3)
        assert len(codes) == 2 + (gap - 1) // 8  # a gap of exactly M needs no filler
        assert decode_gaps(codes)[entries].tolist() == [0, gap]

    @pytest.mark.parametrize(
        ("density", "bits", "rate"), [(0.02, 3, 5.7), (0.02, 4, 2.6), (0.02, 5, 1.1), (0.1, 3, 0.76), (0.1, 4, 0.23)]
    )
    def test_the_rate_of_fillers_is_the_expected_one(self, density: float, bits: int, rate: float) -> None:
        positions = np.flatnonzero(np.random.default_rng(1).random(2**20) < density)
        codes, entries = encode_gaps(positions, bits)
        assert filler_rate(density, bits) == pytest.approx(rate, rel=0.03)
        assert (len(codes) - len(entries)) / len(entries) == pytest.approx(filler_rate(density, bits), rel=0.05)


def entropy_of(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


class TestEntropy:
    @given(st.lists(st.integers(0, 10_000), min_size=2, max_size=256))
    @settings(max_examples=100, deadline=None)
    def test_lengths_satisfy_kraft_and_the_bounds_of_huffman(self, counts: list[int]) -> None:
        given_ = np.array(counts)
        lengths = code_lengths(given_, limit=15)
        used = given_ > 0
        assert ((lengths > 0) == used).all()
        if used.sum() >= 2:
            assert (2.0 ** -lengths[used].astype(float)).sum() == 1
            mean = (given_ * lengths).sum() / given_.sum()
            assert entropy_of(given_) <= mean + 1e-9
            assert mean < entropy_of(given_) + 1

    def test_limited_lengths_are_the_best_of_all(self) -> None:
        counts = np.array([1, 1, 2, 3, 5, 8])  # Fibonacci: Huffman's code would have the lengths 5, 5, 4, 3, 2, 1
        assert sorted(code_lengths(counts)) == [1, 2, 3, 4, 5, 5]
        every = (x for x in itertools.product(range(1, 4), repeat=6) if sum(2.0**-n for n in x) <= 1)
        best = min(sum(c * n for c, n in zip(counts, x, strict=True)) for x in every)
        assert int((counts * code_lengths(counts, limit=3)).sum()) == best

    def test_canonical_codes_are_prefix_free_and_ascend(self) -> None:
        lengths = code_lengths(RANDOM.geometric(0.1, size=40))
        codes = canonical_codes(lengths)
        words = [format(int(c), f"0{n}b") for c, n in zip(codes, lengths, strict=True)]
        assert not any(a != b and b.startswith(a) for a in words for b in words)
        order = np.lexsort((np.arange(40), lengths))
        assert sorted(words) == [words[i] for i in order]

    @given(st.lists(st.integers(0, 6), max_size=30), st.integers(7, 9))
    @settings(max_examples=100, deadline=None)
    def test_symbols_return(self, symbols: list[int], alphabet: int) -> None:
        given_ = np.array(symbols, dtype=np.uint8)
        stored = encode(given_, alphabet)
        assert decode(stored, len(symbols), alphabet).tolist() == symbols

    @pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 2048, 9999])
    @pytest.mark.parametrize("alphabet", [2, 5, 256])
    def test_blocks_of_any_number_return(self, count: int, alphabet: int) -> None:
        symbols = np.minimum(RANDOM.geometric(0.3, size=count) - 1, alphabet - 1).astype(np.uint8)
        symbols[-1] = 1
        stored = encode(symbols, alphabet)
        assert np.array_equal(decode(stored, count, alphabet), symbols)
        assert 0 <= len(stored) - stored_size(np.bincount(symbols, minlength=alphabet)) <= -(-count // entropy.BLOCK)

    def test_many_blocks_cross_the_pieces_that_are_worked_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        symbols = RANDOM.integers(0, 17, size=7 * 1024 + 5).astype(np.uint8)
        stored = encode(symbols, 17)
        monkeypatch.setattr(entropy, "huffman_decoder", lambda: None)
        monkeypatch.setattr(entropy, "CHUNK", 2)
        monkeypatch.setattr(entropy, "LANES", 3)
        assert encode(symbols, 17) == stored
        assert np.array_equal(decode(stored, len(symbols), 17), symbols)

    @pytest.mark.skipif(entropy.huffman_decoder() is None, reason="there are no compiled kernels")
    def test_the_compiled_decoder_and_numpy_agree_also_on_damage(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compiled, refused = entropy.huffman_decoder(), 0
        for number in range(120):
            alphabet = (2, 5, 33, 256)[number % 4]
            symbols = np.minimum(RANDOM.geometric(RANDOM.uniform(0.02, 0.6), size=RANDOM.integers(2, 5000)) - 1, alphabet - 1)
            symbols[:2] = 0, 1
            stored = bytearray(encode(symbols.astype(np.uint8), alphabet))
            if number % 3:
                stored[RANDOM.integers(-(-alphabet // 2), len(stored))] ^= 1 << RANDOM.integers(8)
            found = []
            for decoder in (compiled, None):
                monkeypatch.setattr(entropy, "huffman_decoder", lambda decoder=decoder: decoder)
                try:
                    found.append(decode(bytes(stored), symbols.size, alphabet).tolist())
                except ValueError:
                    found.append([])
            assert found[0] == found[1]
            assert number % 3 or found[0] == symbols.tolist()
            refused += not found[0]
        assert refused > 5  # most damage gives other symbols in as many bits

    def test_a_single_symbol_takes_no_stream(self) -> None:
        stored = encode(np.full(100_000, 3, dtype=np.uint8), 8)
        assert len(stored) == 4
        assert (decode(stored, 100_000, 8) == 3).all()

    def test_the_bits_are_those_of_the_format(self) -> None:
        """By hand: counts 3, 2, 1 give the lengths 1, 2, 2 and the codes 0, 10, 11."""
        stored = encode(np.array([0, 1, 0, 2, 0, 1], dtype=np.uint8), 3)
        assert stored == bytes([0x12, 0x20, 2, 0, 0b01001101, 0b00000000])

    @pytest.mark.parametrize(
        ("stored", "count", "alphabet"),
        [
            (b"", 1, 4), (b"\x00\x00", 1, 4), (b"\x20\x00", 9, 4), (b"\x11\x10\x02\x00\x00\x00", 3, 4), (b"\x11", 10**15, 2),
            (b"\x11\x01\x00", 1, 2), (b"\x11\x01\x00\xff", 3, 2), (b"\x11\x02\x00\x00\x00", 3, 2), (b"\x10\x00", 3, 2),
            (b"\x11\x01\x00\x80\x00", 1, 2), (b"\x11\x01", 1, 1),
        ],
    )  # fmt: skip
    def test_a_damaged_form_is_refused(self, stored: bytes, count: int, alphabet: int) -> None:
        with pytest.raises(ValueError, match=r"codes|stream"):
            decode(stored, count, alphabet)
