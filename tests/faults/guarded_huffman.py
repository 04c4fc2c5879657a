"""Random and damaged Huffman streams through the C interface, every array ending at a page that must not be touched; a script.

Usage: guarded_huffman.py LIBRARY COUNT. One byte past an array kills the process; a wrong result ends it with status 1.
"""

import ctypes
import sys

import numpy as np
from guarded_kernels import Guarded, address, load

BLOCK = 50
WORD = ctypes.c_int64


def draw(random):
    """Returns (symbols, lengths of a random prefix code, canonical codes)."""
    alphabet = int(random.choice([2, 3, 7, 40, 256]))
    lengths = np.array([1, 1])
    while lengths.size < alphabet:  # split a random leaf that is not too long
        leaf = random.choice(np.flatnonzero(lengths < 15))
        lengths = np.append(np.delete(lengths, leaf), [lengths[leaf] + 1] * 2)
    lengths = np.sort(lengths)
    codes = (np.cumsum(2.0**-lengths) - 2.0**-lengths) * 2.0**lengths
    weights = 2.0**-lengths if random.random() < 0.7 else np.full(alphabet, 1 / alphabet)
    count = int(random.choice([1, 2, 49, 50, 51, 199, 200, 201, 450]))
    return random.choice(alphabet, count, p=weights), lengths, codes.astype(int)


def encoded(symbols, lengths, codes):
    """Returns the streams of all blocks and their sizes, bit by bit."""
    streams = []
    for at in range(0, symbols.size, BLOCK):
        bits = "".join(format(codes[s], f"0{lengths[s]}b") for s in symbols[at : at + BLOCK])
        bits += "0" * (-len(bits) % 8)
        streams.append(int(bits, 2).to_bytes(len(bits) // 8, "big"))
    return np.frombuffer(b"".join(streams), np.uint8).copy(), np.array([len(s) for s in streams], np.uint16)


def decode(library, data, sizes, table, longest, count):
    """Returns (code of the kernel, symbols)."""
    given = [Guarded.of(array) for array in (data, sizes, table)]
    out = Guarded(np.zeros(count, np.uint8))
    places = [ctypes.c_void_p(address(array)) for array in given]
    code = library.mg_huffman_decode(places[0], WORD(data.size), places[1], WORD(sizes.size), WORD(BLOCK), places[2], longest,
                                     ctypes.c_void_p(out.address), WORD(count))  # fmt: skip
    return code, out.array.copy()


def main(path, count):
    library, random, wrong, refused = load(path), np.random.default_rng(0), 0, 0
    for _ in range(count):
        symbols, lengths, codes = draw(random)
        longest = int(lengths.max())
        table = np.repeat(np.arange(lengths.size) + 256 * lengths, 1 << (longest - lengths)).astype(np.uint16)
        data, sizes = encoded(symbols, lengths, codes)
        code, found = decode(library, data, sizes, table, longest, symbols.size)
        wrong += code != 0 or not np.array_equal(found, symbols)
        damaged = data.copy()
        damaged[random.integers(damaged.size)] ^= 1 << random.integers(8)
        refused += decode(library, damaged, sizes, table, longest, symbols.size)[0] != 0
        other = sizes.copy()
        other[random.integers(sizes.size)] ^= random.choice([1, 2, 2**15])
        wrong += decode(library, data, other, table, longest, symbols.size)[0] == 0  # sizes do not add up
        wrong += decode(library, data, sizes, np.zeros_like(table), longest, symbols.size)[0] == 0  # codes of no bits
        wrong += decode(library, data[:-1], sizes, table, longest, symbols.size)[0] == 0
    print(library.mg_level_name(library.mg_level()).decode(), wrong, refused)
    sys.exit(0 if wrong == 0 and refused > count // 4 else 1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
