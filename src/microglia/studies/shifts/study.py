"""The cost of shifted images: accuracy and operations of finished models on test images of worse cameras."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.table import Table
from torch import Tensor, nn

from microglia.core.devices import device_of
from microglia.core.errors import MicrogliaError
from microglia.data import ImageData, ImageSet
from microglia.data.shifts import SHIFTS, check_severity, shifted
from microglia.dynamic import Counter, record
from microglia.dynamic.routes import agreement
from microglia.lab.target import open_target
from microglia.measure import count_macs
from microglia.storage.changes import changes_of
from microglia.studies.images import image_data
from microglia.studies.listed import LISTED
from microglia.studies.options import Option
from microglia.studies.result import Told
from microglia.studies.routes.study import counter_of
from microglia.studies.shifts.figures import CLEAN, figures
from microglia.studies.shifts.result import Condition, Shifts
from microglia.studies.study import Study, Work, conduct, register
from microglia.tasks.classification import ImageSource
from microglia.tasks.task import Task
from microglia.train.engine import accelerator
from microglia.train.evaluate import evaluate

SEED = 0
"""Root of the noise and of the choice of images: every run sees the same."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Shifting:
    """Which models to evaluate, and under which shifts.

    Attributes:
        targets: Runs, saved models or names of networks, on the same data.
        severities: How strong every shift is, each from 1 (mild) to 5.
        limit: Test images to use, drawn once for all; None for all.
        data: Data set instead of the runs' own.
        checkpoint: Trained weights of a network by name.
        device: ``cpu``, ``cuda`` or ``auto``.
        out: Directory of the figure; None for no figure.
    """

    targets: Annotated[Sequence[str], Option(words=("targets",))]
    severities: Annotated[Sequence[int], Option(name="severity")] = (1, 3, 5)
    limit: int | None = None
    data: str | None = None
    checkpoint: str | None = None
    device: str = "auto"
    out: Path | None = None


@dataclass(frozen=True)
class Contender:
    """One of the models.

    Attributes:
        name: In the table, unique.
        target: As it was given.
        model: In evaluation mode.
        task: Its task, whose images are replaced by shifted ones.
        counter: Counter of a gated model's operations; None for any other model.
        macs: Multiply-accumulates of the kept weights over those of the dense network; 0 for a gated model.
    """

    name: str
    target: str
    model: nn.Module
    task: Task
    counter: Counter | None
    macs: float

    def on(self, images: ImageSet) -> Json:
        """Returns accuracy, fraction of the dense operations, and of a gated model the masks' agreement with their targets."""
        data = ImageSource(replace(image_data(self.task), test=images))
        task = replace(self.task, data=data)
        if self.counter is None:
            return {"accuracy": evaluate(self.model, task)["accuracy"], "macs": {"mean": self.macs, "std": 0.0}}
        outputs: list[Tensor] = []  # of the same forward passes that are recorded
        handle = self.model.register_forward_hook(lambda module, args, output: outputs.append(output.cpu()))
        try:
            routes = record(self.model, data.batches("test", 256).epoch(0), device_of(self.model))
        finally:
            handle.remove()
        metric, costs = task.metrics["accuracy"], self.counter(routes.masks)
        left = costs.honest / costs.dense
        both = [torch.cat([part.flatten() for part in each.values()]) for each in (routes.masks, routes.targets)]
        return {
            "accuracy": metric.values("accuracy", metric.update(None, torch.cat(outputs), routes.labels))["accuracy"],
            "macs": {"mean": float(left.mean()), "std": float(left.std(correction=0))},
            "agreement": agreement(*both),
        }


def compare_shifts(asked: Shifting) -> Told[Shifts]:
    """Evaluates models on clean and on shifted test images.

    Returns:
        ``data``, ``inputs``, ``pictures`` and ``runs``. Each run has ``run`` (as given), ``name``, ``dynamic`` and
        ``results``: one for the clean images (severity 0), and one for each shift and severity. A result has ``shift``,
        ``severity``, ``accuracy`` and ``macs``: ``mean`` and ``std`` over inputs, as fractions of the dense network's, heads
        of gates included. A gated model also has ``agreement``: of its masks with the targets.

    Raises:
        MicrogliaError: A target is none, they have different test images, or a number is out of range.
    """
    return conduct(SHIFTED, asked)


def _begin(asked: Shifting) -> Work[Json]:
    _check(asked)
    contenders = [_open(asked, target, name) for target, name in zip(asked.targets, _names(asked.targets), strict=True)]
    data = _common(contenders)
    images = data.test
    if asked.limit is not None and asked.limit < len(images):  # drawn, for folders are in the order of their classes
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))[: asked.limit]
        images = images.subset(chosen.sort().values)
    return Work(lambda run: _compare(asked, contenders, data.name, images))


def _compare(asked: Shifting, contenders: Sequence[Contender], data: str, images: ImageSet) -> Json:
    results: list[list[Json]] = [[] for _ in contenders]
    for shift, severity, changed in _conditions(images, asked.severities):
        for contender, found in zip(contenders, results, strict=True):
            found.append({"shift": shift, "severity": severity, **contender.on(changed)})
    runs = [
        {"run": c.target, "name": c.name, "dynamic": c.counter is not None, "results": found}
        for c, found in zip(contenders, results, strict=True)
    ]
    return {"data": data, "inputs": len(images), "runs": runs}


def _check(asked: Shifting) -> None:
    if not asked.targets or not asked.severities:
        raise MicrogliaError("Name at least one run, and one severity from 1 to 5.")
    for severity in asked.severities:
        check_severity(severity)
    if asked.limit is not None and asked.limit < 1:
        raise MicrogliaError(f"The limit is a number of test images, at least 1; got {asked.limit}.")


def _conditions(images: ImageSet, severities: Sequence[int]) -> Iterator[tuple[str, int, ImageSet]]:
    """Yields (shift, severity, images): first the clean ones, then each shift from mild to strong."""
    yield CLEAN, 0, images
    for name in SHIFTS:
        for severity in sorted(set(severities)):
            yield name, severity, replace(images, images=shifted(images.images, name, severity, SEED))


def _open(asked: Shifting, target: str, name: str) -> Contender:
    model, task = open_target(target, asked.data, asked.checkpoint)
    gated = any(done.kind.chooses for done in changes_of(model).values())
    counter = counter_of(model, task, target) if gated else None
    macs = 0.0 if gated else count_macs(model, task.example).effective / count_macs(task.build(), task.example).total
    model = model.to(accelerator(asked.device).device).eval()
    return Contender(name, target, model, task, counter, macs)


def _names(targets: Sequence[str]) -> list[str]:
    """Returns the last part of each target, or all of it where two would be the same."""
    short = [Path(target).resolve().name if Path(target).exists() else target for target in targets]
    often = Tally(short)
    return [name if often[name] == 1 else target for name, target in zip(short, targets, strict=True)]


def _common(contenders: Sequence[Contender]) -> ImageData:
    """Returns the data of the first, after a check that all have its test images."""
    first = image_data(contenders[0].task)
    for other in contenders[1:]:
        data = image_data(other.task)
        if data.test.images.shape != first.test.images.shape or not torch.equal(data.test.images, first.test.images):
            raise MicrogliaError(
                f"{contenders[0].target} and {other.target} have different test images ({first.name} and {data.name}), so "
                "they cannot stand in one table; give runs on the same data, or --data."
            )
    return first


# ----------------------------------------------------------------------------------------------------------- for people
def shifts_table(compared: Shifts) -> Table:
    """Returns the table of all conditions, a column for each run."""
    runs = compared.runs
    table = Table("images", title=f"{compared.data}: {compared.inputs:,} test images, clean and shifted")
    for run in runs:
        table.add_column(run.name, justify="right")
    for number, first in enumerate(runs[0].results):
        label = CLEAN if first.shift == CLEAN else f"{first.shift} {first.severity}"
        table.add_row(label, *(_cell([run.results[number]]) for run in runs))
    table.add_section()
    table.add_row("mean of the shifts", *(_cell(run.results[1:]) for run in runs))
    table.caption = (
        "Accuracy in %; in brackets multiply-accumulates in % of the dense network: of gated models the mean over the inputs, "
        "heads included; of others those of the kept weights. Severities 1 (mild) to 5."
    )
    return table


def _cell(results: Sequence[Condition]) -> str:
    accuracy = sum(r.accuracy for r in results) / len(results)
    macs = sum(r.macs.mean for r in results) / len(results)
    return f"{100 * accuracy:.2f} ({100 * macs:.1f})"


SHIFTED = register(
    Study(
        "shifts",
        LISTED["shifts"].sentence,
        Shifting,
        _begin,
        tables=lambda compared: [shifts_table(compared)],
        figures=figures,
        result=Shifts,
        example="microglia shifts runs/dense runs/gated --severity 1,3,5 --out runs/shifts",
    )
)
