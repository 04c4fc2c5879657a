"""torchvision's one-stage detectors as networks of raw predictions: RetinaNet and FCOS.

Their own forward matches, decodes and suppresses boxes. Here it stops before that, so that a network can be traced and pruned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.optional import needs
from microglia.zoo.external import import_torchvision, refusals
from microglia.zoo.own_code import unknown
from microglia.zoo.registry import ModelError, Shape

PREFIX = "torchvision:"
ONE_STAGE = ("retinanet", "fcos")
"""Beginnings of the names of detectors whose predictions are one tensor per kind and do not depend on chosen boxes."""
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class RawDetector(nn.Module):
    """Backbone and head of a detector of torchvision.

    Args:
        detector: A RetinaNet or FCOS.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps images (N, 3, H, W) in [0, 1] to raw predictions by name, (N, anchors, numbers)."""
        found: dict[str, Tensor] = self.head(list(self.backbone((x - self.mean) / self.std).values()))
        return found


def is_detector(name: str) -> bool:
    """Tells whether a model's name is that of a detector of torchvision, of whatever kind."""
    plain = name.removeprefix(PREFIX)
    return name.startswith(PREFIX) and plain.startswith((*ONE_STAGE, "fasterrcnn", "maskrcnn", "keypointrcnn", "ssd"))


def detector_of(name: str, classes: int, shape: Shape) -> Any:
    """Returns a detector of torchvision with fresh weights, as its own class.

    Raises:
        UnknownNameError: torchvision has no such model.
        ModelError: The detector chooses boxes inside its network, or torchvision is not installed.
    """
    plain = name.removeprefix(PREFIX)
    if not plain.startswith(ONE_STAGE):
        raise ModelError(
            f"{name} chooses boxes inside its network, which the task of detection does not train; take "
            "torchvision:retinanet_resnet50_fpn or torchvision:fcos_resnet50_fpn, or give your own Task."
        )
    needs("zoo", "torchvision", what=f"The model {name}")
    models = import_torchvision().models
    known = models.list_models(module=models.detection)
    if plain not in known:
        raise unknown("torchvision", plain, known, "torchvision.models.list_models()")
    with refusals(name):
        return models.get_model(plain, weights=None, weights_backbone=None, num_classes=classes, trainable_backbone_layers=5)
