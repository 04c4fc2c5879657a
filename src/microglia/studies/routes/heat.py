"""Heat maps: the response of one gated layer to some images, with all gates open and as the gates choose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.data import ImageData
from microglia.dynamic import Passage, listening
from microglia.tasks.task import Split

SHOWN = 6
"""Images whose heat maps are drawn, each of another class."""


@dataclass(frozen=True)
class Heat:
    """The response of one layer to some images, dense beside masked.

    Attributes:
        layer: Its name.
        images: The inputs as bytes, uint8 (images, channels, height, width).
        dense: Mean over channels of the absolute response of the same weights with all gates open, (images, h, w).
        masked: The same for the response that the gated model passes on.
        cosine: Similarity of the two maps of each image, (images,); of maps without a negative value it is near 1 anyway.
        correlation: The same of the maps less their means, (images,), which tells more.
        kept: Filters its gate kept for each image, int64 (images,).
        filters: Filters of the layer.
    """

    layer: str
    images: Tensor
    dense: Tensor
    masked: Tensor
    cosine: Tensor
    correlation: Tensor
    kept: Tensor
    filters: int


@torch.no_grad()
def heat_maps(model: nn.Module, data: ImageData, split: Split, layer: str, device: torch.device | str = "cpu") -> Heat:
    """Returns the heat maps of the first image of each of some classes; the model, in evaluation mode, stays as it is.

    Source: FTWT; spec, section 7.12.

    Args:
        model: With gates.
        data: Its images.
        split: Where the images are from.
        layer: A gated convolution.
        device: Device of the model.
    """
    images = getattr(data, split)
    chosen = [int((images.labels == label).nonzero()[0]) for label in images.labels.unique().tolist()[:SHOWN]]
    shown = images.images[chosen]
    inputs = data.normalization.apply(shown).to(device)
    passages: list[Passage] = []

    def hear(passage: Passage) -> None:
        if passage.gate.site.layer == layer:
            passages.append(passage)

    with listening(model, hear, fade=0.0):
        model(inputs)
    with listening(model, hear):
        model(inputs)
    opened, gated = passages
    dense = opened.response.abs().mean(1).cpu()
    masked = (gated.response * gated.mask[:, :, None, None]).abs().mean(1).cpu()
    cosine, correlation = _alike(dense.flatten(1), masked.flatten(1))
    return Heat(layer, shown, dense, masked, cosine, correlation, gated.mask.sum(1).cpu(), gated.mask.shape[1])


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosine similarity and correlation of the rows, (rows,) each."""
    apart = (rows - rows.mean(1, keepdim=True) for rows in (one, other))
    return functional.cosine_similarity(one, other), functional.cosine_similarity(next(apart), next(apart))
