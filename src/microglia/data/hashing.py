"""One good hash of two integers, for seeds and for fixed splits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(seed: int, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Returns a hash of (seed, value) for each value; different values never collide under one seed.

    The generator SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014): its
    finalizer over ``finalizer(seed) + value * golden``, so that (0, 1) and (1, 0) have nothing in common.

    Args:
        seed: Any integer; it counts modulo 2**64.
        values: uint64 [N].
    """
    start = _finalize(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN)
    return _finalize(start + values * _GOLDEN)


def _finalize(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Returns the bits with every input bit spread over all output bits; a bijection."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
