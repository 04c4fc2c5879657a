"""Pictures of the loss around a solution: lines and planes along random directions, made comparable between networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from microglia.core.errors import MicrogliaError
from microglia.studies.space.gauge import Gauge
from microglia.studies.space.points import Point, move, visiting

Normalization = Literal["filter", "layer", "weight", "none"]
TINY = 1e-10
"""Keeps the direction of an all-zero filter finite."""


def random_direction(
    point: Point, *, seed: int = 0, normalization: Normalization = "filter", masks: Point | None = None
) -> dict[str, Tensor]:
    """Returns a random direction at a place, scaled like the weights there; the same for the same seed on every device.

    Drawn from N(0, I). Tensors of one dimension (biases, batch norm) get no direction, so buffers, which are no part of a
    place, never do. Two directions of different seeds are nearly orthogonal: their cosine is about N^-1/2 for N weights.

    Args:
        point: Parameters by name.
        seed: Root of the draw.
        normalization: ``filter`` gives every row of a weight (filter, or what comes into a neuron) the norm of the weight's
            own row; ``layer`` the same for whole tensors; ``weight`` multiplies entry by entry; ``none`` leaves it as drawn.
        masks: Masks of a pruned network by parameter name: a pruned weight is no freedom of the network and gets no direction.

    Raises:
        MicrogliaError: The normalization is none of these, or a mask is of no parameter.

    Source: Li et al. 2018, "Visualizing the loss landscape of neural nets", section 4; survey 1.1.
    """
    if normalization not in get_args(Normalization):
        raise MicrogliaError(f"The normalization is {', '.join(get_args(Normalization))}; got {normalization!r}.")
    if unknown := sorted((masks or {}).keys() - point.keys()):
        raise MicrogliaError(
            f"There is a mask of {unknown[0]!r}, but no parameter of that name; tied weights go by their first name."
        )
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, value in point.items():
        if value.ndim < 2:
            direction[name] = torch.zeros_like(value)
            continue
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if masks is not None and name in masks:
            drawn = drawn * masks[name].cpu()
        direction[name] = _normalized(drawn, value.detach().cpu().double(), normalization).to(value)
    return direction


def _normalized(drawn: Tensor, value: Tensor, normalization: Normalization) -> Tensor:
    if normalization == "filter":
        factor = _norm(value.flatten(1), 1) / (_norm(drawn.flatten(1), 1) + TINY)
        return drawn * factor.reshape(-1, *[1] * (value.ndim - 1))
    if normalization == "layer":
        return drawn * (_norm(value) / (_norm(drawn) + TINY))
    return drawn * value if normalization == "weight" else drawn


def _norm(value: Tensor, dim: int | None = None) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(value, dim=dim)
    return found


def grid(side: int, reach: float = 1.0) -> list[float]:
    """Returns ``side`` equally spaced numbers from -reach to reach, with exactly 0 in the middle.

    Raises:
        MicrogliaError: The side is even or below 3, or the reach is not above 0.
    """
    if side < 3 or side % 2 == 0:
        raise MicrogliaError(f"A grid has an odd number of points a side, at least 3, so that it holds the origin; got {side}.")
    if not 0 < reach < float("inf"):
        raise MicrogliaError(f"The range of a grid is a number above 0; got {reach}.")
    half = side // 2
    return [reach * ((number - half) / half) for number in range(side)]


def place(origin: Point, directions: Sequence[Point], coordinates: Sequence[float]) -> dict[str, Tensor]:
    """Returns origin + the sum of coordinate times direction, computed in float64; at zeros the origin, bit for bit."""
    used = [(along, direction) for along, direction in zip(coordinates, directions, strict=True) if along]
    found = {}
    for name, value in origin.items():
        total = value.double() if used else value.clone()
        for along, direction in used:
            total = total + along * direction[name].double()
        found[name] = total.to(value)
    return found


def measure_row(
    model: nn.Module, origin: Point, directions: Sequence[Point], coordinates: Sequence[Sequence[float]], gauge: Gauge
) -> list[dict[str, Any]]:
    """Returns what a network is worth at places around it: the coordinates ``x`` (and ``y``), and the gauge's metrics.

    Batch norm's statistics stay those stored with a gauge of ``recalibrate=0``, which is right along random directions; along
    the way from one solution to another they are to be made anew.

    Args:
        model: To measure in; parameters, buffers and modes are put back, bit for bit.
        origin: The place around which.
        directions: One or two.
        coordinates: For each place one number for each direction.
        gauge: How to measure.
    """
    rows = []
    with visiting(model):
        for along in coordinates:
            move(model, place(origin, directions, along))
            rows.append({**dict(zip(("x", "y"), along, strict=False)), **gauge(model)})
    return rows


def measure_line(
    model: nn.Module, origin: Point, direction: Point, steps: Sequence[float], gauge: Gauge
) -> list[dict[str, Any]]:
    """Returns F(x) = L(origin + x direction), one row a step; see `measure_row`."""
    return measure_row(model, origin, [direction], [(step,) for step in steps], gauge)
