"""Canonical Huffman codes of bytes: lengths are limited and stored as lengths; blocks of symbols are streams of their own.

The stored form of n symbols from an alphabet of a:

    lengths     ceil(a / 2) bytes: four bits for each symbol, the first in the high bits; 0 = unused
    sizes       2 bytes (little-endian) for each block of `BLOCK` symbols: bytes of its stream
    streams     each block's codes from the high bits on; the unused bits of its last byte are 0

A single used symbol has the length 1, and sizes and streams are left out. Blocks begin at whole bytes, so that many are decoded
at the same time, by the compiled kernels or, without these, by NumPy: each lane looks up its next code in a table.

Source: Schwartz and Kallick 1964 (canonical codes); Larmore and Hirschberg 1990 (package-merge for limited lengths).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from microglia.runtime.operators import huffman_decoder

Bytes = npt.NDArray[np.uint8]
LIMIT = 12
"""Maximum length of the codes that this library makes; a decoding table of 2^12 entries stays in the nearest cache."""
LONGEST = 15
"""Maximum length that four bits hold, and that a file may have."""
BLOCK = 1024
"""Symbols of a block."""
CHUNK = 512
"""Blocks that are encoded at a time, which bounds the memory."""
LANES = 4096
"""Maximum number of blocks that are decoded at the same time."""


def code_lengths(counts: npt.ArrayLike, limit: int = LIMIT) -> Bytes:
    """Returns the lengths of an optimal prefix code with limited lengths (package-merge).

    Args:
        counts: How often each symbol occurs, (a,) with at most 2^limit used symbols.
        limit: Maximum length.

    Returns:
        Lengths, uint8 (a,); 0 for unused symbols. With two or more used symbols, the sum of 2^-length is 1.
    """
    counts = np.asarray(counts, dtype=np.int64)
    lengths = np.zeros(counts.size, dtype=np.uint8)
    used = np.flatnonzero(counts)
    if used.size < 2:
        lengths[used] = 1
        return lengths
    order = used[np.argsort(counts[used], kind="stable")]
    leaves = counts[order]
    level, is_leaf = leaves, [np.ones(leaves.size, dtype=bool)]
    for _ in range(limit - 1):
        pairs = level[: level.size // 2 * 2].reshape(-1, 2).sum(1)
        both = np.concatenate([leaves, pairs])
        sorting = np.argsort(both, kind="stable")
        level = both[sorting]
        is_leaf.append(sorting < leaves.size)
    taken, found = 2 * leaves.size - 2, np.zeros(leaves.size, dtype=np.uint8)
    for flags in reversed(is_leaf):  # each list gives its first items: leaves, and packages of two items of the list below
        own = int(flags[:taken].sum())
        found[:own] += 1
        taken = 2 * (taken - own)
    lengths[order] = found
    return lengths


def canonical_codes(lengths: Bytes) -> npt.NDArray[np.int64]:
    """Returns the codes of given lengths: consecutive numbers, sorted by (length, symbol)."""
    codes, code, before = np.zeros(lengths.size, dtype=np.int64), 0, 0
    for symbol in np.lexsort((np.arange(lengths.size), lengths)):
        length = int(lengths[symbol])
        if length == 0:
            continue
        code <<= length - before
        codes[symbol] = code
        code, before = code + 1, length
    return codes


def stored_size(counts: npt.ArrayLike) -> int:
    """Returns the bytes of the stored form of symbols with these counts, to within the padding of each block."""
    counts = np.asarray(counts, dtype=np.int64)
    lengths = code_lengths(counts)
    table = -(-counts.size // 2)
    if np.count_nonzero(lengths) < 2:
        return table
    return table + 2 * -(-int(counts.sum()) // BLOCK) + -(-int((counts * lengths).sum()) // 8)


def encode(symbols: Bytes, alphabet: int) -> bytes:
    """Returns the stored form of symbols.

    Args:
        symbols: Symbols, uint8 (n,), each below ``alphabet``.
        alphabet: Number of possible symbols, at most 256.
    """
    lengths = code_lengths(np.bincount(symbols, minlength=alphabet))
    even = np.append(lengths, np.zeros(alphabet % 2, dtype=np.uint8)).reshape(-1, 2)
    table = (even[:, 0] << 4 | even[:, 1]).tobytes()
    if np.count_nonzero(lengths) < 2:
        return table
    codes, step = canonical_codes(lengths), CHUNK * BLOCK
    chunks = [_streams(symbols[at : at + step], lengths, codes) for at in range(0, symbols.size, step)]
    return b"".join([table, *(sizes for sizes, _ in chunks), *(streams for _, streams in chunks)])


def _streams(symbols: Bytes, lengths: Bytes, codes: npt.NDArray[np.int64]) -> tuple[bytes, bytes]:
    """Returns the sizes and the streams of some blocks."""
    blocks = -(-symbols.size // BLOCK)
    own = np.zeros(blocks * BLOCK, dtype=np.int64)
    own[: symbols.size] = lengths[symbols]
    ends = np.cumsum(own.reshape(blocks, BLOCK), axis=1)
    sizes = -(-ends[:, -1] // 8)
    firsts = np.cumsum(sizes) - sizes
    bits = (ends + 8 * firsts[:, None]).reshape(-1)[: symbols.size] - own[: symbols.size]  # where each code begins
    shifted = codes[symbols] << (24 - own[: symbols.size] - (bits & 7))  # a code of 15 bits touches at most three bytes
    places, total = bits >> 3, int(sizes.sum())
    merged = np.zeros(total + 3)
    for byte in range(3):  # no two codes share a bit, so that the sum joins them
        part = (shifted >> (16 - 8 * byte)) & 255
        merged[byte:] += np.bincount(places, part, minlength=total + 3)[: total + 3 - byte]
    return sizes.astype("<u2").tobytes(), merged[:total].astype(np.uint8).tobytes()


def decode(stored: bytes | memoryview, count: int, alphabet: int) -> Bytes:
    """Returns the symbols of a stored form, uint8 (count,).

    Raises:
        ValueError: The stored form is damaged. Nothing of the size of ``count`` is allocated unless the stored bits suffice for
            it, except where all symbols are the same one.
    """
    data = np.frombuffer(stored, dtype=np.uint8)
    width = -(-alphabet // 2)
    if data.size < width:
        raise ValueError("the lengths of its codes are cut off")
    both = np.stack([data[:width] >> 4, data[:width] & 15], axis=1).reshape(-1)
    lengths, rest = both[:alphabet], data[width:]
    used = np.flatnonzero(lengths)
    if both[alphabet:].any() or (used.size == 0 and count > 0):
        raise ValueError("the lengths of its codes are wrong")
    if used.size < 2:
        if rest.size or (used.size and lengths[used[0]] != 1):
            raise ValueError("the lengths of its codes are wrong")
        return np.full(count, used[0] if used.size else 0, dtype=np.uint8)
    if int((1 << (LONGEST - lengths[used].astype(np.int64))).sum()) != 1 << LONGEST:
        raise ValueError("the lengths of its codes form no prefix code")
    blocks = -(-count // BLOCK)
    if rest.size < 2 * blocks or 8 * (rest.size - 2 * blocks) < count:
        raise ValueError("its streams are shorter than their symbols")
    sizes = rest[: 2 * blocks].view("<u2").astype(np.int64) if blocks else np.zeros(0, dtype=np.int64)
    if int(sizes.sum()) != rest.size - 2 * blocks:
        raise ValueError("the sizes of its streams do not fit")
    return _symbols(rest[2 * blocks :], sizes, lengths, count)


def decoding_table(lengths: Bytes) -> npt.NDArray[np.int32]:
    """Returns the table of a prefix code: the next bits, as many as the longest code has -> symbol + 256 length."""
    longest = int(lengths.max())
    used = np.flatnonzero(lengths)
    order = used[np.argsort(lengths[used], kind="stable")]  # by (length, symbol): the codes ascend, and fill the table
    entries = (order + 256 * lengths[order].astype(np.int64)).astype(np.int32)
    return np.repeat(entries, 1 << (longest - lengths[order].astype(np.int64)))


def _symbols(data: Bytes, sizes: npt.NDArray[np.int64], lengths: Bytes, count: int) -> Bytes:
    """Returns the symbols of all streams; some blocks at a time, one lane for each."""
    firsts = np.cumsum(sizes) - sizes
    symbols = np.empty(count, dtype=np.uint8)
    decoder = huffman_decoder()
    if decoder is not None:
        _compiled(decoder, data, sizes, lengths, symbols)
        return symbols
    for at in range(0, sizes.size, LANES):
        begin, own = int(firsts[at]), sizes[at : at + LANES]
        end = begin + int(own.sum())
        piece = np.zeros(end - begin + 3, dtype=np.int32)
        piece[: end - begin] = data[begin:end]
        words = piece[:-2] << 16 | piece[1:-1] << 8 | piece[2:]  # the three bytes from each place on
        start = 8 * (firsts[at : at + LANES] - begin)
        many = min(own.size * BLOCK, count - at * BLOCK)
        symbols[at * BLOCK : at * BLOCK + many] = _lanes(words, start, own, many, lengths)
    return symbols


def _compiled(decoder: Callable[..., int], data: Bytes, sizes: npt.NDArray[np.int64], lengths: Bytes, symbols: Bytes) -> None:
    """Decodes all streams by the compiled kernel, which checks all that it reads."""
    data, short = np.ascontiguousarray(data), sizes.astype(np.uint16)
    table = decoding_table(lengths).astype(np.uint16)
    given = (data.ctypes.data, data.size, short.ctypes.data, short.size, BLOCK, table.ctypes.data, int(lengths.max()))
    if decoder(*given, symbols.ctypes.data, symbols.size) != 0:
        raise ValueError("a stream does not end where its symbols do")


def _lanes(
    words: npt.NDArray[np.int32],
    start: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    count: int,
    lengths: Bytes,
) -> Bytes:
    """Returns the symbols of some blocks, all at the same time; the last may have fewer symbols."""
    table, longest = decoding_table(lengths), int(lengths.max())
    lanes, last = sizes.size, count - (sizes.size - 1) * BLOCK
    steps = BLOCK if lanes > 1 else last
    found = np.empty((steps, lanes), dtype=np.uint8)
    at, shift, mask = start.astype(np.int32), np.int32(24 - longest), np.int32((1 << longest) - 1)
    end = np.int32(0)
    for step in range(steps):
        window = (words.take(at >> 3, mode="clip") >> (shift - (at & 7))) & mask
        entry = table.take(window)
        found[step] = entry & 255
        at += entry >> 8
        if step + 1 == last:
            end = at[-1]
    at[-1] = end
    unused = 8 * sizes - (at - start)
    final = words.take((at - 1) >> 3, mode="clip") >> 16
    if (unused < 0).any() or (unused > 7).any() or (final & ((1 << unused) - 1)).any():
        raise ValueError("a stream does not end where its symbols do")
    return found.T.reshape(-1)[:count]
