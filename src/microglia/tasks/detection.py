"""The task of detection: a network of the zoo finds boxes in the images of a data set, judged by average precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from microglia.core.errors import MicrogliaError
from microglia.core.modes import evaluating
from microglia.data.box_augmentation import AUGMENTATIONS, BoxAugmentation
from microglia.data.box_folders import load_boxes
from microglia.data.box_samples import BoxSamples, collate_boxes
from microglia.data.boxes import BoxData
from microglia.data.samples import SampleBatches
from microglia.tasks.box_pictures import show_boxes
from microglia.tasks.classification import build_noted
from microglia.tasks.detections import USE, precision_metric, same_boxes, suppressed
from microglia.tasks.kinds import kind, kind_of_model
from microglia.tasks.task import Batches, Split, Task
from microglia.tasks.yolo import DetectionLoss, Gains, Grid, decoded, distance
from microglia.zoo import check_name
from microglia.zoo.registry import ModelError
from microglia.zoo.yolo_checkpoint import load_yolov5, read_any
from microglia.zoo.yolov5 import ANCHORS, STRIDES

KIND = "detection"
Size = tuple[int, int]
Anchors = tuple[tuple[tuple[float, float], ...], ...]
Augment = Literal["none", "flip", "affine", "mosaic"]


@dataclass(frozen=True)
class DetectionOptions:
    """The options of detection.

    Attributes:
        data: Name of a folder under ``$MICROGLIA_DATA``, such as ``bccd``, or path of a folder with VOC or COCO annotations.
        size: Side of the network's inputs, or (height, width); multiples of 32.
        augment: Variation of training images: ``none``, ``flip``, ``affine`` (scale, shift, colours, mirror), or ``mosaic`` (of
            four images, and all of these).
        activation: Activation of the network, ``silu`` or ``relu``; None for its own.
        gains: Weights of the parts of the loss.
        classes: Names of the classes, in the order of the model's labels; empty for those of the data.
        strict: Whether a bad box or a missing image is refused by name, and not left out.
        origin: Coordinate of the first pixel in VOC annotations, 0 or 1.
        bias_warmup: Learning rate of biases at the start of the warm-up (published: 0.1), or None for no separate rate.
        head: ``own`` loads a checkpoint whole; ``fresh`` leaves out heads of another number of classes.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    data: str = "bccd"
    size: int | tuple[int, int] = 640
    augment: Augment = "mosaic"
    activation: Literal["silu", "relu"] | None = None
    gains: Gains = field(default_factory=Gains)
    classes: tuple[str, ...] = ()
    strict: bool = False
    origin: int = 0
    bias_warmup: float | None = None
    head: Literal["own", "fresh"] = "own"

    @property
    def canvas(self) -> Size:
        """(height, width) of the network's inputs.

        Raises:
            MicrogliaError: A side is no multiple of 32.
        """
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        if min(height, width) < STRIDES[-1] or height % STRIDES[-1] or width % STRIDES[-1]:
            raise MicrogliaError(
                f"The size {height}x{width} does not fit: both sides are multiples of {STRIDES[-1]}, such as 320."
            )
        return height, width


@dataclass(frozen=True)
class BoxSource:
    """The batches of a data set with boxes; see `microglia.tasks.task.Data`.

    Attributes:
        boxes: The data set.
        canvas: (height, width) of the network's inputs.
        augmentation: Variation of training images.
        anchors: Anchors of the network, in pixels; a checkpoint may have its own.
    """

    boxes: BoxData
    canvas: Size
    augmentation: BoxAugmentation
    anchors: Anchors = ANCHORS

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
        """Returns letterboxed, or varied, images with their boxes."""
        dataset: Any = BoxSamples(getattr(self.boxes, split), self.canvas, self.augmentation if augment else None)
        return SampleBatches(dataset, batch_size, collate=collate_boxes, seed=seed, shuffle=shuffle, rank=rank, world=world)

    def told(self) -> dict[str, Any]:
        """Returns the classes, and what was left out of the data."""
        own = {} if self.anchors == ANCHORS else {"anchors": self.anchors}
        return {"classes": list(self.boxes.classes), "left_out": asdict(self.boxes.left_out), **own}


@dataclass(frozen=True)
class Family:
    """How the outputs of one family of detectors are read.

    Attributes:
        loss: (outputs, targets) -> mean loss of an image.
        training_loss: The loss to train with.
        read: Outputs -> (boxes [B, candidates, 4] in pixels of the canvas, scores [B, candidates, classes]).
        distance: As of `Task.distance`.
        check: Raises `ModelError` unless outputs of one example have the form for a number of classes.
    """

    loss: Callable[[Any, Any], Tensor]
    training_loss: Callable[[Any, Any], Tensor]
    read: Callable[[Any], tuple[Tensor, Tensor]]
    distance: Callable[[Any, Any, float], Tensor]
    check: Callable[[Any, int, str], None]


def yolo_family(gains: Gains, anchors: Anchors = ANCHORS) -> Family:
    """Returns the family of YOLOv5, with three raw maps."""
    grid = Grid(STRIDES, anchors)
    return Family(
        DetectionLoss(grid, gains),
        DetectionLoss(grid, gains, summed=True),
        lambda maps: decoded(maps, grid),
        distance,
        _check_maps,
    )


def detection_task(
    model: str,
    data: str | BoxData | None = None,
    *,
    options: DetectionOptions | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    **settings: Any,
) -> Task:
    """Returns the task of finding the boxes of a data set with a network.

    Args:
        model: ``yolov5n`` to ``yolov5x``, or ``package.module:function`` of a network with the same three maps.
        data: Name, folder or loaded data set; by default that of the options.
        options: See `DetectionOptions`.
        checkpoint: File with trained weights, also a ``.pt`` of YOLOv5 itself, whose code does not run.
        seed: Seed of the initial weights.
        **settings: The options by keyword instead.

    Raises:
        DataError: The data cannot be read.
        ModelError: The model is no detector, or its maps do not fit the classes.

    Example:
        >>> task = detection_task("yolov5n", "bccd", size=320, activation="relu")  # doctest: +SKIP
    """
    given = options or DetectionOptions(**settings)
    canvas = given.canvas
    _check_detector(model)
    loaded = data if isinstance(data, BoxData) else _loaded(data or given.data, given)
    classes = len(loaded.classes)
    anchors = ANCHORS if checkpoint is None else anchors_in(checkpoint)
    family = yolo_family(given.gains, anchors)

    def fresh(seed: int) -> nn.Module:
        extra = {} if given.activation is None else {"activation": given.activation}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = build_noted(model, classes=classes, shape=(3, *canvas), **extra)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def build() -> nn.Module:
        network = fresh(seed)
        if ":" in model:
            _check_network(network, family, canvas, classes, loaded.name)
        if checkpoint is not None:
            load_yolov5(network, checkpoint, head=given.head)
        return network

    source = BoxSource(loaded, canvas, AUGMENTATIONS[given.augment], anchors)
    return Task(
        f"{model} on {loaded.name}",
        build,
        source,
        family.loss,
        {"map": precision_metric(loaded.classes, canvas)},
        next(iter(source.batches("test", 1).epoch(0)))[0],
        family.training_loss,
        checkpoint is not None,
        fresh,
        predict=lambda outputs: suppressed(*family.read(outputs)),
        count=lambda targets: len(targets["index"]),
        distance=family.distance,
        groups=None if given.bias_warmup is None else lambda network: bias_group(network, given.bias_warmup or 0.0),
        agree=lambda first, second: same_boxes(*(suppressed(*family.read(one), USE) for one in (first, second))),
        kind=KIND,
        show=lambda network: show_boxes(network, source, lambda outputs: suppressed(*family.read(outputs), USE)),
    )


def saved_options(source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that a saved network says: the size of its inputs, its activation."""
    return {
        "size": tuple(source["shape"][1:]),
        **{key: source["options"][key] for key in ("activation",) if key in source["options"]},
    }


@kind(KIND, DetectionOptions, saved=saved_options)
def detection(model: str, options: DetectionOptions, *, checkpoint: str | None, seed: int) -> Task:
    """Returns the task of detection in a data set of images with boxes."""
    return detection_task(model, options=options, checkpoint=checkpoint, seed=seed)


def bias_group(network: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Returns the group of all biases, whose learning rate starts the warm-up at ``rate`` and falls to that of the others."""
    biases = [p for name, p in network.named_parameters() if name.rpartition(".")[2] == "bias"]
    return [{"params": biases, "warmup_from": rate}]


def _loaded(name: str, options: DetectionOptions) -> BoxData:
    classes = options.classes or None
    return load_boxes(name, classes=classes, strict=options.strict, fit=options.canvas, origin=options.origin)


def _check_detector(model: str) -> None:
    """Raises unless a name is that of a detector; names of own functions are checked by their outputs."""
    check_name(model)
    if ":" not in model and kind_of_model(model) != KIND:
        raise ModelError(f"The model {model} is made for {kind_of_model(model)}; detection takes yolov5n, yolov5s ... yolov5x.")
    if model.partition(":")[0] in ("timm", "hf", "torchvision"):
        raise ModelError(f"The model {model} gives no maps of boxes; detection takes yolov5n ... or package.module:function.")


@torch.no_grad()
def _check_network(network: nn.Module, family: Family, canvas: Size, classes: int, data: str) -> None:
    with evaluating(network):
        family.check(network(torch.zeros(1, 3, *canvas)), classes, data)


def _check_maps(outputs: Any, classes: int, data: str) -> None:
    form = isinstance(outputs, Sequence) and len(outputs) == len(STRIDES)
    if not form or not all(isinstance(one, Tensor) and one.ndim == 5 and one.shape[1] == len(ANCHORS[0]) for one in outputs):
        raise ModelError(
            "The model does not return three maps (batch, 3 anchors, rows, columns, 5 + classes), which detection needs."
        )
    if any(one.shape[-1] != 5 + classes for one in outputs):
        raise ModelError(
            f"The model's maps are for {outputs[0].shape[-1] - 5} classes, and {data} has {classes}; build it for as many, or "
            "name the classes in the task's options."
        )


def anchors_in(checkpoint: str | Path) -> Anchors:
    """Returns the anchors of a checkpoint in pixels: the published ones unless it has others of the same form."""
    stored = read_any(checkpoint).get("anchors")
    usual = torch.tensor(ANCHORS)
    if stored is None or stored.shape != usual.shape:
        return ANCHORS
    pixels = stored.float() * torch.tensor(STRIDES).float()[:, None, None]
    if torch.allclose(pixels, usual, rtol=1e-2):  # files in half precision round them
        return ANCHORS
    return tuple(tuple((float(w), float(h)) for w, h in level) for level in pixels.tolist())
