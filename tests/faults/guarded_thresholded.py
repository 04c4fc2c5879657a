"""Thresholded linear layers through the C interface, every array ending at a page that must not be touched; a script.

Usage: guarded_thresholded.py LIBRARY COUNT. One byte past an array kills the process; a wrong result ends it with status 1.
"""

import ctypes
import sys

import numpy as np
from guarded_kernels import IN_PIECES, Guarded, address, load, narrowed, widened


class Layer(ctypes.Structure):
    """mg_thresholded."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "threshold")),
        *((name, ctypes.c_int32) for name in ("bfloat16", "level", "threads")),
    )


def solved(library, random):
    """Tells whether a layer's outputs are what NumPy says, and whether a damaged problem is refused."""
    rows, inputs, outputs = (int(random.choice(of)) for of in ([1, 2, 4, 5], [1, 7, 8, 17, 40], [1, 8, 15, 33, 64, 200]))
    x, weight, bias = random.standard_normal((rows, inputs)), random.standard_normal((inputs, outputs)), random.random(outputs)
    half, number = bool(random.integers(2)), float(random.choice([0, 0.5, 9]))
    arrays = [np.asarray(a, np.float32) for a in (x, weight, bias, [number])]
    arrays = [narrowed(a) for a in arrays] if half else arrays
    given = [Guarded.of(a) for a in arrays]
    x, weight, bias, threshold = (widened(a) if half else a for a in arrays)
    y = Guarded(np.zeros((rows, outputs), np.uint16 if half else np.float32))
    shift = given[2] if random.random() < 0.5 else None
    pieces = IN_PIECES if random.random() < 0.5 else None
    layer = Layer(rows, inputs, outputs, address(given[1]), address(shift), address(given[3]), half, 9, 3 if pieces else 1)
    code = library.mg_thresholded_linear(
        ctypes.byref(layer), ctypes.c_void_p(given[0].address), ctypes.c_void_p(y.address), pieces
    )
    expected = np.where(np.abs(x) <= threshold, 0, x).astype(np.float64) @ weight + (0 if shift is None else bias)
    found = widened(y.array) if half else y.array
    layer.threads = 0
    refused = library.mg_thresholded_linear(ctypes.byref(layer), None, None, None)
    return code == 0 and refused != 0 and np.allclose(found, expected, rtol=2e-2 if half else 1e-4, atol=2e-2 if half else 1e-4)


def main(path, count):
    library, random = load(path), np.random.default_rng(0)
    wrong = sum(not solved(library, random) for _ in range(count))
    print(library.mg_level_name(library.mg_level()).decode(), wrong)
    sys.exit(0 if wrong == 0 else 1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
