"""The operators of torchvision's detectors in plain PyTorch, for a torchvision whose compiled ones cannot be loaded.

The wheel built for CUDA finds no CUDA libraries beside a CPU-only torch. Where its own operators are there, nothing is
replaced.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from microglia.zoo.external import import_torchvision

SCHEMA = (
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor"
)
_libraries: list[torch.library.Library] = []  # an implementation lives as long as its library object


def provide() -> None:
    """Makes torchvision's detectors run and trace."""
    import_torchvision()
    if _libraries or hasattr(torch.ops.torchvision, "roi_align"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define(SCHEMA)
    library.impl("nms", nms, "CPU")
    library.impl("roi_align", roi_align, "CPU")
    torch.library.register_fake("torchvision::roi_align", _fake_roi_align, lib=library)
    torch.library.register_autograd("torchvision::roi_align", _backward, setup_context=_remember, lib=library)
    _libraries.append(library)
    _plain()
    for name in ("torchvision.extension", "torchvision.ops.roi_align"):
        importlib.import_module(name)._has_ops = lambda: True


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Returns the indices of the boxes that no better one overlaps by more than the threshold, best first."""
    box_iou = importlib.import_module("torchvision.ops").box_iou
    left, kept = scores.argsort(descending=True, stable=True), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[box_iou(boxes[best, None], boxes[left])[0] <= threshold]
    return torch.stack(kept) if kept else left


def roi_align(features: Tensor, rois: Tensor, *rest: Any) -> Tensor:
    """The implementation in PyTorch that torchvision has itself, not compiled."""
    return _plain()(features, rois, *rest)


@cache
def _plain() -> Callable[..., Tensor]:
    return importlib.import_module("torchvision.ops.roi_align")._roi_align.__wrapped__


def _fake_roi_align(features: Tensor, rois: Tensor, scale: float, height: int, *rest: Any) -> Tensor:
    return features.new_empty((rois.shape[0], features.shape[1], height, rest[0]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.rest = inputs[2:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    features, rois = (t.detach() for t in ctx.saved_tensors)
    with torch.enable_grad():
        features.requires_grad_()
        pooled = roi_align(features, rois, *ctx.rest)
    return torch.autograd.grad(pooled, features, gradient)[0], *[None] * 6
