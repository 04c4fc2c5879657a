"""Two trained networks and the paths between them: the straight line, a trained curve, and the plane both lie in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from microglia.core.errors import MicrogliaError
from microglia.core.registry import unknown_name
from microglia.storage.files import digest
from microglia.storage.run import Progress, Run
from microglia.studies.connect.curve_training import train_curve
from microglia.studies.connect.ends import Ends, open_ends
from microglia.studies.connect.figures import figures
from microglia.studies.connect.result import Connection
from microglia.studies.listed import LISTED
from microglia.studies.options import Option
from microglia.studies.places import under_runs
from microglia.studies.result import Told
from microglia.studies.space.curves import Bezier, Chain, Curve, Kind, equispaced, on_line
from microglia.studies.space.gauge import Gauge
from microglia.studies.space.plane import evaluate_plane, grid_axes, plane_through
from microglia.studies.space.points import difference, norm, point_of
from microglia.studies.space.profile import ensemble, profile, visit_all
from microglia.studies.study import Study, Work, conduct_in, register
from microglia.train.engine import accelerator
from microglia.train.optim import FitConfig, identity

KINDS = ("bezier", "chain", "none")
AVERAGED = 11
"""Places of the curve whose networks are averaged."""
TRAINING = FitConfig(epochs=30, lr=0.03, weight_decay=5e-4)
"""Learning rate and decay as Garipov et al. 2018 trained the curves of residual networks, for 200 epochs there."""
PARTS = {"epochs": "epochs", "lr": "lr", "batches": "max_batches"}
"""Options of the curve's training."""
METRICS = ("train_loss", "train_error", "test_loss", "test_error")
Json = dict[str, Any]


@dataclass(frozen=True)
class Connecting:
    """Which networks to connect, how, and what to measure.

    Attributes:
        targets: Run directories or saved models' of one architecture, on the same data.
        curve: ``bezier``, ``chain``, or ``none`` for the straight line alone.
        bends: Trained points of the curve, at least 1.
        fit: Training of the curve; see `microglia.studies.connect.curve_training.train_curve`.
        data: Data set instead of the runs' own.
        points: Places at equal distances in t at which both paths are measured, at least 2.
        recalibrate: Training batches over which batch-norm statistics are made anew at every place.
        limit: Batches of 256 of each split to look at; None for all.
        plane: Rows and columns of the heat map of the plane through the ends and the middle bend; 0 for none.
        ensemble: Whether to average the networks along the curve.
        seed: Root of every random number.
        out: Directory that keeps everything, where the same call goes on. In Python nothing is kept without one; the command
            has a directory of its own under ``runs``.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    targets: Annotated[tuple[str, str], Option(words=("run_a", "run_b"))]
    curve: str = "bezier"
    bends: int = 1
    fit: Annotated[FitConfig, Option(parts=PARTS)] = field(default_factory=lambda: TRAINING)
    data: str | None = None
    points: int = 61
    recalibrate: int = 100
    limit: int | None = None
    plane: int = 0
    ensemble: bool = False
    seed: int = 0
    out: Path | None = None
    device: str = "auto"

    @property
    def directory(self) -> Path:
        """Where the command keeps everything: the same command, the same directory."""
        names = [Path(target).resolve().name for target in self.targets]
        own = {**asdict(self), "fit": identity(asdict(self.fit)), "device": None, "out": None}
        own["targets"] = [str(Path(target).resolve()) for target in self.targets]
        return self.out or under_runs(f"connect-{names[0]}-{names[1]}", own)

    @property
    def kind(self) -> Kind | None:
        """The curve's kind; None for the straight line alone."""
        if self.curve == "none":
            return None
        return Bezier(self.bends + 1) if self.curve == "bezier" else Chain(self.bends + 1)


def connect(asked: Connecting) -> Told[Connection]:
    """Measures the straight line between two networks and a curve trained between them, and draws both.

    Source: Garipov et al. 2018; survey 2.1.

    Returns:
        ``task``; ``ends``: of each the ``target`` and its metrics with its own batch-norm statistics; ``distance`` between
        them; ``notes``; ``line`` and ``curve`` (None without one): each `microglia.studies.space.profile.Profile.to_dict`, the
        curve also with ``kind``, ``bends`` and its ``training``; ``below``: of loss and error of each split whether the
        curve's largest value is below the line's; ``ensemble``: `AlongPath` or None; ``plane``: `Grid.to_dict` with the
        coordinates of the ``places`` and of the ``path``, or None; ``pictures``.

    Raises:
        MicrogliaError: A target is none, they differ in architecture or data, or a number is out of range.
    """
    return conduct_in(asked.out, CONNECT, asked)


def _begin(asked: Connecting) -> Work[Json]:
    _check(asked)
    ends = open_ends(asked.targets, asked.data)
    _check_apart(asked, ends)
    device = accelerator(asked.device).device.type
    return Work(lambda run: run.result or _connect(asked, ends, run), _recipe(asked, ends), asked.seed, device)


def _check(asked: Connecting) -> None:
    if asked.curve not in KINDS:
        raise unknown_name("curve", asked.curve, KINDS)
    equispaced(asked.points)
    if asked.bends < 1:
        raise MicrogliaError(f"A curve has at least 1 bend; got {asked.bends}. Use the curve 'none' for the line alone.")
    if asked.recalibrate < 0 or (asked.limit is not None and asked.limit < 1):
        raise MicrogliaError(
            f"Batches are counted from 1, with recalibrate = 0 to keep stored batch-norm statistics; got recalibrate "
            f"{asked.recalibrate} and limit {asked.limit}."
        )
    if asked.plane < 0 or asked.plane == 1:
        raise MicrogliaError(f"The plane has at least 2 rows and columns, or 0 for no plane; got {asked.plane}.")
    if asked.plane and (asked.kind is None or not asked.fit.epochs):
        raise MicrogliaError(
            f"The plane goes through the trained bend of a curve; got the curve {asked.curve!r} trained for "
            f"{asked.fit.epochs} epochs. Use bezier or chain and at least 1 epoch, or no plane."
        )
    if asked.ensemble and asked.kind is None:
        raise MicrogliaError("Networks are averaged along a trained curve; got the curve 'none'. Use bezier or chain.")


def _check_apart(asked: Connecting, ends: Ends) -> None:
    if asked.plane and norm(difference(*ends.points)) == 0:
        raise MicrogliaError(
            f"{asked.targets[0]} and {asked.targets[1]} have the same weights, so no plane goes through them; give runs of "
            "different seeds, or no plane."
        )


def _recipe(asked: Connecting, ends: Ends) -> Json:
    """Returns what makes this connection: in a directory of another it is refused."""
    settings = {name: getattr(asked, name) for name in ("bends", "points", "recalibrate", "limit", "plane", "ensemble", "seed")}
    curve = {"curve": asked.curve, **({"fit": identity(asdict(asked.fit))} if asked.kind is not None else {})}
    weights = [digest(model.state_dict()) for model in ends.models]
    return {"command": "connect", "task": ends.task.name, "weights": weights, **curve, **settings}


def _connect(asked: Connecting, ends: Ends, run: Run) -> Json:
    gauge = Gauge(ends.task, recalibrate=asked.recalibrate, limit=asked.limit, seed=asked.seed)
    model, ts = ends.models[0].to(run.device), equispaced(asked.points)

    def along(name: str, path: Curve) -> Json:
        return run.stage(  # type: ignore[no-any-return]
            f"profile-{name}", lambda progress: profile(model, path.point, gauge, ts, progress=progress, title=name).to_dict()
        )

    result: Json = {
        "task": ends.task.name,
        "ends": run.stage("ends", lambda _: _as_stored(asked, ends, run)),
        "distance": norm(difference(*ends.points)),
        "notes": list(ends.notes),
        "line": along("line", ends.line),
        "curve": None,
        "below": None,
        "ensemble": None,
        "plane": None,
    }
    if asked.kind is not None:
        curve, rows = _trained(asked, ends, run, asked.kind)
        result["curve"] = {"kind": asked.curve, "bends": asked.bends, "training": rows, **along("curve", curve)}
        largest = [{name: result[path]["summary"][name]["max"] for name in METRICS} for path in ("line", "curve")]
        result["below"] = {name: largest[1][name] < largest[0][name] for name in METRICS}
        if asked.ensemble:
            averaged = equispaced(min(AVERAGED, asked.points))
            result["ensemble"] = run.stage("ensemble", lambda _: asdict(ensemble(model, curve.point, gauge, averaged)))
        if asked.plane:
            result["plane"] = run.stage("plane", lambda progress: _plane(asked, model, curve, gauge, progress))
    return result


def _as_stored(asked: Connecting, ends: Ends, run: Run) -> list[Json]:
    """Returns the metrics of both networks as they are, with the batch-norm statistics of their training."""
    gauge = Gauge(ends.task, recalibrate=0, limit=asked.limit, seed=asked.seed)
    found = []
    for target, model in zip(asked.targets, ends.models, strict=True):
        (row,) = visit_all(model.to(run.device), lambda point: point, [point_of(model)], gauge, title="ends")
        found.append({"target": str(target), **row})
    return found


def _trained(asked: Connecting, ends: Ends, run: Run, kind: Kind) -> tuple[Curve, list[Json]]:
    start = on_line(kind, *ends.points)

    def work(progress: Progress) -> Json:
        curve, rows = train_curve(
            ends.models[0],
            ends.task,
            start,
            asked.fit,
            seed=asked.seed,
            device=asked.device,
            masks=ends.masks,
            progress=progress,
            log=lambda rows: run.log("curve", rows),
        )
        return {"inner": [dict(point) for point in curve.inner], "rows": rows}

    state = run.stage("curve", work)
    return start.with_inner(state["inner"]), state["rows"]


def _plane(asked: Connecting, model: nn.Module, curve: Curve, gauge: Gauge, progress: Progress) -> Json:
    corners = (curve.points[0], curve.points[len(curve.points) // 2], curve.points[-1])
    plane = plane_through(*corners)
    axes = grid_axes(plane, corners, asked.plane)
    grid = evaluate_plane(model, plane, *axes, gauge, progress=progress)
    path = [list(plane.coordinates(curve.point(t))) for t in equispaced(asked.points)]
    places = [list(plane.coordinates(corner)) for corner in corners]
    return {**grid.to_dict(), "width": plane.width, "height": plane.height, "places": places, "path": path}


# ----------------------------------------------------------------------------------------------------------- for people
def connection_table(told: Connection) -> Table:
    """Returns the table of both paths: what each metric is at the ends, at worst, on average, and how high its barrier is."""
    length = {name: path.lengths[-1] for name, path in told.paths.items()}
    title = f"{told.task}: {', '.join(f'{name} of length {value:.3g}' for name, value in length.items())}"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0), show_edge=False)  # 80 columns are enough
    for name in ("metric", "path", "first", "last", "min", "max", "mean", "by length", "barrier"):
        table.add_column(name, justify="left" if name in ("metric", "path") else "right", no_wrap=True)
    for metric in METRICS:
        for path, profile_ in told.paths.items():
            values, found = profile_.values[metric], profile_.summary[metric]
            numbers = (values[0], values[-1], found.min, found.max, found.mean, found.integral, found.barrier)
            scale, form = (100, ".2f") if metric.endswith("error") else (1, ".4f")
            label = metric.replace("_", " ") + (", %" if metric.endswith("error") else "")
            table.add_row(label if path == "line" else "", path, *(format(scale * number, form) for number in numbers))
        table.add_section()
    table.caption = (
        "first, last: the ends, batch-norm statistics made anew; by length: mean weighted by length; barrier: largest rise "
        "above the straight interpolation of the ends' values."
    )
    return table


def sentences(told: Connection) -> list[str]:
    """Returns what there is to say beside the table."""
    said = list(told.notes)
    if told.below is not None:
        names = [name.replace("_", " ") for name, below in told.below.items() if below]
        said.append(f"The curve's largest value is below the line's in: {', '.join(names) or 'nothing'}.")
    if told.ensemble is not None:
        found = told.ensemble
        alone, pair, so_far = (f"{100 * value:.2f} %" for value in (found.alone[0], found.pair[-1], found.so_far[-1]))
        said.append(
            f"Test accuracy of the first network {alone}, averaged with the second {pair}, of all "
            f"{len(found.ts)} places {so_far}."
        )
    return said


CONNECT = register(
    Study(
        "connect",
        LISTED["connect"].sentence,
        Connecting,
        _begin,
        tables=lambda told: [connection_table(told), *sentences(told)],
        figures=figures,
        result=Connection,
        directory=lambda asked: asked.directory,
        example="microglia connect runs/a runs/b --curve bezier --plane 15",
    )
)
