"""Mean absolute input of each layer, used to weight its |w|."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.errors import ScoreError
from microglia.core.layers import GraphLayer, Layer
from microglia.scores.base import Evidence
from microglia.scores.guard import untouched
from microglia.scores.reading import outputs_of


@torch.no_grad()
def mean_inputs(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns mean |x| over examples and positions of each layer's input channels, shaped to multiply its weight.

    The model runs in evaluation mode; on several ranks the mean is over all their batches. A layer that is never called itself
    gets ones.

    Raises:
        ScoreError: There are no batches, or the model is a traced graph.
    """
    if any(isinstance(layer.module, GraphLayer) for layer in layers.values()):
        raise ScoreError(
            "The size of activations is measured where a layer is called, and this model came back from shrinking as a graph, "
            "whose layers are operators: take a score of weights or gradients."
        )
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def note(name: str, dim: int, x: Tensor) -> None:
        rows = x.movedim(dim, 0).detach().flatten(1)
        sums[name] = sums.get(name, 0) + rows.abs().sum(1, dtype=torch.float64)
        counts[name] = counts.get(name, 0) + rows.shape[1]

    def hook(name: str, dim: int) -> Any:
        return lambda module, args, output: note(name, dim, args[0])

    with untouched(model):
        handles = [
            layer.module.register_forward_hook(hook(name, layer.kind.inputs))
            for name, layer in layers.items()
            if layer.kind.inputs is not None
        ]
        try:
            model.eval()
            for inputs, _ in evidence.batches:
                outputs_of(model, inputs, evidence.forward)
        finally:
            for handle in handles:
                handle.remove()
    if not counts:
        raise ScoreError("The size of activations is measured on batches: give batches=[(inputs, targets), ...].")
    means = {name: _average(sums[name], counts[name]) for name in sums}
    return {name: _as_factor(layer, means.get(name)) for name, layer in layers.items()}


def _average(total: Tensor, count: int) -> Tensor:
    held = torch.cat([total, total.new_tensor([count])])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(held)
    return held[:-1] / held[-1]


def _as_factor(layer: Layer, mean: Tensor | None) -> Tensor:
    """Returns the means, shaped to broadcast over the weight; rows of a grouped convolution get the means of their group."""
    if mean is None:
        return torch.ones(1, device=layer.raw.device)
    groups = getattr(layer.module, "groups", 1)
    out, in_, *kernel = layer.sides
    by_row = mean.float().view(groups, -1).repeat_interleave(out // groups, 0).view(out, in_, *[1] * len(kernel))
    return by_row.T if layer.swapped else by_row
