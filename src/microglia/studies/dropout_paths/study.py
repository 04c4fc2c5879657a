"""A path of low loss between two networks that is built, not trained, beside the straight line and what theory promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from microglia.core.errors import MicrogliaError
from microglia.report.chart import COLORS, Axis, Chart, Line, Look, Panel, Rule
from microglia.storage.files import digest
from microglia.storage.run import Progress, Run
from microglia.studies.connect.ends import Ends, open_ends
from microglia.studies.dropout_paths.dropout_stability import NetworkGauge, best_keep_sets, best_rescale, examine_path
from microglia.studies.dropout_paths.result import PathComparison
from microglia.studies.dropout_paths.unit_chain import between, network_of
from microglia.studies.dropout_paths.unit_trace import unit_chain
from microglia.studies.listed import LISTED
from microglia.studies.options import Option
from microglia.studies.places import under_runs
from microglia.studies.result import Told
from microglia.studies.space.curves import equispaced
from microglia.studies.space.gauge import Gauge
from microglia.studies.study import Figure, Study, Work, conduct, register
from microglia.tasks.task import Split
from microglia.train.engine import accelerator

LINE = 41
"""Places of the straight line."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Building:
    """Which networks to join, and how closely to look.

    Attributes:
        targets: Run directories or saved models' of one chain of layers, such as lenet-300-100, on the same data.
        tries: Draws of the units to keep; the best of them is taken layer by layer.
        rescale: Whether the best factor of what kept units give is searched for; else it is all units over kept ones.
        points: Places of each segment at which the loss is measured.
        limit: Batches of 256 to look at, the same everywhere; None for all.
        split: Part of the data, without augmentation: ``train``, ``validation`` or ``test``.
        data: Data set instead of the runs' own.
        seed: Root of the draws.
        out: Directory, where the same command goes on; None for one of its own under ``runs``.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    targets: Annotated[tuple[str, str], Option(words=("run_a", "run_b"))]
    tries: Annotated[int, Option(least=1)] = 10
    rescale: bool = False
    points: Annotated[int, Option(least=1)] = 5
    limit: int | None = None
    split: Split = "train"
    data: str | None = None
    seed: int = 0
    out: Path | None = None
    device: str = "auto"

    @property
    def directory(self) -> Path:
        """Where everything goes: the same command, the same directory."""
        names = [Path(target).resolve().name for target in self.targets]
        places = [str(Path(target).resolve()) for target in self.targets]
        own = {**asdict(self), "targets": places, "device": None, "out": None}
        return self.out or under_runs(f"dropout-path-{names[0]}-{names[1]}", own)


def view_dropout_path(asked: Building) -> Told[PathComparison]:
    """Builds the path between two networks through networks with dropped units, measures it and draws it.

    Batch norm keeps the statistics of the networks, which move with their units. The result holds:

    - ``task``, ``split``, ``targets``, ``notes`` and ``pictures``;
    - ``hidden``, the units of each hidden layer, and ``rescale`` of both networks (None for all units over kept ones);
    - ``path``, see `microglia.studies.dropout_paths.dropout_stability.examine_path`;
    - ``line``: ``ts``, ``loss``, ``maximum`` and ``barrier`` of the straight line.

    Source: Kuditipudi et al. 2019, theorem 1; survey 2.2.

    Raises:
        MicrogliaError: A target is none, the networks differ, or they are no chain of layers.
    """
    return conduct(DROPOUT_PATH, asked)


def _begin(asked: Building) -> Work[Json]:
    if asked.limit is not None and asked.limit < 1:
        raise MicrogliaError(f"The limit is a number of batches of at least 1; got {asked.limit}.")
    device = accelerator(asked.device).device
    ends = open_ends(asked.targets, asked.data)
    unit_chain(ends.models[0], ends.task.example)  # what is no chain shows before anything is written
    settings = {name: getattr(asked, name) for name in ("tries", "rescale", "points", "limit", "split", "seed")}
    weights = [digest(model.state_dict()) for model in ends.models]
    record = {"command": "dropout-path", "task": ends.task.name, "weights": weights, **settings}
    return Work(lambda run: _measure(asked, ends, run), record, asked.seed, device.type)


def _measure(asked: Building, ends: Ends, run: Run) -> Json:
    chain = unit_chain(ends.models[0], ends.task.example)
    one, other = (network_of(model.to(run.device), chain) for model in ends.models)
    gauge = Gauge(ends.task, (asked.split,), recalibrate=0, limit=asked.limit, seed=asked.seed)
    measuring = NetworkGauge(ends.models[0], chain, lambda model: gauge(model)[f"{asked.split}_loss"])

    def kept(number: int, progress: Progress) -> Json:
        network, seed = (one, other)[number], 2 * asked.seed + number
        keep = best_keep_sets(measuring, network, tries=asked.tries, seed=seed)
        return {"keep": keep, "factor": best_rescale(measuring, network, keep) if asked.rescale else None}

    first, second = (run.stage(f"keep-{number}", partial(kept, number)) for number in (0, 1))
    keeps, factors = (first["keep"], second["keep"]), (first["factor"], second["factor"])
    rescale = factors if asked.rescale else None
    path = run.stage("path", lambda _: examine_path(measuring, (one, other), keeps, rescale=rescale, points=asked.points))
    ts = equispaced(LINE)
    loss = run.stage("line", lambda _: {"loss": [measuring(between(one, other, t)) for t in ts]})["loss"]
    return {
        "task": ends.task.name,
        "split": asked.split,
        "targets": list(asked.targets),
        "hidden": list(chain.hidden),
        "rescale": list(factors),
        "notes": [note for note in ends.notes if ends.masks is None],  # the path leaves masks that both have
        "path": path,
        "line": {"ts": ts, "loss": loss, "maximum": max(loss), "barrier": max(loss) - max(loss[0], loss[-1])},
    }


def figures(told: PathComparison) -> list[Figure]:
    """Returns the losses along the built path and the straight line."""
    rows = [{"path": "built", "place": place, "loss": loss} for place, loss in zip(*_built(told), strict=True)]
    rows += [{"path": "line", "place": place, "loss": loss} for place, loss in zip(*_straight(told), strict=True)]
    return [Figure("loss", path_chart(told), rows, told)]


def _built(told: PathComparison) -> tuple[Sequence[float], Sequence[float]]:
    rows = told.path.rows
    return [(row.segment + row.share) / told.path.segments for row in rows], [row.loss for row in rows]


def _straight(told: PathComparison) -> tuple[Sequence[float], Sequence[float]]:
    return told.line.ts, told.line.loss


def path_chart(told: PathComparison) -> Chart:
    """Returns the loss along both paths, every segment as long as any other, and the bound as a rule."""
    lines = [
        Line("built path", *_built(told), look=Look(COLORS[0], "circle", size=3)),
        Line("straight line", *_straight(told), look=Look(COLORS[1], dash="dash")),
    ]
    bound = Rule(told.path.bound, "bound of theorem 1", label="bound of theorem 1")
    names = " to ".join(Path(target).name for target in told.targets)
    panel = Panel(Axis("place on the path"), Axis(f"{told.split} loss (nats)", limits=(0, None)), lines, [bound])
    return Chart(f"{told.task}\nfrom {names}, {told.path.segments} segments", [panel], legend=3)


# ----------------------------------------------------------------------------------------------------------- for people
def stability_table(told: PathComparison) -> Table:
    """Returns the table of how much dropped units cost each network."""
    path = told.path
    table = Table(title=f"{told.task}: {told.split} loss with half of the units of some layers dropped")
    for name in ("network", "loss", *(f"from hidden layer {n + 1} on" for n in range(len(told.hidden))), "epsilon"):
        table.add_column(name, justify="left" if name == "network" else "right")
    for number, target in enumerate(told.targets):
        losses = (path.ends[number], *path.dropped[number], path.epsilon[number])
        table.add_row(Path(target).name, *(f"{loss:.4f}" for loss in losses))
    table.caption = "Epsilon: largest rise by dropped units."
    return table


def sentences(told: PathComparison) -> list[str]:
    """Returns what there is to say beside the table."""
    path, line = told.path, told.line
    return [
        *told.notes,
        f"The built path of {path.segments} segments has a loss of at most {path.maximum:.4f}, where theorem 1 promises "
        f"{path.bound:.4f}; the straight line reaches {line.maximum:.4f}.",
        f"Above the worse end the path rises by {path.barrier:.4f}, the straight line by {line.barrier:.4f}.",
    ]


DROPOUT_PATH = register(
    Study(
        "dropout-path",
        LISTED["dropout-path"].sentence,
        Building,
        _begin,
        tables=lambda told: [stability_table(told), *sentences(told)],
        figures=figures,
        result=PathComparison,
        directory=lambda asked: asked.directory,
        example="microglia dropout-path runs/a runs/b --tries 10",
    )
)
