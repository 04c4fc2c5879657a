"""Image classification at the scale of ImageNet: files read on access, the augmentation of vision transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from torch import nn

from microglia.data.image_files import ImageFiles, ImageFolders, MixCollate, Variation, image_folders
from microglia.data.normalization import Normalization
from microglia.data.samples import SampleBatches
from microglia.data.sources import Encoded
from microglia.tasks.classification import build_noted
from microglia.tasks.kinds import kind
from microglia.tasks.start import load_start
from microglia.tasks.task import CLASSIFICATION, Batches, CrossEntropy, Split, Task
from microglia.zoo import check_name

NOTHING = Encoded(torch.zeros(0, dtype=torch.int64), lambda: lambda index: Path(), str)
"""A split without images."""


@dataclass(frozen=True)
class ImagesOptions:
    """The options of image classification from files.

    Attributes:
        data: A folder under ``$MICROGLIA_DATA``, or a path, with ``train/CLASS/IMAGE`` beside ``val`` and perhaps ``test``.
        size: Side of the images, in pixels.
        normalize: Name of the statistics of the images.
        scale: Smallest and largest part of the image's area that a training crop takes.
        randaugment: Magnitude of RandAugment; 0 for none.
        erasing: Probability of random erasing.
        mixup: Alpha of MixUp; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
        label_smoothing: Label smoothing of the training loss, in [0, 1).
        model_options: Options of the model, such as ``{drop_path_rate: 0.1}`` for stochastic depth in timm's networks, or
            ``{pretrained: true}``.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    data: str = "imagenet"
    size: int = 224
    normalize: str = "imagenet"
    scale: tuple[float, float] = (0.08, 1.0)
    randaugment: int = 0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    model_options: dict[str, Any] = field(default_factory=dict)

    @property
    def variation(self) -> Variation:
        """The random variation of training images."""
        return Variation(self.scale, True, self.randaugment, self.erasing, self.mixup, self.cutmix)


@dataclass(frozen=True)
class FileSource:
    """The batches of images in files; see `microglia.tasks.task.Data`."""

    folders: ImageFolders
    options: ImagesOptions

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
        """Returns batches of a split; only with ``augment`` are images varied and mixed."""
        encoded = getattr(self.folders, split) or NOTHING
        variation = self.options.variation if augment else None
        files = ImageFiles(encoded, self.options.size, variation)
        collate = MixCollate(Normalization.named(self.options.normalize), len(self.folders.classes), variation)
        shuffle = shuffle and len(files) > 0
        return SampleBatches(files, batch_size, collate=collate, seed=seed, shuffle=shuffle, rank=rank, world=world)  # type: ignore[arg-type]

    def told(self) -> dict[str, Any]:
        """Returns the statistics that images are normalized by."""
        return {"normalization": asdict(Normalization.named(self.options.normalize))}


@kind("images", ImagesOptions)
def images(model: str, options: ImagesOptions, *, checkpoint: str | None, seed: int) -> Task:
    """Returns the task of classifying images that are read from their files on access."""
    return images_task(model, options, checkpoint=checkpoint, seed=seed)


def images_task(
    model: str, options: ImagesOptions | None = None, *, checkpoint: str | None = None, seed: int = 0, **settings: Any
) -> Task:
    """Returns the task of classifying images that are read from their files on access.

    Args:
        model: A name that `microglia.tasks.build` knows.
        options: See `ImagesOptions`.
        checkpoint: File with trained weights.
        seed: Seed of the initial weights.
        **settings: The options by keyword instead.

    Raises:
        DataError: The folder is missing or has another layout, or an option is out of range.
        UnknownNameError: The name of the model or of the statistics is unknown.
    """
    options = options or ImagesOptions(**settings)
    check_name(model)
    options.variation  # noqa: B018 - raises before anything is read
    Normalization.named(options.normalize)
    root = os.environ.get("MICROGLIA_DATA")
    local = Path(root) / options.data if root else None
    place = local if local is not None and local.is_dir() else Path(options.data).expanduser()
    folders = image_folders(place)
    shape = (3, options.size, options.size)

    def network_of(seed: int, given: Mapping[str, Any]) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = build_noted(model, classes=len(folders.classes), shape=shape, **given)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def fresh(seed: int) -> nn.Module:
        return network_of(seed, {key: value for key, value in options.model_options.items() if key != "pretrained"})

    def make() -> nn.Module:
        network = network_of(seed, options.model_options)
        if checkpoint is not None:
            load_start(network, checkpoint)
        return network

    source = FileSource(folders, options)
    return Task(
        f"{model} on {place.name}",
        make,
        source,
        CrossEntropy(),
        CLASSIFICATION,
        next(iter(source.batches("test", 1).epoch(0)))[0],
        CrossEntropy(options.label_smoothing),
        checkpoint is not None or bool(options.model_options.get("pretrained")),
        fresh,
    )
