"""The task of detection: a network of the zoo finds boxes in the images of a data set, judged by average precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from torch import nn

from microglia.core.errors import MicrogliaError
from microglia.core.modes import evaluating
from microglia.data.box_augmentation import AUGMENTATIONS, BoxAugmentation
from microglia.data.box_folders import load_boxes
from microglia.data.box_samples import BoxSamples, collate_boxes
from microglia.data.boxes import BoxData
from microglia.data.samples import SampleBatches
from microglia.tasks.box_pictures import show_boxes
from microglia.tasks.classification import build_noted
from microglia.tasks.detections import USE, precision_metric, same_boxes
from microglia.tasks.detectors import Anchors, Family, torchvision_family, yolo_family
from microglia.tasks.kinds import kind, kind_of_model
from microglia.tasks.start import start_of
from microglia.tasks.task import Batches, Split, Task
from microglia.tasks.yolo import Gains
from microglia.zoo import check_name
from microglia.zoo.detectors import RawDetector, detector_of, is_detector
from microglia.zoo.registry import ModelError
from microglia.zoo.yolo_checkpoint import load_yolov5, read_any
from microglia.zoo.yolov5 import ANCHORS, STRIDES

KIND = "detection"
Size = tuple[int, int]
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
        model: ``yolov5n`` to ``yolov5x``, ``torchvision:retinanet_resnet50_fpn`` and other RetinaNet or FCOS of torchvision,
            or ``package.module:function`` of a network with YOLOv5's three maps.
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
    family = _family(model, given, anchors, classes)

    builder = Builder(model, given, family, loaded, checkpoint, seed)
    source = BoxSource(loaded, canvas, AUGMENTATIONS[given.augment], anchors)
    return Task(
        f"{model} on {loaded.name}",
        builder.build,
        source,
        family.loss,
        {"map": precision_metric(loaded.classes, canvas)},
        next(iter(source.batches("test", 1).epoch(0)))[0],
        family.training_loss,
        checkpoint is not None,
        builder.fresh,
        predict=family.found,
        count=lambda targets: len(targets["index"]),
        distance=family.distance,
        groups=None if given.bias_warmup is None else lambda network: bias_group(network, given.bias_warmup or 0.0),
        agree=lambda first, second: same_boxes(family.found(first, USE), family.found(second, USE)),
        kind=KIND,
        show=lambda network: show_boxes(network, source, lambda outputs: family.found(outputs, USE)),
    )


def _family(model: str, options: DetectionOptions, anchors: Anchors, classes: int) -> Family:
    """Returns how the outputs of a model are read."""
    if is_detector(model):
        return torchvision_family(detector_of(model, classes, (3, *options.canvas)), options.canvas)
    return yolo_family(options.gains, anchors)


@dataclass(frozen=True, eq=False)
class Builder:
    """Builds the network of a task.

    Attributes:
        model: Its name.
        options: The task's options.
        family: How its outputs are read.
        data: The data set.
        checkpoint: File with trained weights, or None.
        seed: Seed of the initial weights.
    """

    model: str
    options: DetectionOptions
    family: Family
    data: BoxData
    checkpoint: str | Path | None
    seed: int

    def fresh(self, seed: int) -> nn.Module:
        """Returns a network with the initial weights of a seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = _network(self.model, len(self.data.classes), self.options)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def build(self) -> nn.Module:
        """Returns the network of the task, with the checkpoint's weights if there is one."""
        network = self.fresh(self.seed)
        if ":" in self.model:
            _check_network(network, self.family, self.options.canvas, len(self.data.classes), self.data.name)
        if self.checkpoint is not None:
            load_yolov5(network, self.checkpoint, head=self.options.head, state=start_of(self.checkpoint, read_any))
        return network


def _network(model: str, classes: int, options: DetectionOptions) -> nn.Module:
    """Returns a network with fresh weights."""
    if is_detector(model):
        return RawDetector(detector_of(model, classes, (3, *options.canvas)))
    extra = {} if options.activation is None else {"activation": options.activation}
    return build_noted(model, classes=classes, shape=(3, *options.canvas), **extra)


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
    if model.partition(":")[0] in ("timm", "hf", "torchvision") and not is_detector(model):
        raise ModelError(f"The model {model} gives no maps of boxes; detection takes yolov5n ... or package.module:function.")


@torch.no_grad()
def _check_network(network: nn.Module, family: Family, canvas: Size, classes: int, data: str) -> None:
    with evaluating(network):
        family.check(network(torch.zeros(1, 3, *canvas)), classes, data)


def anchors_in(checkpoint: str | Path) -> Anchors:
    """Returns the anchors of a checkpoint in pixels: the published ones unless it has others of the same form."""
    stored = start_of(checkpoint, read_any).get("anchors")
    usual = torch.tensor(ANCHORS)
    if stored is None or stored.shape != usual.shape:
        return ANCHORS
    pixels = stored.float() * torch.tensor(STRIDES).float()[:, None, None]
    if torch.allclose(pixels, usual, rtol=1e-2):  # files in half precision round them
        return ANCHORS
    return tuple(tuple((float(w), float(h)) for w, h in level) for level in pixels.tolist())
