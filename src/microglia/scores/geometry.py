"""Scores of whole filters from weights only: norms, the geometric median, the scale of the norm; and LAMP."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from microglia.core.errors import ScoreError
from microglia.core.layers import Layer
from microglia.scores.base import Evidence, per_filter, rows, score
from microglia.scores.behind import norms_behind


@score("l1", filters=True, shards=True)
def l1(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns the sum of |w| over each filter (Li et al. 2017).

    The weights are those of the forward pass: masked columns do not count, which is the paper's greedy rule.
    """
    return {name: per_filter(layer, rows(layer).abs().sum(1)) for name, layer in layers.items()}


@score("l2", filters=True, shards=True)
def l2(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns the Euclidean norm of each filter (He et al. 2018); masked columns as with `l1`."""
    return {name: per_filter(layer, rows(layer).norm(dim=1)) for name, layer in layers.items()}


@score("fpgm", filters=True, shards=True)
def fpgm(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns the sum of distances from each filter to all others of its layer (He et al. 2019, equation 5).

    The filter with the smallest sum is nearest to the geometric median, so the others can replace it.
    """
    return {name: per_filter(layer, distances(rows(layer))) for name, layer in layers.items()}


def distances(filters: Tensor) -> Tensor:
    """Returns the sum over j of |f_i - f_j| for each row f_i, (n,), in float64; a distance within rounding error is 0."""
    centred = filters.double() - filters.double().mean(0)
    squares = centred.square().sum(1)
    apart = squares[:, None] + squares - 2 * centred @ centred.T
    return torch.where(apart > 1e-13 * squares.max(), apart, 0.0).sqrt().sum(1)


@score("scale", filters=True)
def scale(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns |gamma| of the norm right after each filter (Liu et al. 2017); 1 for a layer without a norm.

    It runs one batch to find the norms.

    Raises:
        ScoreError: No layer is followed by a norm with a scale.
    """
    norms = norms_behind(model.eval(), layers, evidence)
    if not norms:
        raise ScoreError(
            f"The score scale ranks channels by the scales of norms, and no layer of this {type(model).__name__} has a norm "
            "with a scale right behind it: take l2 or fpgm."
        )
    found = {name: norm.scale.detach().abs().double() for name, norm in norms.items()}
    return {
        name: per_filter(layer, found.get(name, torch.ones(layer.sides[0], device=layer.raw.device, dtype=torch.float64)))
        for name, layer in layers.items()
    }


@score("lamp", shards=True)
def lamp(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns w^2 over the sum of all v^2 of its layer with |v| >= |w| (Lee et al. 2021), comparable across layers.

    The largest weight of every layer scores 1.
    """
    return {name: _lamp(layer.weight.detach()) for name, layer in layers.items()}


def _lamp(weight: Tensor) -> Tensor:
    squares = weight.flatten().double().square()
    ordered, order = squares.sort(descending=True, stable=True)
    left = ordered.cumsum(0)
    shares = torch.where(left > 0, ordered / left.clamp_min(torch.finfo(left.dtype).tiny), 0.0)
    return torch.empty_like(squares).scatter_(0, order, shares).view_as(weight)
