"""SNIP: the sensitivity of the loss to a connection at initialization (Lee et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from microglia.core.errors import ScoreError
from microglia.core.layers import Layer
from microglia.scores.base import Evidence, score
from microglia.scores.gradient import gradient_magnitude, loss_gradient


@score("snip", shards=True)
def snip(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns the connection sensitivity s = |w * dL/dw| / (sum over all weights) (Lee et al. 2019, equations 5-6).

    dL/dw times w is dL/dc of a gate c = 1 on the weight. Signed gradients are summed over batches before the absolute value;
    batch norm uses the statistics of the batch.

    Raises:
        ScoreError: No weight has a gradient: the network is disconnected, or its outputs do not depend on the weights.
    """
    return _shares(gradient_magnitude(model, layers, evidence))


@score("snip-inference", shards=True)
def snip_inference(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns `snip` with the network in inference mode, as in the authors' TensorFlow code.

    Batch norm uses its running statistics, which are mean 0 and variance 1 before any training. For a VGG-11 at density 0.1 the
    masks of both modes share 15 % of their weights (survey, correction C2). The modes are two conventions.

    Raises:
        ScoreError: Same as `snip`.
    """
    gradients = loss_gradient(model.eval(), layers, evidence)
    return _shares({name: (layer.weight.detach() * gradients[name]).abs() for name, layer in layers.items()})


def _shares(sensitivities: Mapping[str, Tensor]) -> dict[str, Tensor]:
    total = sum(float(value.sum()) for value in sensitivities.values())
    if not total > 0:
        raise ScoreError(
            "The loss depends on none of these weights, so that all connection sensitivities are 0: a layer is empty, or no "
            "path is left through the network. Prune less, or by synflow, which keeps a path open."
        )
    return {name: value / total for name, value in sensitivities.items()}
