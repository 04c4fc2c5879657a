"""Fixed splits: a pure function of the labels, the same on every machine and with every version of every library."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microglia.core.errors import DataError
from microglia.data.hashing import mix


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Carves the same fraction out of every class.

    A hash of (seed, index) chooses the images, not a random generator whose stream may change between releases. The number
    carved is ``round(fraction * N)``, at least 1 when ``fraction`` is positive. Largest remainders divide it among the classes;
    every class keeps at least one image.

    Args:
        labels: int64 [N].
        fraction: Share to carve, in [0, 1).
        seed: Chooses one of the possible splits.

    Returns:
        (kept, carved): disjoint ascending int64 indices that together are 0..N-1.

    Raises:
        DataError: When the fraction is out of range, or nothing can be carved because every class has one image.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"A fraction of {fraction} of the images was asked for; expected 0 <= fraction < 1.")
    classes = labels.numpy()
    carved = np.zeros(len(classes), dtype=bool)
    hashes = mix(seed, np.arange(len(classes), dtype=np.uint64))
    names, counts = np.unique(classes, return_counts=True)
    for name, count in zip(names, _shares(counts, fraction), strict=True):
        members = np.flatnonzero(classes == name)
        carved[members[np.argsort(hashes[members], kind="stable")[:count]]] = True
    if fraction > 0 and not carved.any():
        raise DataError(
            f"No images can be held out of {len(classes)} because no class has two; "
            "expected more images per class, or a data set with splits of its own."
        )
    chosen = torch.from_numpy(carved)
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)


def _shares(counts: npt.NDArray[np.int64], fraction: float) -> npt.NDArray[np.int64]:
    """Returns the number to carve out of each class of the given sizes."""
    quotas = counts * fraction
    shares: npt.NDArray[np.int64] = np.floor(quotas).astype(np.int64)
    total = max(round(fraction * int(counts.sum())), int(fraction > 0))
    by_remainder = np.argsort(shares - quotas, kind="stable")
    room = by_remainder[shares[by_remainder] + 1 < counts[by_remainder]]
    shares[room[: max(total - int(shares.sum()), 0)]] += 1
    return shares
