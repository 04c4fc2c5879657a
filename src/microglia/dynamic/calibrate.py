"""Calibration: moves the thresholds of trained heads so that the gates meet a budget of operations.

A head keeps the filters that are more likely than not in its target. If most filters are likely, the masks are larger than the
targets; if few are, they are smaller. After a short training all logits of a layer are close together. So the computed
operations differ from the estimate of `choose_r`. Other thresholds restore the budget and keep the order of a layer's logits.
This method is ours, not the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import call, to_device
from microglia.core.modes import evaluating
from microglia.dynamic.counting import Count, Counter
from microglia.dynamic.gates import Passage, gates_of, listening

PASSES = 4
"""Number of forward passes: the input of a head depends on earlier masks, so each step is measured again."""
ROUNDS = 30  # steps of the bisection


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    counter: Counter,
    kept: Mapping[str, float],
    *,
    flops: float,
    count: Count = "honest",
) -> dict[str, float]:
    """Moves the biases of each head by one amount, in place, until the mean operations are ``flops``.

    Each layer keeps the share of filters of its targets, times one common factor that meets the budget. On several ranks with
    the same batches, all use the first rank's moves.

    Args:
        model: A model with trained gates that choose by threshold.
        batches: A few batches of training inputs; read once, kept in memory.
        counter: Counter of the model's operations.
        kept: Layer -> mean fraction of its filters to keep, before the factor.
        flops: Fraction of the dense model's operations to compute, on the mean over inputs.
        count: Kind of count, ``honest`` or ``paper``.

    Returns:
        Layer -> how far its biases moved, in log-odds; positive keeps more.
    """
    device, gates = next(model.parameters()).device, gates_of(model)
    inputs = [to_device(x, device) for x, _ in batches]
    moved = dict.fromkeys(gates, 0.0)
    with evaluating(model):
        for _ in range(PASSES):
            steps = torch.tensor(
                _steps(_logits(model, inputs), counter, kept, flops, count), dtype=torch.float64, device=device
            )
            if torch.distributed.is_initialized():
                torch.distributed.broadcast(steps, src=0)
            for (layer, gate), step in zip(gates.items(), steps.tolist(), strict=True):
                gate.bias.add_(step)
                moved[layer] += step
    return moved


def _logits(model: nn.Module, inputs: list[Any]) -> dict[str, Tensor]:
    """Returns the heads' logits for some batches, layer -> (inputs, outputs), with all masks active."""
    found: dict[str, list[Tensor]] = {}

    def hear(passage: Passage) -> None:
        found.setdefault(passage.gate.site.layer, []).append(passage.logits.cpu())

    with listening(model, hear, fade=1.0):
        for x in inputs:
            call(model, x)
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def _steps(
    logits: Mapping[str, Tensor], counter: Counter, kept: Mapping[str, float], flops: float, count: Count
) -> list[float]:
    """Returns the move of each layer's logits with which it keeps its share times the largest fitting factor."""
    ordered = {layer: each.flatten().sort().values for layer, each in logits.items()}
    low, high = 0.0, 1.0 / min(kept.values())  # nothing, everything
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        steps = {layer: _step(values, middle * kept[layer]) for layer, values in ordered.items()}
        costs = counter({layer: each + steps[layer] > 0 for layer, each in logits.items()})
        if float(costs.of(count).mean()) / costs.dense <= flops:
            low = middle
        else:
            high = middle
    return [_step(values, low * kept[layer]) for layer, values in ordered.items()]


def _step(ordered: Tensor, share: float) -> float:
    """Returns the term for ascending logits with which this share of them is above 0: midway between two."""
    above = min(len(ordered), round(share * len(ordered)))
    if above in (0, len(ordered)):
        return 1.0 - float(ordered[0]) if above else -1.0 - float(ordered[-1])
    return -float(ordered[-above - 1 : len(ordered) - above + 1].mean())
