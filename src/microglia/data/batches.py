"""Batches from memory: gather, augment and normalize whole tensors, the same bits for every number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Generator, Tensor

from microglia.core.errors import DataError
from microglia.data.augmentation import Augmentation, Crops
from microglia.data.hashing import mix
from microglia.data.images import ImageSet
from microglia.data.normalization import Normalization


class Batches:
    """An image set cut into batches, in an order that depends only on (seed, epoch).

    A training that resumes at epoch 7 calls ``epoch(7)`` and gets the same batches as without the interruption: no generator
    state has to be saved. Order and augmentation are drawn for the *global* batch of ``batch_size`` images; rank r of ``world``
    gets the r-th contiguous part of it, so the ranks together see bit for bit what one process would see.

    The last batch may be partial. It is split like the others, into parts whose sizes differ by at most one. If it has fewer
    images than there are ranks, ``shuffle`` decides. With ``shuffle`` (training: every rank has work in every step) it is
    dropped. Otherwise (evaluation: every image counts) it is kept, and some ranks yield a batch of no images. Every rank yields
    the same number of batches.

    Args:
        images: Images in memory.
        batch_size: Images in the global batch, over all ranks; a multiple of ``world``.
        normalization: Turns bytes into network inputs.
        augmentation: Varies the images; None leaves them unchanged.
        seed: Chooses the orders and the augmentation.
        shuffle: Whether every epoch has its own random order; otherwise the order of the set.
        rank: Index of the part of each batch to yield, in [0, world).
        world: Number of processes that share each batch.
        channels_last: Whether inputs lie in memory as [B, H, W, C], which convolutions on CPU and GPU prefer.
        device: Device of the batches; bytes are moved there, then augmented and normalized.

    Raises:
        DataError: When a number is out of range, ``world`` does not divide ``batch_size``, the normalization has
            another number of channels, or ``shuffle`` is set and there are fewer images than ranks.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        *,
        normalization: Normalization,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        shuffle: bool = False,
        rank: int = 0,
        world: int = 1,
        channels_last: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        check_parts(batch_size, rank, world)
        normalization.check(images.images.shape[1])
        self.images = images
        self.batch_size = batch_size
        self.normalization = normalization
        self.augmentation = augmentation
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world = world
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.device = torch.device(device)
        if shuffle and not len(self):
            raise DataError(f"There are {len(images)} images to train on for {world} ranks; expected one per rank.")

    def __len__(self) -> int:
        """Number of batches in an epoch, the same on every rank."""
        full, rest = divmod(len(self.images), self.batch_size)
        return full + int(rest >= (self.world if self.shuffle else 1))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of one epoch.

        Args:
            number: Index of the epoch, 0 or more; without ``shuffle`` and ``augmentation`` all epochs are equal.

        Yields:
            (inputs, labels): float32 [B, C, H, W] and int64 [B] on ``device``, B the part of this rank.

        Raises:
            DataError: When ``number`` is negative.
        """
        if number < 0:
            raise DataError(f"Epoch {number} was asked for; expected 0 or more.")
        return self._batches(epoch_generator(self.seed, number))

    def _batches(self, generator: Generator) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.images)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        crops = self.augmentation.draw(count, generator) if self.augmentation else None
        for index in range(len(self)):
            start = index * self.batch_size
            size = min(self.batch_size, count - start)
            part = slice(start + size * self.rank // self.world, start + size * (self.rank + 1) // self.world)
            yield self._batch(order[part], crops[part] if crops else None)

    def _batch(self, chosen: Tensor, crops: Crops | None) -> tuple[Tensor, Tensor]:
        images = self.images.images.index_select(0, chosen).to(self.device)
        if self.augmentation and crops:
            images = self.augmentation.apply(images, crops)
        inputs = self.normalization.apply(images).contiguous(memory_format=self.memory_format)
        return inputs, self.images.labels.index_select(0, chosen).to(self.device)


def check_parts(batch_size: int, rank: int, world: int) -> None:
    """Raises a ``DataError`` unless a batch of this size can be divided among this many ranks."""
    if world < 1 or not 0 <= rank < world:
        raise DataError(f"Rank {rank} of {world} was given; expected 0 <= rank < world.")
    if batch_size < 1 or batch_size % world:
        raise DataError(
            f"A batch of {batch_size} images cannot be shared by {world} ranks; "
            f"expected a positive multiple of {world}, such as {max(world, batch_size // world * world)}."
        )


def epoch_generator(seed: int, epoch: int) -> Generator:
    """Returns a generator for one epoch, unrelated to those of neighbouring seeds and epochs."""
    return Generator().manual_seed(int(mix(seed, np.array([epoch], dtype=np.uint64))[0]))
