"""The image classification task: a network of the zoo on an image data set, by name."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.devices import device_of
from microglia.core.errors import MicrogliaError
from microglia.core.modes import evaluating
from microglia.data import Batches, ImageData, Normalization, load_data
from microglia.storage.changes import SOURCE
from microglia.tasks.task import CLASSIFICATION, CrossEntropy, Split, Task
from microglia.zoo import build, check_name, load_checkpoint
from microglia.zoo.registry import ModelError

USUAL = ("imagenet", "cifar10", "mnist", "half")
CLEARLY = 0.9  # other statistics than the data set's own must reduce the loss to this fraction
PROBE = 2048  # training images on which a checkpoint's normalization is recognized


@dataclass(frozen=True)
class ImageSource:
    """The batches of an image data set; see `microglia.tasks.task.Data`."""

    images: ImageData

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
        """Returns normalized float batches in channels-last layout."""
        return Batches(
            getattr(self.images, split),
            batch_size,
            normalization=self.images.normalization,
            augmentation=self.images.augmentation if augment else None,
            seed=seed,
            shuffle=shuffle,
            rank=rank,
            world=world,
            channels_last=True,
        )


def image_task(
    model: str,
    data: str | ImageData = "digits",
    *,
    checkpoint: str | Path | None = None,
    normalize: str = "auto",
    image_size: int | None = None,
    label_smoothing: float = 0.0,
    seed: int = 0,
) -> Task:
    """Returns the task of classifying a data set's images with a network of the zoo.

    Args:
        model: A name `microglia.tasks.build` knows.
        data: A name `microglia.data.load_data` knows, or loaded images.
        checkpoint: File with trained weights.
        normalize: Name of the statistics, ``data`` for the data set's own, or ``auto``: the same; with a checkpoint, those of
            the usual ones under which it has clearly less loss on training images. A checkpoint does not say how its
            inputs were normalized, and the wrong statistics cost accuracy silently.
        image_size: Side to resize images to.
        label_smoothing: Of the training loss.
        seed: Of the initial weights.

    Raises:
        UnknownNameError: Nothing has this name of a model or a data set.
    """
    check_name(model)  # before the data is read, or a typo would show only at build()
    images = data if isinstance(data, ImageData) else load_data(data, image_size=image_size)

    def fresh(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = build_noted(model, classes=len(images.classes), shape=images.shape)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def make() -> nn.Module:
        network = fresh(seed)
        if checkpoint is not None:
            load_checkpoint(network, checkpoint)
        return network

    if normalize not in ("auto", "data"):
        images = replace(images, normalization=Normalization.named(normalize))
    elif normalize == "auto" and checkpoint is not None:
        images = replace(images, normalization=recognize(make, images))
    example = next(iter(ImageSource(images).batches("train", 1).epoch(0)))[0]
    smoothed = CrossEntropy(label_smoothing) if label_smoothing else None
    name = f"{model} on {images.name}"
    trained = checkpoint is not None
    return Task(name, make, ImageSource(images), CrossEntropy(), CLASSIFICATION, example, smoothed, trained, fresh)


def build_noted(model: str, *, classes: int = 10, shape: tuple[int, ...] = (3, 32, 32), **options: Any) -> nn.Module:
    """Returns a network of the zoo that remembers how it was built, so that a saved one can be loaded by itself."""
    try:
        network = build(model, classes=classes, shape=shape, **options)
    except MicrogliaError:
        raise
    except Exception as error:  # whatever the user's own module or factory raises
        raise ModelError(f"The model {model} cannot be built: {_told(error)}.") from error
    setattr(network, SOURCE, {"name": model, "classes": classes, "shape": list(shape), "options": options})
    return network


@torch.no_grad()
def check_fit(model: nn.Module, task: Task) -> None:
    """Raises unless a model maps the images of an image task to one logit for each class, at least.

    Args:
        model: Built for the task; its state and mode stay as they are.
        task: Of `image_task`; another task is not checked.

    Raises:
        ModelError: Its forward fails on an image, returns no tensor of shape (batch, classes), or has too few logits.
    """
    if not isinstance(task.data, ImageSource):
        return
    classes, shape = len(task.data.images.classes), tuple(task.example.shape)
    try:
        with evaluating(model):
            outputs = model(task.example.to(device_of(model)))
    except Exception as error:  # whatever the user's own forward raises
        raise ModelError(
            f"The model does not take images of shape {shape} (batch, channels, height, width): {_told(error)}."
        ) from error
    wanted = (
        f"classification needs one tensor of logits, (batch, classes), for the {classes} classes of {task.data.images.name}"
    )
    if not isinstance(outputs, Tensor):
        raise ModelError(f"The model returns {type(outputs).__name__}; {wanted}.")
    if outputs.ndim != 2 or len(outputs) != 1 or outputs.shape[1] < classes or not outputs.is_floating_point():
        raise ModelError(f"The model returns {outputs.dtype} of shape {tuple(outputs.shape)}; {wanted}.")


def _told(error: Exception) -> str:
    """Returns what an exception of the user's own code says, and the last line of code it came from."""
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{f': {reason}' if reason else ''}{place}"


@torch.no_grad()
def recognize(make: Callable[[], nn.Module], images: ImageData) -> Normalization:
    """Returns the normalization under which a trained network has the least loss on training images.

    The data set's own unless another of the usual ones is clearly better.
    """
    named = [Normalization.named(name) for name in USUAL]
    fitting = [n for n in (images.normalization, *named) if len(n.mean) in (1, images.shape[0])]
    probe = images.train.subset(torch.arange(min(PROBE, len(images.train))))
    network = make().eval()

    def loss(normalization: Normalization) -> float:
        batches = Batches(probe, 256, normalization=normalization, channels_last=True)
        return sum(float(CrossEntropy()(network(x), y)) * len(y) for x, y in batches.epoch(0))

    losses = {normalization: loss(normalization) for normalization in fitting}
    best = min(losses, key=lambda n: losses[n])
    return best if losses[best] < CLEARLY * losses[images.normalization] else images.normalization
