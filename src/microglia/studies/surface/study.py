"""The surface of the loss around a trained network: a plane and a line through it, row by row, as pictures and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from torch import nn

from microglia.core.errors import MicrogliaError
from microglia.core.masks import fold, masks_of
from microglia.core.progress import progress_bar
from microglia.lab.target import open_target
from microglia.storage.files import digest
from microglia.storage.run import TRAJECTORY, Run
from microglia.studies.listed import LISTED
from microglia.studies.options import Option
from microglia.studies.places import beside, run_of
from microglia.studies.result import Told
from microglia.studies.space.gauge import Gauge
from microglia.studies.space.points import Point, check_alike, difference, inner, norm, point_of
from microglia.studies.space.trajectory import Plane, principal_plane, project, read_trajectory
from microglia.studies.study import Study, Work, conduct, register
from microglia.studies.surface.figures import figures
from microglia.studies.surface.grid import Normalization, grid, measure_row, random_direction
from microglia.studies.surface.result import Surface
from microglia.tasks.task import Split, Task
from microglia.train.engine import accelerator

MARGIN = 1.1  # how much farther than the farthest place of a trajectory the plane reaches
Json = dict[str, Any]


@dataclass(frozen=True)
class Surveying:
    """Which network to look at, and how closely.

    Attributes:
        target: A run directory, a saved model's directory, or a model's name.
        side: Places of the plane in each direction, odd; the line has twice as many.
        reach: Distance from the network to the edge of the plane, in lengths of its directions; with filter-normalized ones 1
            is as far as to double or to zero the weights.
        normalization: How long the directions are: by ``filter``, ``layer``, ``weight`` or ``none``.
        limit: Batches of 256 to look at, the same at every place; None for all.
        split: Part of the data, without augmentation: ``train``, ``validation`` or ``test``.
        trajectory: Whether the plane is that of the training's trajectory, where the run keeps one.
        data: Data set instead of the run's own.
        checkpoint: Trained weights of a network by name.
        seed: Root of the directions and of what ``limit`` draws.
        out: Directory, where the same command goes on; None for ``surface`` in the run, beside a saved model, or under
            ``runs``.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    target: Annotated[str, Option(words=("target",))]
    side: int = 25
    reach: Annotated[float, Option(name="range")] = 1.0
    normalization: Normalization = "filter"
    limit: int | None = None
    split: Split = "train"
    trajectory: bool = False
    data: str | None = None
    checkpoint: str | None = None
    seed: int = 0
    out: Path | None = None
    device: str = "auto"

    @property
    def run(self) -> Path | None:
        """The run that the target is, or whose model it is."""
        return run_of(self.target)

    @property
    def directory(self) -> Path:
        """Where everything goes."""
        return self.out or beside(self.target, "surface", self.data)


@dataclass(frozen=True)
class _Plane:
    """Where the plane lies.

    Attributes:
        directions: Two, of the length that counts as 1.
        trajectory: (places as coordinates, share of the variance along each direction) of a training; None of random ones.
    """

    directions: tuple[Point, Point]
    trajectory: Json | None


def view_surface(asked: Surveying) -> Told[Surface]:
    """Measures the loss around a network on a plane and a line, draws both and returns them, JSON-ready.

    Every row of the plane is kept as it is done: the same call goes on after it was interrupted. Batch norm keeps the
    statistics of the network. Pruned weights get no direction.

    The result holds ``task``, ``split``, ``metrics``, ``axis`` (coordinates of the plane, in both directions), ``plane`` (for
    each metric a list of rows; y is the row), ``line`` (``x`` and the metrics of each place), ``center``, ``cosine`` (of the
    two directions), ``trajectory``, ``notes``, ``pictures`` and the settings. A value that is not finite is None.

    Raises:
        MicrogliaError: The target or a setting is not as it should be.
    """
    return conduct(SURFACE, asked)


def _begin(asked: Surveying) -> Work[Json]:
    axis = grid(asked.side, asked.reach)
    if asked.limit is not None and asked.limit < 1:
        raise MicrogliaError(f"The limit is a number of batches of at least 1; got {asked.limit}.")
    model, task = open_target(asked.target, asked.data, asked.checkpoint)
    model.to(accelerator(asked.device).device)
    notes: list[str] = []
    plane = _lie(asked, model, notes)

    def measure(run: Run) -> Json:
        rows, line = _measure(asked, model, task, plane, run)
        return _result(asked, task, rows, line) | {
            "axis": axis,
            "cosine": inner(*plane.directions) / (norm(plane.directions[0]) * norm(plane.directions[1]) or 1.0),
            "trajectory": plane.trajectory,
            "notes": notes,
        }

    return Work(measure, _recipe(asked, model, task, plane), asked.seed)


def _lie(asked: Surveying, model: nn.Module, notes: list[str]) -> _Plane:
    """Returns the plane; the model's masks are folded."""
    masks = masks_of(model)
    origin = point_of(fold(model))
    if asked.trajectory:
        path = read_trajectory(asked.run / TRAJECTORY) if asked.run is not None else []
        if len(path) >= 3:
            for there in path:
                check_alike(there, origin)
            path = [{name: value.to(origin[name]) for name, value in there.items()} for there in path]
            at_the_end = norm(difference(path[-1], origin)) == 0
            return _of_trajectory(path if at_the_end else [*path, origin])
        notes.append(
            f"{asked.target} keeps no trajectory of its training ({TRAJECTORY}/ with 3 places or more), so the plane is "
            "random; runs with measure.trajectory=true keep one."
        )
    one, other = (
        random_direction(origin, seed=2 * asked.seed + number, normalization=asked.normalization, masks=masks)
        for number in (0, 1)
    )
    return _Plane((one, other), None)


def _of_trajectory(path: Sequence[Point]) -> _Plane:
    """Returns the plane of a trajectory, its directions as long as it reaches along them."""
    found: Plane = principal_plane(path)
    along = [project(place, path[-1], found.directions) for place in path]
    lengths = [MARGIN * max(abs(place[number]) for place in along) or 1.0 for number in (0, 1)]
    one, other = (
        {name: length * value for name, value in direction.items()}
        for length, direction in zip(lengths, found.directions, strict=True)
    )
    coordinates = [[place[number] / lengths[number] for number in (0, 1)] for place in along]
    return _Plane((one, other), {"places": coordinates, "explained": list(found.explained)})


def _recipe(asked: Surveying, model: nn.Module, task: Task, plane: _Plane) -> Json:
    """Returns what makes a survey this one: a directory of another is refused, rows of two networks are never mixed."""
    settings = {
        name: getattr(asked, name) for name in ("side", "reach", "normalization", "limit", "split", "trajectory", "seed")
    }
    return {
        "command": "surface",
        "task": task.name,
        "weights": digest(model.state_dict()),
        **settings,
        "plane": plane.trajectory,
    }


def _measure(asked: Surveying, model: nn.Module, task: Task, plane: _Plane, run: Run) -> tuple[list[list[Json]], list[Json]]:
    """Returns the rows of the plane and the line, each row a stage of the run."""
    gauge = Gauge(task, (asked.split,), recalibrate=0, limit=asked.limit, seed=asked.seed)
    origin, axis = point_of(model), grid(asked.side, asked.reach)
    rows = []
    with progress_bar("surface", total=asked.side + 1) as bar:
        for number, y in enumerate(axis):
            places = [(x, y) for x in axis]
            work = lambda _, places=places: measure_row(model, origin, plane.directions, places, gauge)  # noqa: E731
            rows.append(run.stage(f"row-{number:03d}", work))
            bar.advance()
        steps = [(x,) for x in grid(2 * asked.side - 1, asked.reach)]
        line = run.stage("line", lambda _: measure_row(model, origin, plane.directions[:1], steps, gauge))
        bar.advance()
    return rows, line


def _result(asked: Surveying, task: Task, rows: list[list[Json]], line: list[Json]) -> Json:
    names = {f"{asked.split}_{name}": name for name in (task.headline, "loss")}
    middle = asked.side // 2
    plain = [{"x": place["x"], **{name: _finite(place[key]) for key, name in names.items()}} for place in line]
    return {
        "command": "surface",
        "task": task.name,
        "split": asked.split,
        "side": asked.side,
        "range": asked.reach,
        "normalization": asked.normalization,
        "limit": asked.limit,
        "seed": asked.seed,
        "metrics": [task.headline, "loss"],
        "plane": {name: [[_finite(place[key]) for place in row] for row in rows] for key, name in names.items()},
        "line": plain,
        "center": {name: _finite(rows[middle][middle][key]) for key, name in names.items()},
    }


def _finite(value: float) -> float | None:
    """Far from the network a loss may be no number, for which JSON has no word."""
    return value if math.isfinite(value) else None


# ----------------------------------------------------------------------------------------------------------- for people
def surface_table(told: Surface) -> Table:
    """Returns the table of how fast the network gets worse around it."""
    reach = told.range
    directions = "of the training's trajectory" if told.trajectory else f"random, {told.normalization}-normalized"
    table = Table(title=f"{told.task}: {told.split} loss, {told.side} x {told.side} places")
    for name in ("distance", "places", "loss, median", "least", "largest"):
        table.add_column(name, justify="left" if name == "distance" else "right")
    half = told.side // 2
    steps = [abs(number - half) for number in range(told.side)]
    for ring in sorted({round(share * half) for share in (0.0, 0.25, 0.5, 1.0)}):
        on = [
            told.plane["loss"][row][column]
            for row in range(told.side)
            for column in range(told.side)
            if max(steps[row], steps[column]) == ring
        ]
        values = sorted(value for value in on if value is not None)
        shown = (values[len(values) // 2], values[0], values[-1]) if values else ()
        table.add_row(
            f"{reach * ring / half:.3g}", str(len(on)), *(f"{value:.5g}" for value in shown), *["-"] * (3 - len(shown))
        )
    table.caption = f"Directions: {directions}; cosine {told.cosine:.4f}. Distance: the larger of both coordinates."
    if told.trajectory:
        shares = " and ".join(f"{100 * share:.1f} %" for share in told.trajectory.explained)
        table.caption += f" They explain {shares} of the trajectory's variance."
    return table


SURFACE = register(
    Study(
        "surface",
        LISTED["surface"].sentence,
        Surveying,
        _begin,
        tables=lambda told: [surface_table(told), *told.notes],
        figures=figures,
        result=Surface,
        directory=lambda asked: asked.directory,
        example="microglia surface runs/a --side 25",
    )
)
