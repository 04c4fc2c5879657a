"""Sensitivity: accuracy by layer and density without retraining, and the file that the scope ``sensitivity:FILE`` reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from microglia.core.errors import MicrogliaError
from microglia.core.patterns import Reduction, parse_pattern
from microglia.core.progress import progress_bar
from microglia.lab.target import open_target
from microglia.methods.config import MethodConfig
from microglia.methods.procedure import evidence
from microglia.methods.pruner import Pruner
from microglia.storage.files import digest
from microglia.storage.run import Run
from microglia.storage.sensitivity import FILE, write_sensitivity
from microglia.studies.listed import LISTED
from microglia.studies.options import Option
from microglia.studies.places import beside
from microglia.studies.result import Told
from microglia.studies.sensitivity.figures import figures
from microglia.studies.sensitivity.layers import Probe, check_densities, curves_of, estimate_of
from microglia.studies.sensitivity.result import LayerSensitivity
from microglia.studies.space.gauge import Gauge
from microglia.studies.study import Study, Work, conduct, register
from microglia.tasks.task import Split, Task
from microglia.train.engine import accelerator

Json = dict[str, Any]


@dataclass(frozen=True)
class Probing:
    """How to prune, layer by layer, and where to measure it.

    Attributes:
        target: A run directory, a saved model's directory, or a model's name.
        densities: Fractions kept of the one layer, such as 0.5,0.2,0.1; None for 0.8 down to 0.05.
        pattern: ``unstructured``, ``block:OUTxIN``, ``nm:N:M`` or ``channel``.
        score: Name of a score; see ``microglia methods``.
        reduction: How the scores of a unit's weights become one: ``mean``, ``sum``, ``max`` or ``l2``.
        layers: Selector of layers to look at; may be given again.
        exclude: Selector of layers to leave out; may be given again.
        split: ``validation``, or ``train``; never the test images, for densities are chosen by it.
        recalibrate: Training batches of 256 over which batch-norm statistics are made anew at every place; 0 for none.
        limit: Batches of 256 to look at, the same at every place; None for all.
        data: Data set instead of the run's own.
        checkpoint: Trained weights of a network by name.
        seed: Root of what ``limit`` and the score draw.
        out: Directory, where the same command goes on; None for ``sensitivity`` in the run, beside a saved model, or under
            ``runs``.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    target: Annotated[str, Option(words=("target",))]
    densities: Annotated[tuple[float, ...] | None, Option(example="0.5,0.2,0.1", kind="fractions")] = None
    pattern: str = "unstructured"
    score: str = "magnitude"
    reduction: Reduction = "mean"
    layers: Annotated[tuple[str, ...], Option(repeated=True)] = ("*",)
    exclude: Annotated[tuple[str, ...], Option(repeated=True)] = ()
    split: Split = "validation"
    recalibrate: int = 0
    limit: int | None = None
    data: str | None = None
    checkpoint: str | None = None
    seed: int = 0
    out: Path | None = None
    device: str = "auto"

    @property
    def directory(self) -> Path:
        """Where everything goes."""
        return self.out or beside(self.target, "sensitivity", self.data)


def measure_sensitivity(asked: Probing) -> Told[LayerSensitivity]:
    """Measures a network with each layer alone pruned to each density; draws it, and writes the file for the scope.

    Every layer is kept as it is done, and within a layer every density: the same call goes on after it was interrupted.

    The result holds ``task``, ``split``, ``metric`` (the headline), ``unit``, ``better``, ``densities``, ``dense`` (metrics of
    the network as it is), ``layers`` (``layer``, ``size``, ``places``: ``density``, ``kept``, metrics), ``file``, ``notes``,
    ``pictures`` and the settings. A value that is not finite is None.

    Raises:
        MicrogliaError: The target or a setting is not as it should be.
    """
    return conduct(SENSITIVITY, asked)


def _begin(asked: Probing) -> Work[Json]:
    densities = _checked(asked)
    model, task = open_target(asked.target, asked.data, asked.checkpoint)
    device = accelerator(asked.device).device
    model.to(device).eval()
    config = _config(asked)
    pruner = Pruner(model, config)

    def measure(run: Run) -> Json:
        gauge = Gauge(task, (asked.split,), recalibrate=asked.recalibrate, limit=asked.limit, seed=asked.seed)
        values = pruner.score(model, pruner.layers, evidence(task, run, config))
        return _measured(asked, task, run, Probe(model, pruner, values, densities, gauge))

    return Work(measure, _record(asked, task, digest(model.state_dict()), densities), asked.seed, device.type)


def _checked(asked: Probing) -> tuple[float, ...]:
    if asked.split not in ("validation", "train"):
        raise MicrogliaError(
            f"The split is validation or train, and not {asked.split}: densities are chosen by it, and test images stay unseen."
        )
    if asked.limit is not None and asked.limit < 1:
        raise MicrogliaError(f"The limit is a number of batches of at least 1; got {asked.limit}.")
    if asked.recalibrate < 0:
        raise MicrogliaError(f"recalibrate is a number of batches, 0 for none; got {asked.recalibrate}.")
    return check_densities(asked.densities, parse_pattern(asked.pattern))


def _config(asked: Probing) -> MethodConfig:
    """Returns the config of a pruner of all layers that keeps everything: it checks the layers, the pattern and the score."""
    return MethodConfig(
        density=parse_pattern(asked.pattern).fixed_density or 1.0,
        pattern=asked.pattern,
        score=asked.score,
        reduction=asked.reduction,
        layers=asked.layers,
        exclude=asked.exclude,
    )


def _record(asked: Probing, task: Task, weights: str, densities: tuple[float, ...]) -> Json:
    """Returns what makes a study this one: a directory of another is refused, layers of two networks are never mixed."""
    names = ("pattern", "score", "reduction", "layers", "exclude", "split", "recalibrate", "limit", "seed")
    return {
        "command": "sensitivity",
        "task": task.name,
        "weights": weights,
        "densities": list(densities),
        **{name: getattr(asked, name) for name in names},
    }


def _measured(asked: Probing, task: Task, run: Run, probe: Probe) -> Json:
    sizes = {name: layer.raw.numel() for name, layer in probe.pruner.layers.items()}
    dense = run.stage("dense", lambda _: probe.dense())
    if not dense:
        raise MicrogliaError(f"{task.name} has no {asked.split} examples; give a split that it has, validation or train.")
    layers: list[Json] = []
    with progress_bar("sensitivity", total=len(sizes)) as bar:
        for number, name in enumerate(sizes):
            places = run.stage(f"layer-{number:03d}", lambda progress, name=name: probe.layer(name, progress))  # type: ignore[misc]
            layers.append({"layer": name, "size": sizes[name], "places": places})
            bar.advance()
    file = asked.directory / FILE
    notes = {"task": task.name, "pattern": asked.pattern, "score": asked.score, "metric": estimate_of(task, dense)}
    write_sensitivity(file, curves_of(task, dense, sizes, layers), **notes)
    metric = task.metrics[task.headline]
    seen = asked.split == "train" or task.pretrained
    return {
        **run.recipe,
        "metric": task.headline,
        "unit": metric.unit,
        "better": metric.better,
        "dense": _finite(dense),
        "layers": [{**row, "places": [_finite(place) for place in row["places"]]} for row in layers],
        "file": str(file),
        "notes": ["The network may have been trained on these examples: all values may be too good."] if seen else [],
    }


def _finite(values: Mapping[str, float]) -> Json:
    """JSON has no word for a value that is no finite number."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


# ----------------------------------------------------------------------------------------------------------- for people
def sensitivity_table(told: LayerSensitivity) -> Table:
    """Returns the headline by layer and density."""
    table = Table("layer", title=f"{told.task}: {told.split} {told.metric}")
    table.add_column("weights", justify="right")
    for density in told.densities:
        table.add_column(f"{density:g}", justify="right")
    for row in told.layers:
        cells = [_cell(place.metrics[told.metric], told.unit) for place in row.places]
        table.add_row(row.layer.removesuffix(".weight"), f"{row.size:,}", *cells)
    dense = _cell(told.dense[told.metric], told.unit)
    per_cent = ", in %" if told.unit == "%" else ""
    table.caption = (
        f"{told.metric.capitalize()}{per_cent}: one layer pruned to each density, the others dense, no retraining. "
        f"Before: {dense}."
    )
    return table


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f}" if unit == "%" else f"{value:.4g}"


SENSITIVITY = register(
    Study(
        "sensitivity",
        LISTED["sensitivity"].sentence,
        Probing,
        _begin,
        tables=lambda told: [sensitivity_table(told), *told.notes, f"Scope: sensitivity:{told.file}"],
        figures=figures,
        result=LayerSensitivity,
        directory=lambda asked: asked.directory,
        example="microglia sensitivity runs/a --densities 0.5,0.2,0.1",
    )
)
