"""The way a training went: places kept after its epochs, and the plane that shows most of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from microglia.core.errors import MicrogliaError
from microglia.storage.files import read_tensors, write_tensors
from microglia.storage.run import PLACE
from microglia.studies.space.points import Point, check_alike, combine, difference, inner, point_of


@dataclass(frozen=True)
class Plane:
    """Two principal directions of a trajectory.

    Attributes:
        directions: Two, orthogonal, of length 1.
        explained: Share of the trajectory's variance along each, in [0, 1].
    """

    directions: tuple[dict[str, Tensor], dict[str, Tensor]]
    explained: tuple[float, float]


def principal_plane(path: Sequence[Point]) -> Plane:
    """Returns the first two principal components of a path, seen from its end.

    They are those of the differences theta_t - theta_T, the end's 0 included, less their mean. The T x T matrix of inner
    products is enough, in float64: no matrix of the size of the network squared is made.

    Args:
        path: Three places or more; the last one is the end.

    Raises:
        MicrogliaError: There are fewer places, or they lie on one line.

    Source: Li et al. 2018, section 7.2; survey 1.1.
    """
    if len(path) < 3:
        raise MicrogliaError(f"A plane needs a path of 3 places or more; got {len(path)}.")
    for one in path:
        check_alike(one, path[-1])
    steps = [{name: value.double() for name, value in difference(one, path[-1]).items()} for one in path]
    gram = torch.tensor([[inner(one, other) for other in steps] for one in steps], dtype=torch.float64)
    count = len(steps)
    center = torch.eye(count, dtype=torch.float64) - 1 / count
    values, vectors = torch.linalg.eigh(center @ gram @ center)
    total = float(values.clamp(min=0).sum())
    if float(values[-2]) <= 1e-12 * total:
        raise MicrogliaError("The places of this path lie on one line (or are all the same), and span no plane.")
    directions = []
    for number in (-1, -2):
        weights = (center @ vectors[:, number]) / math.sqrt(float(values[number]))
        found = combine(steps, weights.tolist())
        directions.append({name: value.to(path[-1][name]) for name, value in found.items()})
    return Plane((directions[0], directions[1]), (float(values[-1]) / total, float(values[-2]) / total))


def project(
    point: Point, origin: Point, directions: Sequence[Point], how: Literal["inner", "least_squares"] = "inner"
) -> tuple[float, ...]:
    """Returns the coordinates of a place, so that origin + their sum with the directions is near it.

    Args:
        point: The place.
        origin: Origin of the coordinates.
        directions: Any two that are not parallel, or one.
        how: ``inner`` by inner products, right for orthogonal directions; ``least_squares`` gives the nearest point of the
            plane for any directions.
    """
    step = difference(point, origin)
    products = torch.tensor([inner(step, direction) for direction in directions], dtype=torch.float64)
    if how == "inner":
        return tuple((products / torch.tensor([inner(d, d) for d in directions], dtype=torch.float64)).tolist())
    gram = torch.tensor([[inner(one, other) for other in directions] for one in directions], dtype=torch.float64)
    return tuple(torch.linalg.solve(gram, products).tolist())


def keep_place(directory: Path, number: int, model: nn.Module) -> Path:
    """Writes the parameters of a model as place ``number`` of a trajectory; call it after each epoch, 0 before the first.

    Returns:
        The file in ``directory``.

    Raises:
        FileError: It cannot be written.
    """
    path = directory / f"{number:06d}.safetensors"
    write_tensors(path, point_of(model), kind=PLACE)
    return path


def read_trajectory(directory: Path) -> list[dict[str, Tensor]]:
    """Returns the places that `keep_place` wrote, in order; none where there is no such directory.

    Raises:
        FileError: One of them is damaged.
    """
    return [read_tensors(path, kind=PLACE)[0] for path in sorted(directory.glob("*.safetensors"))]
