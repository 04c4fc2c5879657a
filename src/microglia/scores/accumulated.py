"""Accumulated weight and gradient: |w g| of single mini-batches, smoothed over a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from microglia.core.errors import ScoreError
from microglia.core.layers import Layer
from microglia.core.sharded import zeros_whole
from microglia.scores.base import Evidence, score
from microglia.scores.gradient import loss_gradient
from microglia.scores.guard import untouched


def accumulated_gradient(
    model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence, *, beta: float = 0.99
) -> dict[str, Tensor]:
    """Returns the moving average of |w * dL/dw| over the batches, with bias correction (spec: AWG 6.2).

    The model runs in evaluation mode and stays unchanged. Unlike in ``gradient``, the absolute value is taken per batch, so
    that a weight whose gradients cancel over batches still counts.

    Args:
        model: Dense or masked.
        layers: Layers to score, by name.
        evidence: Batches and loss.
        beta: Weight of the past, in [0, 1).
    """
    batches = list(evidence.batches)
    with untouched(model):
        model.eval()
        average = {name: zeros_whole(layer.raw, torch.float32) for name, layer in layers.items()}
        if not batches:
            raise ScoreError("This score needs at least one batch of (inputs, targets); it got none.")
        for batch in batches:
            gradients = loss_gradient(model, layers, replace(evidence, batches=[batch]))
            for name, layer in layers.items():
                average[name].lerp_((layer.weight.detach() * gradients[name]).abs().float(), 1 - beta)
    return {name: value / (1 - beta ** len(batches)) for name, value in average.items()}


@score("accumulated-gradient", shards=True)
def accumulated(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns |w * dL/dw| of single batches, in a moving average with weight 0.99 for the past (SMART, appendix G: AWG)."""
    return accumulated_gradient(model, layers, evidence)
