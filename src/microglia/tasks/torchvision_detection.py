"""Loss and boxes of torchvision's one-stage detectors, from the raw predictions of `microglia.zoo.detectors.RawDetector`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from microglia.core.errors import MicrogliaError
from microglia.core.modes import evaluating
from microglia.tasks.boxes import corners
from microglia.zoo.registry import ModelError

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads raw predictions with the anchors and the coder of a detector, whose weights do not matter.

    Attributes:
        detector: A RetinaNet or FCOS of torchvision.
        canvas: (height, width) of the inputs.
    """

    detector: Any
    canvas: tuple[int, int]

    @cached_property
    def anchors(self) -> tuple[Tensor, list[int]]:
        """Anchors [n, 4] by corners in pixels, and how many each level has."""
        from torchvision.models.detection.image_list import ImageList

        images = torch.zeros(1, 3, *self.canvas)
        with torch.no_grad(), evaluating(self.detector):
            features = list(self.detector.backbone(images).values())
            levels = self.detector.anchor_generator(ImageList(images, [self.canvas]), features)[0]
        each = len(levels) // sum(f.shape[2] * f.shape[3] for f in features)
        return levels, [f.shape[2] * f.shape[3] * each for f in features]

    def loss(self, outputs: Outputs, targets: Mapping[str, Tensor]) -> Tensor:
        """Returns the sum of the detector's own losses, each a mean over the images."""
        first = next(iter(outputs.values()))
        sides = first.new_tensor([self.canvas[1], self.canvas[0]] * 2)
        boxes, use = corners(targets["boxes"].to(sides.dtype)) * sides, ~targets["crowd"]
        wanted = []
        for place in range(len(first)):
            mine = use & (targets["image"] == place)
            wanted.append({"boxes": boxes[mine], "labels": targets["labels"][mine]})
        anchors, counts = self.anchors
        rows = [anchors.to(first.device)] * len(first)
        further = (counts,) if self.centred else ()
        losses = self.detector.compute_loss(wanted, dict(outputs), rows, *further)
        return torch.stack(list(losses.values())).sum()

    @property
    def centred(self) -> bool:
        """Whether the detector also predicts how central a place is, as FCOS does."""
        return hasattr(self.detector, "center_sampling_radius")

    def read(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Returns boxes [B, anchors, 4] in pixels, and scores [B, anchors, classes]."""
        anchors = self.anchors[0].to(outputs["bbox_regression"].device)
        coder = self.detector.box_coder
        decode = coder.decode if self.centred else coder.decode_single
        boxes = torch.stack([decode(rows, anchors) for rows in outputs["bbox_regression"]])
        scores = outputs["cls_logits"].sigmoid()
        return boxes, (scores * outputs["bbox_ctrness"].sigmoid()).sqrt() if self.centred else scores

    def check(self, outputs: Any, classes: int, data: str) -> None:
        """Raises `ModelError` unless the predictions are for a number of classes."""
        found = outputs["cls_logits"].shape[-1]
        if found != classes:
            raise ModelError(f"The model's predictions are for {found} classes, and {data} has {classes}.")


def no_distance(student: Any, teacher: Any, temperature: float) -> Tensor:
    """Raises: distillation of these detectors is not defined."""
    raise MicrogliaError("Distillation is not defined for torchvision's detectors; train with distill=0.")
