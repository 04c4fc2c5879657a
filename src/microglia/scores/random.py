"""Random: the control for every other score."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from microglia.core.layers import Layer
from microglia.scores.base import Evidence, score


@score("random", shards=True)
def random(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns uniform noise in [0, 1) from the evidence's generator, the same on every device."""
    return {name: torch.rand(layer.shape, generator=evidence.generator).to(layer.raw.device) for name, layer in layers.items()}
