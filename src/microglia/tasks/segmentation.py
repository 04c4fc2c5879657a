"""The task of semantic segmentation: a class for every pixel, mean intersection over union."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from microglia.core.batch import call
from microglia.core.errors import MicrogliaError
from microglia.core.modes import evaluating
from microglia.data.normalization import Normalization
from microglia.data.samples import SampleBatches
from microglia.data.scene_augmentation import SceneAugmentation
from microglia.data.scene_load import Bad, load_scenes
from microglia.data.scenes import IGNORED, SceneCollate, SceneData, SceneSet, padded_side
from microglia.tasks.classification import build_noted
from microglia.tasks.kinds import kind
from microglia.tasks.maps import LossName, MapDistance, MapLoss, main_map, map_metrics, same_pixels
from microglia.tasks.pictures import show_maps
from microglia.tasks.start import load_start
from microglia.tasks.task import Batches, Split, Task
from microglia.zoo import check_name
from microglia.zoo.registry import ModelError
from microglia.zoo.segmenters import logits_of

PIXELS = 2**20
"""Pixels of one forward pass without augmentation, at most, unless one image is larger."""
SHOWN = 3
"""Number of test images whose maps a report shows."""


@dataclass(frozen=True)
class SegmentationOptions:
    """The options of segmentation.

    Attributes:
        data: ``camvid``, another folder under ``$MICROGLIA_DATA``, or a path; see `microglia.data.scene_load.load_scenes`.
        crop: Height and width of the training crops, multiples of 32; None for the size of a test image.
        scales: Smallest and largest random scale of the training images.
        colour: Largest random change of brightness, contrast and saturation.
        flip: Whether half of the training images are mirrored.
        augment: ``random`` as above, or ``none`` for whole training images.
        ignore: Number of a pixel without a class; CamVid and Cityscapes have their own.
        bad: ``refuse`` or ``drop`` images with a bad annotation.
        normalize: Name of the statistics of the images.
        loss: ``ohem`` (mean over the hard pixels) or ``cross-entropy``.
        boosters: Whether auxiliary heads of the network, if it has them, take part in training.
        head_lr: Factor of the learning rate of the heads that the model declares in ``heads``.
        model_options: Options of the model, such as ``{pool: average-resize}``.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    data: str = "camvid"
    crop: tuple[int, int] | None = None
    scales: tuple[float, float] = (0.5, 2.0)
    colour: float = 0.4
    flip: bool = True
    augment: Literal["random", "none"] = "random"
    ignore: int = IGNORED
    bad: Bad = "refuse"
    normalize: str = "imagenet"
    loss: LossName = "ohem"
    boosters: bool = True
    head_lr: float = 1.0
    model_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SceneSource:
    """The batches of a data set with masks; see `microglia.tasks.task.Data`.

    Attributes:
        scenes: The data set.
        normalization: Turns bytes into network inputs.
        augmentation: Random variation of training scenes, or None.
    """

    scenes: SceneData
    normalization: Normalization
    augmentation: SceneAugmentation | None = None

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
        """Returns batches of a split; those that are not meant for training hold at most `PIXELS` pixels on each rank."""
        chosen: SceneSet = getattr(self.scenes, split)
        if augment:
            chosen = replace(chosen, vary=self.augmentation)
        elif len(chosen):
            height, width = map(padded_side, chosen[0][1].shape)
            batch_size = min(batch_size, max(1, PIXELS // (height * width)) * world)
        shuffle = shuffle and len(chosen) > 0
        collate = SceneCollate(self.normalization)
        return SampleBatches(chosen, batch_size, collate=collate, seed=seed, shuffle=shuffle, rank=rank, world=world)  # type: ignore[arg-type]

    def told(self) -> dict[str, Any]:
        """Returns the statistics that images are normalized by, and the number of images that were left out."""
        return {"normalization": asdict(self.normalization), "left_out": self.scenes.left_out}


def segmentation_task(
    model: str,
    data: str | SceneData | None = None,
    options: SegmentationOptions | None = None,
    *,
    checkpoint: str | None = None,
    seed: int = 0,
    **settings: Any,
) -> Task:
    """Returns the task of finding the class of every pixel.

    Args:
        model: ``bisenetv2``, ``torchvision:NAME`` or ``hf:NAME`` of a segmenter, or ``package.module:function``, which gets
            ``classes`` and ``shape`` and returns a module of logits (batch, classes, height, width).
        data: A data set, or its name instead of that in the options.
        options: See `SegmentationOptions`.
        checkpoint: File with trained weights.
        seed: Seed of the initial weights.
        **settings: The options by keyword instead.

    Raises:
        DataError: The data set is missing or has a bad annotation, or the crop is no multiple of 32.
        ModelError: The model is no segmenter, or does not fit the data.
    """
    given = options or SegmentationOptions(**settings)
    check_name(model)
    scenes = data if isinstance(data, SceneData) else load_scenes(data or given.data, ignore=given.ignore, bad=given.bad)
    normalization = Normalization.named(given.normalize)
    source = SceneSource(scenes, normalization, _variation(scenes, given))
    example = next(iter(source.batches("test", 1).epoch(0)))[0]
    fresh = _builder(model, len(scenes.classes), example, given)
    loss = MapLoss(given.loss)

    def make() -> nn.Module:
        network = fresh(seed)
        if checkpoint is not None:
            load_start(network, checkpoint)
        return network

    _check_maps(make(), example, scenes)
    return Task(
        f"{model} on {scenes.name}",
        make,
        source,
        loss,
        map_metrics(scenes.classes),
        example,
        pretrained=checkpoint is not None or bool(given.model_options.get("pretrained")),
        fresh=fresh,
        forward=forward,
        distance=MapDistance(),
        groups=None if given.head_lr == 1 else lambda network: head_groups(network, given.head_lr),
        agree=same_pixels,
        kind="segmentation",
        show=lambda network: show_maps(network, scenes.test, scenes.classes, normalization, SHOWN),
    )


def _variation(scenes: SceneData, given: SegmentationOptions) -> SceneAugmentation | None:
    """Returns the random variation of the training images, if there is any; crops have the size of a test image by default."""
    if given.augment == "none":
        return None
    height, width = (padded_side(side) for side in scenes.test[0][1].shape)
    return SceneAugmentation(given.crop or (height, width), given.scales, flip=given.flip, colour=given.colour)


@kind("segmentation", SegmentationOptions)
def segmentation(model: str, options: SegmentationOptions, *, checkpoint: str | None, seed: int) -> Task:
    """Returns the task of finding the class of every pixel of a data set's images."""
    return segmentation_task(model, options=options, checkpoint=checkpoint, seed=seed)


def forward(model: nn.Module, inputs: Any) -> Tensor | tuple[Tensor, ...]:
    """Returns the logits of a segmenter; with auxiliary heads, in training, a tuple, the main ones first."""
    maps = logits_of(call(model, inputs))
    return maps[0] if len(maps) == 1 or not model.training else tuple(maps)


def head_groups(model: nn.Module, scale: float) -> list[dict[str, Any]]:
    """Returns the optimizer group of the heads that a model declares in ``heads``, at a multiple of the learning rate.

    Raises:
        ModelError: The model declares no heads.
    """
    names = getattr(model, "heads", ())
    if not isinstance(names, tuple) or not names:
        raise ModelError(
            f"head_lr is a factor of the rate of a model's heads, and {type(model).__name__} does not name its own: give it "
            'heads = ("classifier",), or leave head_lr at 1.'
        )
    parts = [getattr(model, name) for name in names if getattr(model, name, None) is not None]
    return [{"params": [p for part in parts for p in part.parameters()], "lr_scale": scale}]


def _builder(model: str, classes: int, example: Tensor, given: SegmentationOptions) -> Callable[[int], nn.Module]:
    """Returns a function that builds the network with the initial weights of a seed."""
    options = dict(given.model_options)
    if model.partition(":")[0] in ("torchvision", "hf", "timm"):
        options["maps"] = True
    elif not given.boosters:
        options["boosters"] = False

    def fresh(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = build_noted(model, classes=classes, shape=tuple(example.shape[1:]), **options)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    return fresh


@torch.no_grad()
def _check_maps(model: nn.Module, example: Tensor, scenes: SceneData) -> None:
    """Raises `ModelError` unless a model maps an image to one logit for each class and pixel."""
    shape, classes = tuple(example.shape), len(scenes.classes)
    try:
        with evaluating(model):
            logits = logits_of(call(model, example))[0]
    except MicrogliaError:
        raise
    except Exception as error:  # any error of the user's own forward
        raise ModelError(
            f"The model does not take images of shape {shape} (batch, channels, height, width): {error}."
        ) from error
    wanted = f"segmentation needs logits (batch, classes, height, width) for the {classes} classes of {scenes.name}"
    if logits.ndim != 4 or logits.shape[1] < classes or not logits.is_floating_point():
        raise ModelError(f"The model returns {logits.dtype} of shape {tuple(logits.shape)}; {wanted}.")
    main_map(logits, shape[2:])
