"""Segmentation networks of torchvision and transformers, with one map of logits as the output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from microglia.zoo.external import hf_network, torchvision_model
from microglia.zoo.registry import ModelError, Shape


class Maps(nn.Module):
    """Adapter that gives a segmenter of another library one form: logits of every pixel.

    The model itself is ``.model``, so parameter names begin with ``model.``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        if isinstance(getattr(model, "aux_classifier", None), nn.Module):
            model.auxiliary = ("aux_classifier",)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Maps (N, C, H, W) to (N, classes, H, W) logits; in training, with an auxiliary head, to a tuple of two."""
        maps = [F.interpolate(one, x.shape[2:], mode="bilinear", align_corners=False) for one in logits_of(self.model(x))]
        return tuple(maps) if self.training and len(maps) > 1 else maps[0]


def logits_of(outputs: Any) -> list[Tensor]:
    """Returns the maps of logits in the outputs of a segmenter, the main one first.

    Args:
        outputs: A tensor; a tuple or list of tensors; a mapping with ``out`` and perhaps ``aux`` (torchvision); or an object
            with ``logits`` (transformers).

    Raises:
        ModelError: The outputs are none of these.
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping) and isinstance(outputs.get("out"), Tensor):
        return [outputs["out"], *([outputs["aux"]] if "aux" in outputs else [])]
    if isinstance(getattr(outputs, "logits", None), Tensor):
        return [outputs.logits]
    if isinstance(outputs, tuple | list) and outputs and all(isinstance(one, Tensor) for one in outputs):
        return list(outputs)
    raise ModelError(
        f"The model returns {type(outputs).__name__}; segmentation needs logits (batch, classes, height, width), alone, first "
        "in a tuple, as out of a mapping, or as .logits."
    )


def build(name: str, classes: int, shape: Shape, options: dict[str, Any]) -> nn.Module:
    """Builds ``torchvision:NAME`` or ``hf:NAME``, a segmenter, wrapped in `Maps`.

    Args:
        name: The whole name, with its prefix.
        classes: Number of logits of every pixel.
        shape: Input shape, (channels, height, width).
        options: Passed on to the library; ``pretrained`` (default False) works for both.

    Raises:
        ModelError: The library has no segmenters, or refuses the arguments.
    """
    source, _, rest = name.partition(":")
    if source == "torchvision":
        model = torchvision_model(rest, classes, shape, **options)
        known = type(model).__module__.startswith("torchvision.models.segmentation")
    elif source == "hf":
        model, known = hf_network(rest, classes, shape, "AutoModelForSemanticSegmentation", **options), True
    else:
        known = False
    if not known:
        raise ModelError(
            f"{name} is no segmenter: take bisenetv2, torchvision:NAME of torchvision.models.segmentation, hf:NAME, or "
            "package.module:function."
        )
    return Maps(model).train()
