"""Moving the heads' common threshold so that trained gates meet a budget of operations.

A head keeps what is more likely than not to be in its target. Where most targets are likely the masks are larger than the
targets, where few are they are smaller: what is computed differs from what `choose_r` promised. One other threshold for all
heads, the same in log-odds, gives the budget back and leaves their order alone. It is ours, not the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from microglia.dynamic.counting import Count, Counter
from microglia.dynamic.gates import Passage, gates_of, listening

PASSES = 4
"""Forward passes: what arrives at a head depends on the masks before it, so that each step is measured anew."""
ROUNDS = 30  # of the bisection


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[tuple[Any, Any]], counter: Counter, flops: float, count: Count = "honest"
) -> float:
    """Moves the biases of all heads by one common amount, in place, until the mean operations are ``flops``.

    Over several ranks, given the same batches, all move as the first one does.

    Args:
        model: With trained gates that choose by threshold.
        batches: Few batches of training inputs; read once, kept in memory.
        counter: Of the model's operations.
        flops: Fraction of the dense model's operations to compute, on the mean over inputs.
        count: What of them counts.

    Returns:
        How far the biases moved, in log-odds; positive keeps more.
    """
    device, gates = next(model.parameters()).device, gates_of(model)
    inputs = [x.to(device) for x, _ in batches]
    moved, training = 0.0, model.training
    model.eval()
    for _ in range(PASSES):
        step = _step(_logits(model, inputs), counter, flops, count)
        if torch.distributed.is_initialized():
            shared = torch.tensor(step, device=device, dtype=torch.float64)
            torch.distributed.broadcast(shared, src=0)
            step = float(shared)
        for gate in gates.values():
            gate.bias.add_(step)
        moved += step
    model.train(training)
    return moved


def _logits(model: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Returns what the heads say of some batches, layer -> (inputs, outputs), every mask acting."""
    found: dict[str, list[Tensor]] = {}

    def hear(passage: Passage) -> None:
        found.setdefault(passage.gate.site.layer, []).append(passage.logits.cpu())

    with listening(model, hear, fade=1.0):
        for x in inputs:
            model(x)
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def _step(logits: Mapping[str, Tensor], counter: Counter, flops: float, count: Count) -> float:
    """Returns the largest common amount by which these logits cost at most ``flops``; all or nothing bounds it."""
    reach = 1.0 + max(float(each.abs().max()) for each in logits.values())
    low, high = -reach, reach
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        costs = counter({layer: each + middle > 0 for layer, each in logits.items()})
        if float(costs.of(count).mean()) / costs.dense <= flops:
            low = middle
        else:
            high = middle
    return low
