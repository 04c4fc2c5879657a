"""Static masks at the places of the gates: the same filters for every input, those with the largest mean mass.

They are the baseline that gates must beat: the same layers, the same operations, no choice for each input. They are also a
start for heads (``initial: static``): a head begins as a constant, and routes open up while it learns. Both are ours, not the
paper's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.dynamic.counting import Count, Counter
from microglia.dynamic.gates import gates_of
from microglia.dynamic.targets import targets

MARGIN = 0.1
"""Smallest absolute logit of a head that starts static; small, so that a head may soon decide otherwise."""
ROUNDS = 30  # steps of the bisection


@torch.no_grad()
def static_masks(
    share: Mapping[str, Tensor],
    kept: Mapping[str, float],
    counter: Counter,
    *,
    flops: float | None = None,
    count: Count = "honest",
) -> dict[str, Tensor]:
    """Returns the masks that keep the units with the largest mean mass, layer -> boolean (units,).

    Each layer keeps its fraction ``kept``, as the masks of gates do on average; with a budget, times one factor for all layers,
    the largest that fits. At least one unit of each layer stays. Ties go to the lower index.

    Args:
        share: Layer -> share of each unit in its layer's response, (images, units); see `shares`.
        kept: Layer -> fraction of the units to keep, before the factor.
        counter: Counter of the gated model's operations.
        flops: Fraction of the dense model's operations to compute; None keeps ``kept`` itself.
        count: Kind of count, ``honest`` or ``paper``.

    Raises:
        BudgetError: Even one unit in each layer costs more.
    """
    order = {layer: part.double().mean(0).sort(descending=True, stable=True).indices for layer, part in share.items()}

    def masks(factor: float) -> dict[str, Tensor]:
        chosen = {}
        for layer, best in order.items():
            number = min(len(best), max(1, round(factor * kept[layer] * len(best))))
            chosen[layer] = torch.zeros(len(best), dtype=torch.bool).index_fill_(0, best[:number].cpu(), True)
        return chosen

    def fits(tried: Mapping[str, Tensor]) -> bool:
        costs = counter({layer: mask[None] for layer, mask in tried.items()})
        return flops is None or float(costs.of(count)[0]) <= flops * costs.dense

    if flops is None:
        return masks(1.0)
    low, high = 0.0, 1.0 / min(kept.values())  # one unit, everything
    if fits(masks(high)):
        return masks(high)
    if not fits(masks(low)):
        raise BudgetError(
            f"Static masks at the gates cannot bring the {count} operations to {flops:g} of the dense model: one unit in each "
            "layer costs more. Gate more layers, or ask for more."
        )
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(masks(middle)) else (low, middle)
    return masks(low)


@torch.no_grad()
def start_static(model: nn.Module, share: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Makes the heads of a gated model constants that decide as static masks do, in place.

    The weights of a head become zero. Its bias becomes the log-odds of each unit's mean target, the best constant for the loss
    of the heads, with the sign that the mask has. So the first decisions are the masks exactly, and units near the limit are
    the first whose choice follows the input. On several ranks all use the first rank's heads.

    Args:
        model: A gated model whose gates have their r, or static gates.
        share: Layer -> share of each unit in its layer's response, (images, units); see `shares`.
        masks: Layer -> units to keep, boolean (units,); see `static_masks`.
    """
    for layer, gate in gates_of(model).items():
        wanted, mask = targets(share[layer], gate.r, gate.rule).double(), masks[layer]
        images = len(wanted)
        logit = torch.logit(wanted.mean(0).clamp(0.5 / images, 1 - 0.5 / images))
        gate.weight.zero_()
        gate.bias.copy_(torch.where(mask, logit.clamp_min(MARGIN), logit.clamp_max(-MARGIN)))
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(gate.bias.data, src=0)
