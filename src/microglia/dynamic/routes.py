"""Routes: the filters that each input of a data set used, and statistics of these.

A route is the tuple of an input's masks, its signature the tuple of their counts; core filters are active on every route
(spec, section 7.12).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import call, count_examples, to_device
from microglia.core.modes import evaluating
from microglia.dynamic.counting import Counter
from microglia.dynamic.gates import Passage, gates_of, listening
from microglia.dynamic.targets import filters_of

PAIRS = 2000
"""Number of pairs of inputs to estimate overlaps."""


@dataclass(frozen=True)
class Routes:
    """The masks of the inputs of a data set.

    Attributes:
        masks: Layer -> filters that its gate kept, boolean (inputs, outputs).
        targets: Layer -> filters that its own response would keep, the same shape.
        labels: Class of each input, int64 (inputs,).
    """

    masks: dict[str, Tensor]
    targets: dict[str, Tensor]
    labels: Tensor


@torch.no_grad()
def record(
    model: nn.Module, batches: Iterable[tuple[Any, Any]], device: torch.device | str = "cpu", limit: int | None = None
) -> Routes:
    """Returns the routes of up to ``limit`` batches through a gated model, which stays unchanged."""
    masks: dict[str, list[Tensor]] = {layer: [] for layer in gates_of(model)}
    wanted: dict[str, list[Tensor]] = {layer: [] for layer in masks}
    labels: list[Tensor] = []

    def hear(passage: Passage) -> None:
        masks[passage.gate.site.layer].append(passage.mask.cpu())
        wanted[passage.gate.site.layer].append(filters_of(passage.target(), passage.gate.site.outputs).cpu())

    with evaluating(model), listening(model, hear):
        for inputs, targets in islice(batches, limit):
            if count_examples(inputs):
                call(model, to_device(inputs, device))
                labels.append(_classes(targets, count_examples(inputs), sum(len(each) for each in labels)))
    return Routes(_joined(masks), _joined(wanted), torch.cat(labels))


def _classes(targets: Any, count: int, seen: int) -> Tensor:
    """Returns the classes of inputs; where targets are not one label for each, every input is a class of its own."""
    if isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point():
        return targets.cpu()
    return torch.arange(seen, seen + count)


def _joined(parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {layer: torch.cat(each) for layer, each in parts.items()}


def statistics(routes: Routes, counter: Counter, generator: torch.Generator | None = None) -> dict[str, Any]:
    """Returns statistics of a set of routes, JSON-ready.

    It holds ``inputs``; ``dense`` and ``heads`` (multiply-accumulates); ``honest`` and ``paper`` (computed fraction of the
    dense ones: ``mean``, ``std``, ``min`` and ``max`` over inputs); ``agreement`` of masks with targets (``accuracy``,
    ``precision``, ``recall``); ``routes`` and ``signatures`` (distinct ones); ``layers``. Each layer has ``filters``, ``kept``
    and its ``std`` over inputs (fractions), ``core`` (filters of every route), ``dead`` (filters of no route); ``diversity`` (1
    - core / mean kept), ``macs`` (computed fraction of the layer's), agreement; and ``within`` and ``across`` (mean Jaccard
    overlap of the masks of two inputs of one class, and of two classes).
    """
    costs = counter(routes.masks)
    pairs = _pairs(routes.labels, generator or torch.Generator().manual_seed(0))
    layers = [
        {
            "layer": layer,
            "filters": mask.shape[1],
            "macs": float(costs.layers[layer].mean()) / counter.macs[layer],
            **_activity(mask),
            **agreement(mask, routes.targets[layer]),
            **{name: _jaccard(mask, pair) for name, pair in zip(("within", "across"), pairs, strict=True)},
        }
        for layer, mask in routes.masks.items()
    ]
    both = [torch.cat([part.flatten() for part in each.values()]) for each in (routes.masks, routes.targets)]
    whole = torch.cat(list(routes.masks.values()), 1)
    counts = torch.stack([mask.sum(1) for mask in routes.masks.values()], 1)
    return {
        "inputs": len(routes.labels),
        "dense": costs.dense,
        "heads": costs.heads,
        "honest": _spread(costs.honest / costs.dense),
        "paper": _spread(costs.paper / costs.dense),
        "agreement": agreement(*both),
        "routes": len(torch.unique(whole, dim=0)),
        "signatures": len(torch.unique(counts, dim=0)),
        "layers": layers,
    }


def _activity(mask: Tensor) -> dict[str, Any]:
    share, kept = mask.double().mean(1), float(mask.double().sum(1).mean())
    core = int(mask.all(0).sum())
    return {
        "kept": float(share.mean()),
        "std": float(share.std(correction=0)),
        "core": core,
        "dead": int((~mask.any(0)).sum()),
        "diversity": 1 - core / kept if kept else 0.0,
    }


def agreement(mask: Tensor, target: Tensor) -> dict[str, float]:
    """Returns accuracy, precision and recall of predicted masks against targets; 1 for an empty denominator."""
    hits, kept, wanted = int((mask & target).sum()), int(mask.sum()), int(target.sum())
    return {
        "accuracy": float((mask == target).double().mean()),
        "precision": hits / kept if kept else 1.0,
        "recall": hits / wanted if wanted else 1.0,
    }


def frequencies(routes: Routes) -> dict[str, Tensor]:
    """Returns how often each class of inputs uses each filter, layer -> float64 (classes, outputs); 0 for an empty class."""
    classes = int(routes.labels.max()) + 1
    member = torch.nn.functional.one_hot(routes.labels, classes).double()
    return {layer: (member.T @ mask.double()) / member.sum(0).clamp_min(1)[:, None] for layer, mask in routes.masks.items()}


def _pairs(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns pairs of inputs of one class, and of different classes, int64 (pairs, 2) each."""
    tried = torch.randint(len(labels), (40 * PAIRS, 2), generator=generator)
    tried = tried[tried[:, 0] != tried[:, 1]]
    same = labels[tried[:, 0]] == labels[tried[:, 1]]
    return tried[same][:PAIRS], tried[~same][:PAIRS]


def _jaccard(mask: Tensor, pairs: Tensor) -> float | None:
    """Returns the mean of |a & b| / |a | b| over pairs of rows; None without a pair."""
    if not len(pairs):
        return None
    a, b = mask[pairs[:, 0]], mask[pairs[:, 1]]
    return float(((a & b).sum(1).double() / (a | b).sum(1).clamp_min(1)).mean())


def _spread(values: Tensor) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "std": float(values.std(correction=0)),
        "min": float(values.min()),
        "max": float(values.max()),
    }
