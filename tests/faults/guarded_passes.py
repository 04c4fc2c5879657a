"""Passes over scores and weights through the C interface, every array ending at a page that must not be touched; a script.

Usage: guarded_passes.py LIBRARY COUNT. One byte past an array kills the process; a wrong result ends it with status 1.
"""

import ctypes
import sys

import numpy as np
from guarded_kernels import IN_PIECES, Guarded, address, load

WORD = ctypes.c_int64


class Blocks(ctypes.Structure):
    """mg_scaled."""

    _fields_ = (
        *((name, WORD) for name in ("outputs", "inputs", "taps", "block_outputs", "block_inputs")),
        ("channels_last", ctypes.c_int32),
    )


def place(array):
    return ctypes.c_void_p(address(array))


def selected(library, random):
    """Tells whether a pass of a selection found what NumPy says."""
    length = int(random.choice([0, 1, 31, 32, 33, 64, 100, 1000])) or 1
    values = random.standard_normal(length).astype(np.float32).round(1)
    values[random.random(length) < 0.05] = np.nan
    low, high = sorted(random.choice([-np.inf, -0.5, 0.0, 0.5, np.inf], 2))
    above, below = values >= high, values <= low
    inside = np.flatnonzero(~above & ~below)
    given, mask = Guarded.of(values), Guarded(np.full(length, 7, np.uint8))
    places, counts = Guarded(np.zeros(length, np.int32)), (WORD * 3)()
    code = library.mg_select_pass(
        place(given), WORD(length), ctypes.c_float(low), ctypes.c_float(high), ctypes.c_void_p(mask.address),
        ctypes.c_void_p(places.address), counts,
    )  # fmt: skip
    right = list(counts) == [above.sum(), below.sum(), inside.size]
    return code == 0 and right and np.array_equal(mask.array, above) and np.array_equal(places.array[: inside.size], inside)


def scaled(library, random):
    """Tells whether a weight times its factors, and both gradients, are what NumPy says."""
    rows, across, taps = (int(random.integers(1, 5)) for _ in range(3))
    tall, wide, last = int(random.choice([1, 3, 16])), int(random.choice([1, 2, 8])), bool(random.integers(2))
    weight, gradient = random.standard_normal((2, rows, tall, across, wide, taps)).astype(np.float32)
    factors = random.random((rows, across, taps)).astype(np.float32)
    order = (0, 1, 4, 2, 3) if last else (0, 1, 2, 3, 4)
    expanded = factors[:, None, :, None, :]
    arrays = [Guarded.of(np.ascontiguousarray(a)) for a in (weight.transpose(order), gradient.transpose(order), factors)]
    outs = [Guarded(np.zeros(size, np.float32)) for size in (weight.size, weight.size, factors.size)]
    shape = Blocks(rows * tall, across * wide, taps, tall, wide, last)
    w, g, f = map(place, arrays)
    result, of_weight, of_factors = (ctypes.c_void_p(out.address) for out in outs)
    first = library.mg_scale_blocks(ctypes.byref(shape), w, f, result, None)
    second = library.mg_scale_blocks_backward(ctypes.byref(shape), w, g, f, of_weight, of_factors, None)
    expected = [(weight * expanded).transpose(order), (gradient * expanded).transpose(order), (gradient * weight).sum((1, 3))]
    close = [np.allclose(o.array, e.ravel(), rtol=1e-4, atol=1e-4) for o, e in zip(outs, expected, strict=True)]
    shape.inputs += 1 if wide > 1 else -shape.inputs
    refused = library.mg_scale_blocks(ctypes.byref(shape), w, f, result, None)
    return first == second == 0 and all(close) and refused != 0


def alive(library, random):
    """Tells whether products at what rounds have left, and a round's removal in place, are what NumPy says."""
    size = int(random.integers(1, 200))
    first, weights = random.standard_normal((2, size)).astype(np.float32)
    places = np.flatnonzero(random.random(size) < random.random()).astype(np.int32)
    whole = random.integers(2) == 0
    if whole or not places.size:
        places = np.arange(size, dtype=np.int32)
    stays = (random.random(places.size) < 0.7).astype(np.uint8)
    given, held, at, flags = Guarded.of(first), Guarded.of(weights), Guarded.of(places), Guarded.of(stays)
    products, found = Guarded(np.zeros(places.size, np.float32)), WORD()
    out = ctypes.c_void_p(products.address)
    code = library.mg_alive_products(place(given), place(held), place(at), WORD(places.size), out)
    right = code == 0 and np.array_equal(products.array, first[places] * weights[places])
    left = Guarded(np.zeros(places.size, np.int32)) if whole else at
    code = library.mg_alive_keep(
        None if whole else place(at), place(flags), WORD(places.size), place(held), ctypes.c_void_p(address(left)),
        ctypes.byref(found),
    )  # fmt: skip
    weights[places[stays == 0]] = 0
    same = np.array_equal(left.array[: found.value], places[stays == 1]) and np.array_equal(held.array, weights)
    refused = library.mg_alive_products(None, place(held), place(at), WORD(places.size), out)
    return right and code == 0 and same and refused != 0


def rounded(library, random):
    """Tells whether numbers in a row and in planes are rounded to 8 bits, and back, as NumPy does it."""
    images, planes, size = int(random.integers(1, 4)), int(random.integers(1, 5)), int(random.integers(1, 70))
    x = (random.standard_normal((images, planes, size)) * 200).astype(np.float32)
    x[random.random(x.shape) < 0.05] = np.nan
    scale, zero = np.float32(0.7301), np.float32(random.choice([0, 100]))
    expected = np.rint(np.clip(np.nan_to_num(x * scale + zero), 0, 255)).astype(np.uint8)
    given, row, pixels = Guarded.of(x), Guarded(np.zeros(x.size, np.uint8)), Guarded(np.zeros(x.size, np.uint8))
    wide, numbers, of = Guarded(np.zeros(x.size, np.float32)), tuple(map(ctypes.c_float, (scale, zero))), ctypes.c_void_p
    sizes = [WORD(number) for number in (images, planes, size)]
    codes = [
        library.mg_quantize(place(given), WORD(x.size), *numbers, of(row.address), None),
        library.mg_quantize_planes(place(given), *sizes, *numbers, of(pixels.address), IN_PIECES),
        library.mg_dequantize(of(row.address), WORD(x.size), *numbers, of(wide.address), None),
    ]
    right = np.array_equal(row.array, expected.ravel())
    right &= np.array_equal(pixels.array, expected.transpose(0, 2, 1).ravel())
    right &= np.array_equal(wide.array, (expected.ravel().astype(np.float32) - zero) * scale)
    refused = [
        library.mg_quantize_planes(place(given), *sizes[:1], WORD(number), *sizes[2:], *numbers, of(pixels.address), None)
        for number in (0, 5)
    ]
    return codes == [0, 0, 0] and bool(right) and all(refused)


def main(path, count):
    library, random = load(path), np.random.default_rng(0)
    wrong = sum(not check(library, random) for check in (selected, scaled, alive, rounded) for _ in range(count))
    print(library.mg_level_name(library.mg_level()).decode(), wrong)
    sys.exit(0 if wrong == 0 else 1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
