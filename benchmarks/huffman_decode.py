"""Claim: the compiled kernel decodes a thousand million Huffman-coded weights in a second on one core.

The weights are codes of 4, 5 and 8 bits whose frequencies are those of trained weights (a Laplace distribution cut into equal
steps). Both decoders are those of `microglia.unpack`: the compiled one decodes four blocks side by side, and NumPy, without
compiled kernels, thousands. The table also names the figures of numba in the specification
(performance.md, B6), which were measured elsewhere. Where `constriction` is installed, it has the speed and the size of its
range coder too, with 16 bits for the frequency of each symbol.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np

from microglia.compress import entropy

WEIGHTS, REPEATS = 4_000_000, 5
NUMBA = {4: 0.432, 5: 0.477, 8: 0.581}
"""Gweights per second and core of four interleaved streams in numba, from the specification."""


def symbols(bits: int) -> np.ndarray:
    values = np.random.default_rng(0).laplace(size=WEIGHTS)
    steps = np.linspace(values.min() / 2, values.max() / 2, (1 << bits) - 1)
    return np.searchsorted(steps, values).astype(np.uint8)


def rate(run: Callable[[], np.ndarray], expected: np.ndarray) -> float:
    """Returns Gweights per second, the median of several runs."""
    assert np.array_equal(run(), expected)
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return expected.size / statistics.median(times) / 1e9


def range_coder(given: np.ndarray) -> tuple[float, float] | None:
    """Returns the rate of constriction's range coder and its bits for each weight, or None if it is not installed."""
    if importlib.util.find_spec("constriction") is None:
        return None
    import constriction

    counts = np.bincount(given, minlength=int(given.max()) + 1).astype(np.float64)
    shares = np.maximum(np.round(counts / counts.sum() * 65535), 1)  # what a file would hold
    model = constriction.stream.model.Categorical(shares / shares.sum(), perfect=False)
    encoder = constriction.stream.queue.RangeEncoder()
    encoder.encode(given.astype(np.int32), model)
    words = encoder.get_compressed()
    stored = 32 * words.size + 16 * counts.size
    speed = rate(lambda: constriction.stream.queue.RangeDecoder(words).decode(model, given.size), given.astype(np.int32))
    return speed, stored / given.size


def main() -> None:
    print("bits  decoder   Gweights/s  bits/weight  numba, 4 streams  constriction  its bits/weight")
    best = {}
    known = {"compiled": entropy.huffman_decoder(), "NumPy": None}
    for bits in (4, 5, 8):
        given = symbols(bits)
        stored = entropy.encode(given, 1 << bits)
        other = range_coder(given)
        for name, decoder in known.items():
            entropy.huffman_decoder = lambda decoder=decoder: decoder
            best[name, bits] = rate(lambda: entropy.decode(stored, given.size, 1 << bits), given)  # noqa: B023
            shown = f"{'-':>14}{'-':>17}" if other is None else f"{other[0]:14.3f}{other[1]:17.3f}"
            print(f"{bits:4}  {name:9}{best[name, bits]:11.3f}{8 * len(stored) / given.size:13.3f}{NUMBA[bits]:18.3f}{shown}")
    print(f"ratio: {best['compiled', 5]:.3f}")


if __name__ == "__main__":
    main()
