"""Batches of a map-style dataset, whose order and randomness depend only on (seed, epoch)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from microglia.core.errors import DataError
from microglia.data.batches import check_parts, epoch_generator
from microglia.data.hashing import mix

Collate = Callable[[list[Any]], Any]
"""Combines a list of samples to one batch, (inputs, targets)."""


class SampleBatches:
    """A map-style dataset cut into batches as `microglia.data.Batches` cuts images.

    The order of an epoch depends on (seed, epoch). Each sample is read with the generators of torch, Python and NumPy seeded by
    (seed, epoch, index). So random augmentation is the same after a resumption and for every number of processes.

    Args:
        dataset: Has ``len()`` and returns a sample, (input, target), for an index.
        batch_size: Samples in the global batch, over all ranks; a multiple of ``world``.
        collate: See `Collate`.
        seed: Chooses orders and augmentation.
        shuffle: Whether every epoch has its own random order.
        rank: Index of the part of each batch to yield, in [0, world).
        world: Number of processes that share each batch.

    Raises:
        DataError: A number is out of range, or ``shuffle`` is set and there are fewer samples than ranks.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sequence[Any],
        batch_size: int,
        *,
        collate: Collate = default_collate,
        seed: int = 0,
        shuffle: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_parts(batch_size, rank, world)
        self.dataset, self.batch_size, self.collate = dataset, batch_size, collate
        self.seed, self.shuffle, self.rank, self.world = seed, shuffle, rank, world
        self.count = len(dataset)  # type: ignore[arg-type]
        if shuffle and not len(self):
            raise DataError(f"There are {self.count} samples to train on for {world} ranks; expected one per rank.")

    def __len__(self) -> int:
        """Number of batches in an epoch, the same on every rank."""
        full, rest = divmod(self.count, self.batch_size)
        return full + int(rest >= (self.world if self.shuffle else 1))

    def epoch(self, number: int) -> Iterator[Any]:
        """Yields the batches of one epoch; ``collate`` makes each from this rank's part.

        An empty part, which some ranks have of a small last batch, is skipped.

        Args:
            number: Index of the epoch, 0 or more.
        """
        generator = epoch_generator(self.seed, number)
        order = torch.randperm(self.count, generator=generator) if self.shuffle else torch.arange(self.count)
        for index in range(len(self)):
            start = index * self.batch_size
            size = min(self.batch_size, self.count - start)
            part = order[start + size * self.rank // self.world : start + size * (self.rank + 1) // self.world]
            if len(part):
                yield self.collate([self._sample(number, place) for place in part.tolist()])

    def _sample(self, epoch: int, index: int) -> Any:
        own = mix(self.seed, np.array([epoch], dtype=np.uint64))
        with _seeded(int(mix(int(own[0]), np.array([index], dtype=np.uint64))[0])):
            return self.dataset[index]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Context in which the three global generators are seeded; their states are restored at the end."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 -- what datasets draw from
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
