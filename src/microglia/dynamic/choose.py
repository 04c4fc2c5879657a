"""Choice of r before training for a budget of operations, from one dense pass over training images.

Source: FTWT's estimate before training; spec, section 7.9.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import call, count_examples, to_device
from microglia.core.errors import BudgetError
from microglia.core.modes import evaluating
from microglia.dynamic.counting import Count, Counter
from microglia.dynamic.gate_plan import GatePlan
from microglia.dynamic.gates import Passage, listening
from microglia.dynamic.targets import Rule, targets

ROUNDS = 24  # steps of the bisection: r to less than 1e-6


@dataclass(frozen=True)
class Estimate:
    """The expected cost of a plan.

    Attributes:
        r: Fraction of the mass to keep, for all layers or by layer.
        honest: Remaining fraction of the dense model's multiply-accumulates, heads included.
        paper: The same fraction by the published count.
        kept: Layer -> mean fraction of its kept filters.
        images: Number of training images of the estimate.
    """

    r: float | dict[str, float]
    honest: float
    paper: float
    kept: dict[str, float]
    images: int


@torch.no_grad()
def shares(model: nn.Module, batches: Iterable[tuple[Any, Any]], count: int, device: torch.device) -> dict[str, Tensor]:
    """Returns each filter's share of its layer's response, layer -> float32 (images, outputs), as if there were no gates."""
    found: dict[str, list[Tensor]] = {}

    def hear(passage: Passage) -> None:
        found.setdefault(passage.gate.site.layer, []).append(passage.share().cpu())

    seen = 0
    with evaluating(model), listening(model, hear, fade=0.0):
        for inputs, _ in islice(batches, count):
            call(model, to_device(inputs, device))
            seen += count_examples(inputs)
            if seen >= count:
                break
    return {layer: torch.cat(parts)[:count] for layer, parts in found.items()}


def estimate(share: Mapping[str, Tensor], r: float | Mapping[str, float], rule: Rule, counter: Counter) -> Estimate:
    """Returns the estimated cost of targets with one r for all layers, or one per layer."""
    each = r if isinstance(r, Mapping) else dict.fromkeys(share, r)
    masks = {layer: targets(part, each[layer], rule) for layer, part in share.items()}
    costs = counter(masks)
    kept = {layer: float(mask.double().mean()) for layer, mask in masks.items()}
    images = len(next(iter(share.values())))
    said = dict(r) if isinstance(r, Mapping) else r
    return Estimate(said, float(costs.honest.mean()) / costs.dense, float(costs.paper.mean()) / costs.dense, kept, images)


def choose_r(share: Mapping[str, Tensor], flops: float, rule: Rule, counter: Counter, count: Count = "honest") -> Estimate:
    """Returns the largest r with a cost of at most ``flops``, a fraction of the dense model's, by bisection.

    Raises:
        BudgetError: Even one filter in each layer costs more.
    """
    low, high = 0.0, 1.0
    found = estimate(share, high, rule, counter)
    if getattr(found, count) <= flops:
        return found
    least: Estimate | None = None
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        tried = estimate(share, middle, rule, counter)
        if getattr(tried, count) <= flops:
            low, least = middle, tried
        else:
            high = middle
    if least is None:
        raise _too_few(count, flops, getattr(estimate(share, high, rule, counter), count))
    return least


def choose_density(plan: GatePlan, flops: float, counter: Counter, count: Count = "honest") -> tuple[float, dict[str, int]]:
    """Returns the largest density with a cost of at most ``flops``, and each layer's number of kept units.

    Every gate keeps the same fraction of its units, rounded up, for each input; so the cost is known before the training. The
    kept filters of a depthwise layer are taken to be those that arrive, which costs most.

    Raises:
        BudgetError: Even one unit in each layer costs more.
    """
    units = {site.layer: plan.head_of(site)[0] for site in plan.sites}

    def kept(density: float) -> dict[str, int]:
        return {layer: max(1, math.ceil(density * number - 1e-9)) for layer, number in units.items()}

    def cost(density: float) -> float:
        masks = {layer: torch.arange(units[layer])[None] < number for layer, number in kept(density).items()}
        costs = counter(masks)
        return float(costs.of(count)[0]) / costs.dense

    low, high = 0.0, 1.0
    if cost(high) <= flops:
        return high, kept(high)
    if cost(low) > flops:
        raise _too_few(count, flops, cost(low))
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= flops else (low, middle)
    return low, kept(low)


def _too_few(count: Count, flops: float, least: float) -> BudgetError:
    return BudgetError(
        f"The gates cannot bring the {count} operations to {flops:g} of the dense model: with one filter a layer "
        f"they are {least:.3g}. Gate more layers, or ask for more."
    )
