"""Magnitude: the oldest score, and a strong baseline."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from microglia.core.layers import Layer
from microglia.scores.base import Evidence, score


@score("magnitude", shards=True)
def magnitude(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns |w|."""
    return {name: layer.weight.detach().abs() for name, layer in layers.items()}
