"""Places in weight space: every parameter of a network by name, as values that are combined, visited and returned from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from microglia.core.errors import MicrogliaError
from microglia.core.modes import modes_kept

Point = Mapping[str, Tensor]
"""Every parameter by name. Buffers (batch-norm statistics) are no coordinates: they follow from the place and the data."""


def point_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of a model's parameters. Masks are to be folded first (`microglia.fold`), so that names agree."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def move(model: nn.Module, point: Point) -> None:
    """Writes a place into a model's parameters, in place.

    Raises:
        MicrogliaError: Names or shapes are not those of the model.
    """
    own = dict(model.named_parameters())
    check_alike(own, point)
    for name, value in point.items():
        own[name].copy_(value)


def check_alike(one: Point, other: Point) -> None:
    """Raises unless two places are of the same architecture; the text names the first difference."""
    if missing := sorted(one.keys() ^ other.keys()):
        raise MicrogliaError(
            f"The two networks differ: only one of them has {missing[0]!r} ({len(missing)} such names). Paths lead between "
            "networks of one architecture, without masks (microglia.fold)."
        )
    for name, value in one.items():
        if value.shape != other[name].shape:
            raise MicrogliaError(
                f"The two networks differ: {name!r} has the shape {tuple(value.shape)} in one and {tuple(other[name].shape)} "
                "in the other. Paths lead between networks of one architecture."
            )


@contextmanager
def visiting(model: nn.Module) -> Iterator[None]:
    """Runs its body, which may move the model, and puts parameters, buffers and modes back, bit for bit."""
    before = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    with modes_kept(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)


def combine(points: Sequence[Point], weights: Sequence[float]) -> dict[str, Tensor]:
    """Returns the weighted sum of places; with one weight 1 and the others 0 that place itself, bit for bit."""
    used = [(point, weight) for point, weight in zip(points, weights, strict=True) if weight != 0]
    if len(used) == 1 and used[0][1] == 1:
        return {name: value.clone() for name, value in used[0][0].items()}
    total = {name: torch.zeros_like(value) for name, value in points[0].items()}
    for point, weight in used:
        for name, value in total.items():
            value.add_(point[name], alpha=weight)
    return total


def difference(one: Point, other: Point) -> dict[str, Tensor]:
    """Returns one - other."""
    return {name: value - other[name] for name, value in one.items()}


def inner(one: Point, other: Point) -> float:
    """Returns the inner product over all parameters, summed in float64."""
    return sum((float((value.double() * other[name].double()).sum()) for name, value in one.items()), 0.0)


def norm(one: Point) -> float:
    """Returns the Euclidean length over all parameters."""
    return math.sqrt(inner(one, one))
