"""The built-in data set: real handwritten digits that need no download. The only file that imports scikit-learn."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from microglia.core.optional import needs
from microglia.data.images import ImageSet
from microglia.data.splits import stratified_split

_TEST_SEED = 1998
"""The year the digits were published."""


@cache
def _everything() -> ImageSet:
    """Returns all digits, whose file of text is read once; the splits are copies."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy((found.images * 15).astype(np.uint8))[:, None]
    return ImageSet(images, torch.from_numpy(found.target.astype(np.int64)))


def digits() -> dict[str, ImageSet]:
    """Returns 1,797 digits of 8x8 grey pixels, split 80/20 into train and test, the same on every machine.

    The values 0..16 of scikit-learn's ``load_digits`` are stored times 15, as 0..240, because 255 is not a multiple of 16:
    dividing by 15 gives the originals exactly. Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI
    repository, 1998.
    """
    needs("data", "sklearn", what="The data set 'digits'")
    everything = _everything()
    train, test = stratified_split(everything.labels, 0.2, _TEST_SEED)
    return {"train": everything.subset(train), "test": everything.subset(test)}
