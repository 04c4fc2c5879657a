"""The relative index: positions of kept weights as short gaps, with fillers for gaps that are too long.

The weight array is read in C order. The gap G of an entry is its distance from the entry before; for the first one it is its
position + 1. The stored code is G - 1, with b bits. If G > M = 2^b, a filler (code M - 1, value 0) stands for M positions, and
G - M remain.

Source: Han et al. 2016, "Deep Compression", figure 2; the convention is that of its released decoder.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]
Codes = npt.NDArray[np.uint8]
BITS = (1, 8)
"""Minimum and maximum number of bits of a gap code."""


def encode_gaps(positions: Positions, bits: int) -> tuple[Codes, Positions]:
    """Returns the gap codes of ascending positions, and where among them the true entries are.

    Args:
        positions: Positions of the entries, int64 (n,), strictly ascending.
        bits: Bits of a code, 1 to 8.

    Returns:
        (codes, entries): codes are uint8 (n + fillers,); entries, int64 (n,), are indices into the codes.
    """
    size = 1 << bits
    rest = np.diff(positions, prepend=-1) - 1
    entries = np.cumsum(rest // size + 1) - 1
    codes = np.full(int(entries[-1]) + 1 if entries.size else 0, size - 1, dtype=np.uint8)
    codes[entries] = rest % size
    return codes, entries


def decode_gaps(codes: Codes) -> Positions:
    """Returns the position of every code, fillers included: the sum of all (code + 1) so far, less 1."""
    return np.cumsum(codes, dtype=np.int64) + np.arange(codes.size)


def gap_counts(positions: Positions, bits: int) -> Positions:
    """Returns how often each code occurs in the codes of `encode_gaps`, int64 (2^bits,), without making the codes."""
    size = 1 << bits
    rest = np.diff(positions, prepend=-1) - 1
    counts = np.bincount(rest % size, minlength=size)
    counts[size - 1] += int((rest // size).sum())
    return counts


def filler_rate(density: float, bits: int) -> float:
    """Returns the expected number of fillers for each true entry at random positions: q^M / (1 - q^M), q = 1 - density."""
    skipped = float((1 - density) ** (1 << bits))
    return skipped / (1 - skipped)
