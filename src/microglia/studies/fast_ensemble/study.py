"""Fast geometric ensembling of a trained network: every member beside the ensemble of all so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from microglia.lab.target import open_target
from microglia.report.chart import COLORS, Axis, Chart, Line, Look, Panel, Rule
from microglia.storage.files import digest
from microglia.storage.run import Progress, Run
from microglia.studies.fast_ensemble.result import FastEnsemble
from microglia.studies.listed import LISTED
from microglia.studies.options import Option
from microglia.studies.places import beside
from microglia.studies.result import Told
from microglia.studies.space.ensembling import Averaged, Cycles, fast_ensemble, probabilities
from microglia.studies.study import Figure, Study, Work, conduct, register
from microglia.train.engine import accelerator
from microglia.train.optim import FitConfig, identity

TRAINING = FitConfig(weight_decay=5e-4)
PARTS = {"batches": "max_batches", "batch_size": "batch_size", "momentum": "momentum", "weight_decay": "weight_decay"}
PLACES = 20
"""Learning rates drawn for each epoch."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Ensembling:
    """Which network to train on, and in which cycles.

    Attributes:
        target: A run directory, a saved model's directory, or a model's name with --checkpoint; best trained for about 80 % of
            a usual training.
        cycles: How the learning rate goes up and down.
        fit: Training within the cycles.
        data: Data set instead of the run's own.
        checkpoint: Trained weights of a network by name.
        seed: Root of the order of the data.
        out: Directory, where the same command goes on; None for ``fast-ensemble`` in the run, beside a saved model, or under
            ``runs``.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    target: Annotated[str, Option(words=("target",))]
    cycles: Annotated[Cycles, Option(parts={name: name for name in Cycles.__dataclass_fields__})] = field(
        default_factory=Cycles
    )
    fit: Annotated[FitConfig, Option(parts=PARTS)] = field(default_factory=lambda: TRAINING)
    data: str | None = None
    checkpoint: str | None = None
    seed: int = 0
    out: Path | None = None
    device: str = "auto"

    @property
    def directory(self) -> Path:
        """Where everything goes."""
        return self.out or beside(self.target, "fast-ensemble", self.data)


def view_fast_ensemble(asked: Ensembling) -> Told[FastEnsemble]:
    """Trains a network on in cycles, draws the accuracy of its members and of their ensemble, and returns both, JSON-ready.

    The result holds ``task``, ``target``, ``cycles``, ``start`` (test accuracy before), ``members`` (``member``, ``epoch``,
    ``loss``, ``accuracy`` alone, ``ensemble`` of all so far, ``seconds``) and ``pictures``. Masks stay.

    Source: Garipov et al. 2018, section 4; survey 2.1.

    Raises:
        MicrogliaError: The target is none, the task is no classification, or a setting is not as it should be.
    """
    return conduct(FAST_ENSEMBLE, asked)


def _begin(asked: Ensembling) -> Work[Json]:
    device = accelerator(asked.device).device
    model, task = open_target(asked.target, asked.data, asked.checkpoint)
    start = Averaged().add(*probabilities(model.to(device), task)).accuracy
    record = {"command": "fast-ensemble", "task": task.name, "weights": digest(model.state_dict()), "seed": asked.seed}
    record |= {"cycles": asdict(asked.cycles), "fit": identity(asdict(asked.fit))}

    def work(progress: Progress) -> Json:
        rows, _ = fast_ensemble(model, task, asked.fit, asked.cycles, seed=asked.seed, device=asked.device, progress=progress)
        return {"rows": rows}

    def measure(run: Run) -> Json:
        rows = run.stage("ensemble", work)["rows"]
        return {
            "task": task.name,
            "target": asked.target,
            "cycles": asdict(asked.cycles),
            "start": start,
            "members": rows,
        }

    return Work(measure, record, asked.seed, device.type)


def figures(told: FastEnsemble) -> list[Figure]:
    """Returns accuracy and learning rate over the epochs."""
    return [Figure("members", ensemble_chart(told), told.members, told)]


def ensemble_chart(told: FastEnsemble) -> Chart:
    """Returns the accuracy of every member and of the ensemble so far, beside the learning rate.

    Source: Garipov et al. 2018, figure 4.
    """
    epochs, cycles = [row.epoch for row in told.members], told.cycles
    lines = [
        Line(name, epochs, [100 * getattr(row, key) for row in told.members], look=look)
        for name, key, look in (
            ("ensemble of all so far", "ensemble", Look(COLORS[1], "square")),
            ("member alone", "accuracy", Look(COLORS[0], "circle", "dash")),
        )
    ]
    start = Rule(100 * told.start, "before", label="before")
    times = [number / PLACES for number in range(cycles.epochs * PLACES + 1)]
    rates = [cycles.rate(int(time), time - int(time)) for time in times]
    panels = [
        Panel(Axis("epoch", whole=True), Axis("test accuracy (%)", unit=" %"), lines, [start]),
        Panel(Axis("epoch", whole=True), Axis("learning rate", limits=(0, None)), [Line("", times, rates)]),
    ]
    return Chart(f"{told.task}: fast geometric ensembling", panels, columns=2, size=(11, 4.6), legend=3)


# ----------------------------------------------------------------------------------------------------------- for people
def ensemble_table(told: FastEnsemble) -> Table:
    """Returns the table of all members."""
    table = Table(title=f"{told.task}: fast geometric ensembling, test accuracy (%)")
    for name in ("member", "epoch", "alone", "ensemble of all so far"):
        table.add_column(name, justify="right")
    for row in told.members:
        numbers = (f"{100 * getattr(row, key):.2f}" for key in ("accuracy", "ensemble"))
        table.add_row(str(row.member), str(row.epoch), *numbers)
    table.caption = f"Before: {100 * told.start:.2f} %."
    return table


FAST_ENSEMBLE = register(
    Study(
        "fast-ensemble",
        LISTED["fast-ensemble"].sentence,
        Ensembling,
        _begin,
        tables=lambda told: [ensemble_table(told)],
        figures=figures,
        result=FastEnsemble,
        directory=lambda asked: asked.directory,
        example="microglia fast-ensemble runs/a --members 5 --high 0.05 --low 0.01",
    )
)
