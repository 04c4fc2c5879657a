"""SNIP: how much the loss feels a connection at initialization (Lee et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from microglia.core.errors import ScoreError
from microglia.core.layers import Layer
from microglia.scores.base import Evidence, score
from microglia.scores.gradient import gradient_magnitude


@score("snip")
def snip(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns the connection sensitivity s = |w * dL/dw| / sum of all, which add up to 1 (Lee et al. 2019, equations 5-6).

    dL/dw times w is dL/dc of a gate c = 1 on the weight. Signed gradients are summed over batches before the absolute value;
    batch norm uses the statistics of the batch.

    Raises:
        ScoreError: No weight has a gradient: the network is cut through, or its outputs do not depend on it.
    """
    sensitivities = gradient_magnitude(model, layers, evidence)
    total = sum(float(value.sum()) for value in sensitivities.values())
    if not total > 0:
        raise ScoreError(
            "The loss feels none of these weights, so their connection sensitivities are all 0 and choose nothing. Is a layer "
            "emptied, or the network cut through? Prune less, or by synflow, which keeps a path open."
        )
    return {name: value / total for name, value in sensitivities.items()}
