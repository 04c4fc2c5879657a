"""A user's own data: any iterable of batches, or any map-style dataset, as the data of a task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, default_collate
from torch.utils.data.distributed import DistributedSampler

from microglia.core.batch import count_examples, take_examples
from microglia.core.errors import DataError
from microglia.data.hashing import mix
from microglia.data.samples import Collate, SampleBatches
from microglia.tasks.task import Batches, Split


@dataclass(frozen=True)
class Samples:
    """A map-style dataset that `loaders` cuts into batches; see `samples`.

    Attributes:
        dataset: Has ``len()`` and returns a sample, (input, target), for an index.
        collate: Maps a list of samples to a batch, (inputs, targets).
    """

    dataset: Any
    collate: Collate


def samples(dataset: Any, *, collate: Collate = default_collate) -> Samples:
    """Returns a map-style dataset as one split of `loaders`, in a reproducible order.

    Batch size and order come from the training's config, as for built-in data sets. The order depends on the seed and the
    epoch; random augmentation in the dataset also depends on the sample. So an interrupted training resumes bit for bit.

    Args:
        dataset: Has ``len()`` and returns a sample, (input, target), for an index.
        collate: Maps a list of samples to a batch, (inputs, targets).

    Raises:
        DataError: The dataset has no length or no samples by index.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"Samples come from a dataset with len() and samples by index, not from {type(dataset).__name__}; give an iterable "
            "of batches to mg.tasks.loaders as it is."
        )
    return Samples(dataset, collate)


Source = Iterable[Any] | Dataset[Any] | Samples


@dataclass(frozen=True)
class Loaders:
    """The batches of a task, one source per split; see `loaders`."""

    train: Source
    test: Source
    validation: Source | None = None

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        augment: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> Batches:
        """Returns the batches of a split; a plain iterable has its own batch size and order."""
        source = {"train": self.train, "test": self.test, "validation": self.validation}[split]
        if isinstance(source, Samples):
            own = SampleBatches(
                source.dataset, batch_size, collate=source.collate, seed=seed, shuffle=shuffle, rank=rank, world=world
            )
            return _Checked(own, split)
        return LoadedBatches(source if source is not None else (), split, seed=seed, rank=rank, world=world)


def loaders(*, train: Source, test: Source, validation: Source | None = None) -> Loaders:
    """Returns the data of a task from iterables of batches, such as a `torch.utils.data.DataLoader`, or from datasets.

    An iterable yields (inputs, targets), both any trees of tensors, in every iteration over it; it has its own batch size. Its
    order is reproducible if it draws only from torch's generator, as a DataLoader without a ``generator`` does. Several ranks
    share every batch, unless the loader has a `DistributedSampler`. A map-style dataset is accepted too; see `samples`.

    Args:
        train: Batches to train on.
        test: Batches to report numbers on.
        validation: Batches to choose on; with None no validation metrics are logged.

    Raises:
        DataError: One of them can be iterated only once, or is not iterable.

    Example:
        >>> import torch, microglia as mg
        >>> batches = [(torch.zeros(2, 3), torch.zeros(2))]
        >>> len(mg.tasks.loaders(train=batches, test=batches).batches("train", 2))
        1
    """
    given = {"train": train, "test": test, "validation": validation}
    return Loaders(**{name: _source(name, value) for name, value in given.items()})  # type: ignore[arg-type]


def _source(name: str, value: Any) -> Source | None:
    if isinstance(value, Dataset) and not isinstance(value, IterableDataset):
        return samples(value)
    if value is None or isinstance(value, Samples):
        return value
    if isinstance(value, Mapping | str) or not hasattr(value, "__iter__"):
        raise DataError(
            f"The {name} batches are an iterable of (inputs, targets), such as a DataLoader, or a dataset; got a "
            f"{type(value).__name__}."
        )
    if isinstance(value, Iterator):
        raise DataError(
            f"The {name} batches are a {type(value).__name__}, which can be gone through once only; give what starts anew at "
            "every epoch, such as a DataLoader or a list of batches."
        )
    return value  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Checked:
    """Batches with a check of their form, (inputs, targets)."""

    own: SampleBatches
    split: str

    def __len__(self) -> int:
        return len(self.own)

    def epoch(self, number: int) -> Iterator[tuple[Any, Any]]:
        for batch in self.own.epoch(number):
            yield _pair(batch, self.split)


class LoadedBatches:
    """The batches of a plain iterable; an epoch is a function of (seed, epoch) as far as torch's generator decides it.

    Args:
        source: Yields (inputs, targets) in every iteration.
        split: Name of the split, for messages.
        seed: Seeds torch's generator anew in every epoch.
        rank: Index of the part of each batch to yield.
        world: Number of processes that share each batch.
    """

    def __init__(self, source: Any, split: str, *, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        self.source, self.split, self.seed, self.rank, self.world = source, split, seed, rank, world
        self._sampler = getattr(source, "sampler", None)
        self._shared = world > 1 and not isinstance(self._sampler, DistributedSampler)

    def __len__(self) -> int:
        """Number of batches in an epoch; counted once if the iterable does not know it."""
        return self._length

    @cached_property
    def _length(self) -> int:
        try:
            return len(self.source)
        except TypeError:
            return sum(1 for _ in self.epoch(0))

    def epoch(self, number: int) -> Iterator[tuple[Any, Any]]:
        """Yields the (inputs, targets) of one epoch.

        Raises:
            DataError: A batch has another form.
        """
        if isinstance(self._sampler, DistributedSampler):
            self._sampler.set_epoch(number)
        seed = int(mix(self.seed, np.array([number], dtype=np.uint64))[0]) % 2**63
        state = torch.Generator().manual_seed(seed).get_state()
        batches: Iterator[Any] | None = None
        while True:  # the loader's generator is separate, so draws between its batches do not change it
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                batches = iter(self.source) if batches is None else batches
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                state = torch.get_rng_state()
            pair = _pair(batch, self.split)
            yield self._part(pair) if self._shared else pair

    def _part(self, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        count = count_examples(batch[0])
        chosen = torch.arange(count * self.rank // self.world, count * (self.rank + 1) // self.world)
        return take_examples(batch[0], chosen), take_examples(batch[1], chosen)


def _pair(batch: Any, split: str) -> tuple[Any, Any]:
    """Returns a batch as (inputs, targets).

    Raises:
        DataError: The batch has another form.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    got = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, list | tuple | Mapping) else "")
    raise DataError(
        f"A batch of the {split} split is a pair (inputs, targets); got {got}. Give a collate function that returns a pair, "
        "such as lambda samples: (inputs, targets), each of them any tree of tensors."
    )
