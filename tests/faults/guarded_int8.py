"""Convolutions in 8 bits through the C interface, every array ending at a page that must not be touched; a script.

Usage: guarded_int8.py LIBRARY COUNT. One byte past an array kills the process; a wrong result ends it with status 1.
"""

import ctypes
import sys
from itertools import pairwise

import numpy as np
from guarded_kernels import IN_PIECES, Convolution, Guarded, address, draw, load, packed, reference

WORD, POINTER = ctypes.c_int64, ctypes.c_void_p
TILE = 16


class Blocks(ctypes.Structure):
    """mg_blocks_int8."""

    _fields_ = (
        ("blocks", WORD),
        *((name, POINTER) for name in ("values", "row_pointer", "channel", "tap")),
        ("tiled", ctypes.c_int32),
    )


class Rescale(ctypes.Structure):
    """mg_rescale."""

    _fields_ = (
        *((name, POINTER) for name in ("start", "scale", "bias")),
        *((name, ctypes.c_float) for name in ("other", "low", "high")),
        *((name, ctypes.c_int32) for name in ("zero", "wide")),
    )


def tiled(values, pointer, channel, tap):
    """Returns quads, the list of each stripe repeated up to whole tiles with weights of zero, in tiles."""
    lists = [np.arange(begin, end) for begin, end in pairwise(pointer)]
    lists = [np.pad(each, (0, -len(each) % TILE), mode="edge") if len(each) else each for each in lists]
    first = [np.arange(len(each)) < count for each, count in zip(lists, np.diff(pointer), strict=True)]
    index, real = np.concatenate(lists).astype(int), np.concatenate(first)
    tiles = (values[index] * real[:, None, None]).astype(np.int8).reshape(-1, TILE, 16, 4).transpose(0, 2, 1, 3)
    ends = np.concatenate([[0], np.cumsum([len(each) for each in lists])])
    return np.ascontiguousarray(tiles), ends.astype(np.int32), channel[index], tap[index]


def solved(library, random):
    """Tells whether a convolution is what NumPy says, to the bit."""
    sizes, weight, _, _, other, space = draw(random)
    largest = int(random.choice([64, 127]))  # pairs beyond 128 are for levels that add in 32 bits, and for tiles
    in_tiles = bool(random.integers(2)) or largest > 64
    weight = np.where(weight != 0, random.integers(-largest, largest + 1, weight.shape), 0)
    x = random.integers(0, 256, (sizes[0], *sizes[2:4], sizes[1]))
    zero, wide = int(random.choice([0, 37, 255])), bool(random.integers(2))
    outputs, padded = len(weight), -(-len(weight) // 16) * 16
    # Padding is the zero: both sides are shifted by it, so that the reference pads with 0.
    sums = reference(sizes, weight, x - zero, None, None, space, 0)
    scale = (random.random(outputs).astype(np.float32) + np.float32(0.1)) * np.float32(150 / (np.abs(sums).max() + 1))
    bias = (random.standard_normal(outputs) * 40 + 100).astype(np.float32)
    expected = (sums.astype(np.float32).astype(np.float64) * scale + bias).astype(np.float32)
    residual = None
    if other is not None:
        residual = (other * 50).astype(np.float32) if wide else random.integers(0, 256, other.shape).astype(np.uint8)
        expected = (residual.astype(np.float64) * np.float32(0.7301) + expected).astype(np.float32)
    low, high = (-np.inf, np.inf) if wide else (20.0, 199.5)
    expected = np.clip(expected, np.float32(low), np.float32(high))
    expected = expected if wide else np.rint(expected).astype(np.uint8)
    values, pointer, channel, tap = packed(weight, 16, 4)
    values = np.ascontiguousarray(values.transpose(0, 2, 1).astype(np.int8))
    if in_tiles:
        values, pointer, channel, tap = tiled(values, pointer, channel, tap)
    lists = [Guarded.of(a) for a in (values, pointer, channel, None if weight.shape[1] == 1 else tap)]
    blocks = Blocks(len(channel), *map(address, lists), in_tiles)
    numbers = [-zero * weight.sum((1, 2)), scale, bias]
    numbers = [Guarded.of(np.pad(a, (0, padded - outputs)).astype(t)) for a, t in zip(numbers, "iff", strict=True)]
    rescale = Rescale(*map(address, numbers), 0.7301, low, high, zero, wide)
    parallel = IN_PIECES if random.random() < 0.5 else None
    conv, given, beside = Convolution(*sizes, 0, 3 if parallel else 1), Guarded.of(x.astype(np.uint8)), Guarded.of(residual)
    y = Guarded.of(np.full(expected.shape, 7, expected.dtype))
    code = library.mg_block_conv2d_int8(
        ctypes.byref(conv), ctypes.byref(blocks), ctypes.byref(rescale), POINTER(address(given)), WORD(sizes[1]),
        POINTER(address(y)), WORD(outputs), POINTER(address(beside)), WORD(outputs), parallel,
    )  # fmt: skip
    return code == 0 and np.array_equal(y.array, expected)


def refused(library):
    """Tells whether tiles whose lists end within a tile are refused."""
    numbers = [Guarded.of(np.zeros(16, t)) for t in "iff"]
    lists = [Guarded.of(a) for a in (np.zeros((1, 16, 16, 4), np.int8), np.array([0, 8], np.int32), np.zeros(8, np.int32))]
    x, y = Guarded.of(np.zeros(4, np.uint8)), Guarded.of(np.zeros(16, np.uint8))
    conv = Convolution(1, 4, 1, 1, 16, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1)
    blocks, rescale = Blocks(8, *map(address, lists), None, 1), Rescale(*map(address, numbers), 1.0, 0.0, 255.0, 0, 0)
    given = ctypes.byref(conv), ctypes.byref(blocks), ctypes.byref(rescale)
    code = library.mg_block_conv2d_int8(
        *given, POINTER(address(x)), WORD(4), POINTER(address(y)), WORD(16), None, WORD(16), None
    )
    return code == 3  # MG_BAD_ROW_POINTER


def main(path, count):
    library, random = load(path), np.random.default_rng(0)
    wrong = sum(not solved(library, random) for _ in range(count)) + (not refused(library))
    print(library.mg_level_name(library.mg_level()).decode(), wrong)
    sys.exit(0 if wrong == 0 else 1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
