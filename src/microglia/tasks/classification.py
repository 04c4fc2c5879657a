"""The image classification task: a network of the zoo on an image data set, by name."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.devices import device_of
from microglia.core.errors import MicrogliaError
from microglia.core.modes import evaluating
from microglia.data import Batches, ImageData, Normalization, load_data
from microglia.storage.changes import SOURCE
from microglia.tasks.start import load_start
from microglia.tasks.task import CLASSIFICATION, CrossEntropy, Split, Task
from microglia.zoo import build, check_name
from microglia.zoo.registry import ModelError

USUAL = ("imagenet", "cifar10", "mnist", "half")
CLEARLY = 0.9  # statistics other than the data set's own must reduce the loss to this fraction
PROBE = 2048  # number of training images used to recognize a checkpoint's normalization


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

    def told(self) -> dict[str, Any]:
        """Returns the statistics that images are normalized by."""
        return {"normalization": asdict(self.images.normalization)}


def image_task(
    model: str,
    data: str | ImageData = "digits",
    *,
    checkpoint: str | Path | None = None,
    normalize: str = "auto",
    image_size: int | None = None,
    label_smoothing: float = 0.0,
    model_options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Task:
    """Returns the task of classifying a data set's images with a network of the zoo.

    Args:
        model: A name that `microglia.tasks.build` knows.
        data: A name that `microglia.data.load_data` knows, or loaded images.
        checkpoint: File with trained weights.
        normalize: Name of the statistics, ``data`` for the data set's own, or ``auto``. ``auto`` is ``data``; with a
            checkpoint, other usual statistics replace them if the loss on training images is clearly lower. A checkpoint does
            not record its normalization, and wrong statistics silently reduce the accuracy.
        image_size: Side to resize images to.
        label_smoothing: Label smoothing of the training loss.
        model_options: Options of the model, such as ``{"width": 0.25}``; see `microglia.tasks.build`.
        seed: Seed of the initial weights.

    Raises:
        UnknownNameError: The name of the model or of the data set is unknown.
    """
    check_name(model)  # before the data are read; otherwise a typo would show only at build()
    images = data if isinstance(data, ImageData) else load_data(data, image_size=image_size)
    given = dict(model_options or {})

    def network_of(seed: int, options: Mapping[str, Any]) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = build_noted(model, classes=len(images.classes), shape=images.shape, **options)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def fresh(seed: int) -> nn.Module:
        return network_of(seed, {key: value for key, value in given.items() if key != "pretrained"})

    def make() -> nn.Module:
        network = network_of(seed, given)
        if checkpoint is not None:
            load_start(network, checkpoint)
        return network

    if normalize not in ("auto", "data"):
        images = replace(images, normalization=Normalization.named(normalize))
    elif normalize == "auto" and checkpoint is not None:
        images = replace(images, normalization=recognize(make, images))
    example = next(iter(ImageSource(images).batches("train", 1).epoch(0)))[0]
    smoothed = CrossEntropy(label_smoothing) if label_smoothing else None
    name = f"{model} on {images.name}"
    trained = checkpoint is not None or bool(given.get("pretrained"))
    return Task(name, make, ImageSource(images), CrossEntropy(), CLASSIFICATION, example, smoothed, trained, fresh)


def build_noted(model: str, *, classes: int = 10, shape: tuple[int, ...] = (3, 32, 32), **options: Any) -> nn.Module:
    """Returns a network of the zoo with a record of how it was built, so that a saved one can be loaded alone."""
    try:
        network = build(model, classes=classes, shape=shape, **options)
    except MicrogliaError:
        raise
    except Exception as error:  # any error of the user's own module or factory
        raise ModelError(f"The model {model} cannot be built: {_told(error)}.") from error
    setattr(network, SOURCE, {"name": model, "classes": classes, "shape": list(shape), "options": options})
    return network


@torch.no_grad()
def check_fit(model: nn.Module, task: Task) -> None:
    """Raises unless a model maps the images of an image task to at least one logit per class.

    Args:
        model: A model for the task; its state and mode stay unchanged.
        task: A task of `image_task`; another task is not checked.

    Raises:
        ModelError: The forward pass fails on an image, returns no tensor of shape (batch, classes), or has too few logits.
    """
    if not isinstance(task.data, ImageSource):
        return
    classes, shape = len(task.data.images.classes), tuple(task.example.shape)
    try:
        with evaluating(model):
            outputs = model(task.example.to(device_of(model)))
    except Exception as error:  # any error of the user's own forward
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
    """Returns the text of an exception of the user's own code, and the last line of its traceback."""
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{f': {reason}' if reason else ''}{place}"


@torch.no_grad()
def recognize(make: Callable[[], nn.Module], images: ImageData) -> Normalization:
    """Returns the normalization under which a trained network has the lowest loss on training images.

    The data set's own statistics are returned unless other usual ones are clearly better.
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
