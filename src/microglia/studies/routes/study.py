"""The routes of a finished gated model: which filters each input of a split used, as tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from microglia.core.devices import device_of
from microglia.core.errors import MicrogliaError
from microglia.core.registry import unknown_name
from microglia.core.running import twin
from microglia.dynamic import (
    Counter,
    Flow,
    detach_gates,
    frequencies,
    gate_plan,
    gates_of,
    record,
    statistics,
)
from microglia.lab.target import open_target
from microglia.methods import methods
from microglia.storage.run import read_json
from microglia.studies.images import image_data
from microglia.studies.listed import LISTED
from microglia.studies.options import Option
from microglia.studies.places import beside, run_of
from microglia.studies.result import Told, decode
from microglia.studies.routes.figures import Used, class_chart, core_chart, heat_chart
from microglia.studies.routes.heat import Heat, heat_maps
from microglia.studies.routes.result import RouteStatistics
from microglia.studies.study import Figure, Study, Work, conduct, register
from microglia.tasks.task import Split, Task
from microglia.train.engine import accelerator

Json = dict[str, Any]


@dataclass(frozen=True)
class Viewing:
    """Which model to look at, and on which inputs.

    Attributes:
        target: A run that made a gated model, or a saved gated model's directory.
        split: Part of the data whose inputs are sent through: ``train``, ``validation`` or ``test``.
        data: Data set instead of the run's own.
        out: Directory of the pictures; None for ``routes`` in the run, or beside a saved model.
        layer: Gated convolution whose heat maps are drawn; None for the one at two thirds of the depth.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    target: Annotated[str, Option(words=("target",))]
    split: Split = "test"
    data: str | None = None
    out: Path | None = None
    layer: str | None = None
    device: str = "auto"

    @property
    def directory(self) -> Path:
        """Where the pictures go."""
        return self.out or beside(self.target, "routes", self.data)


@dataclass(frozen=True)
class Routes:
    """The routes of a split.

    Attributes:
        told: The numbers; see `view_routes`.
        heat: Heat maps of some images.
        used: How often each class uses each filter of the layer of the largest diversity.
    """

    told: RouteStatistics
    heat: Heat
    used: Used


def view_routes(asked: Viewing) -> Told[RouteStatistics]:
    """Records the routes of a split through a gated model, draws them and returns what they tell.

    The result is that of `microglia.dynamic.statistics`, with ``task``, ``split``, ``estimate`` (``r``, ``honest`` and
    ``paper`` as predicted before the training; None without a run), ``heat`` (``layer``,
    ``cosine`` and ``correlation`` of each image drawn) and ``pictures``.

    Raises:
        MicrogliaError: There is no finished gated model, the split is empty, or no gate has the layer asked for.
    """
    return conduct(ROUTES, asked)


def _begin(asked: Viewing) -> Work[Routes]:
    model, task = open_target(asked.target, asked.data)
    counter = counter_of(model, task, asked.target)
    data = image_data(task)
    if not len(getattr(data, asked.split)):
        raise MicrogliaError(f"The {asked.split} split of {data.name} has no images; ask for another --split.")
    layer = _layer(model, asked.layer)
    device = accelerator(asked.device).device
    model.to(device).eval()
    return Work(lambda run: _routes(asked, model, task, counter, layer))


def _routes(asked: Viewing, model: nn.Module, task: Task, counter: Counter, layer: str) -> Routes:
    data, device = image_data(task), device_of(model)
    routes = record(model, task.data.batches(asked.split, 256).epoch(0), device)
    told = statistics(routes, counter)
    heat = heat_maps(model, data, asked.split, layer, device)
    widest = max(told["layers"], key=lambda row: row["diversity"])["layer"]
    result = {
        "task": task.name,
        "split": asked.split,
        **told,
        "estimate": _estimate(run_of(asked.target)),
        "heat": {"layer": layer, "cosine": heat.cosine.tolist(), "correlation": heat.correlation.tolist()},
    }
    return Routes(decode(RouteStatistics, result), heat, (widest, frequencies(routes)[widest], data.classes))


def figures(found: Routes) -> list[Figure]:
    """Returns the figures of routes, named after the split; pictures alone."""
    told = found.told
    title = f"{told.task}, {told.split} split"
    charts = {
        "core": core_chart(told.layers, title),
        "heat": heat_chart(found.heat, title),
        "classes": class_chart(found.used, title),
    }
    return [Figure(name, chart, slug=told.split) for name, chart in charts.items()]


def counter_of(model: nn.Module, task: Task, target: str) -> Counter:
    """Returns the counter of a gated model's operations.

    Raises:
        MicrogliaError: The model has no gates.
    """
    plan = gate_plan(model)
    if plan is None:
        able = " or ".join(f"--method {name}" for name, one in methods.items() if "gated" in one.config.takes.patterns.values())
        raise MicrogliaError(
            f"The model {target} has no gates, so every input takes the same route. Routes are those of a run with "
            f"{able}; see `microglia methods`."
        )
    plain = detach_gates(twin(model)).eval()
    return Counter(plain, Flow(plain, task.example), plan, task.example)


def _layer(model: nn.Module, asked: str | None) -> str:
    layers = list(gates_of(model))
    if asked is not None and asked not in layers:
        raise unknown_name("gated layer", asked, layers)
    return asked or layers[2 * len(layers) // 3]


def _estimate(run: Path | None) -> Json | None:
    result = None if run is None else run / "result.json"
    found = read_json(result).get("estimate") if result is not None and result.is_file() else None
    return None if not found else {key: found.get(key) for key in ("r", "honest", "paper")}


# ----------------------------------------------------------------------------------------------------------- for people
def layer_table(told: RouteStatistics) -> Table:
    """Returns the table of what each layer's gate does, narrow enough for 80 columns."""
    title = f"{told.task}: routes of {told.inputs:,} inputs, {told.split} split"
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("layer", no_wrap=True, overflow="fold")
    for name in ("all", "kept, %", "core", "dead", "diver-\nsity", "MACs,\n%", "preci-\nsion", "recall", "with-\nin", "across"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in told.layers:
        table.add_row(
            row.layer,
            str(row.filters),
            f"{100 * row.kept:.1f}±{100 * row.std:.1f}",
            str(row.core),
            str(row.dead),
            f"{row.diversity:.2f}",
            f"{100 * row.macs:.1f}",
            *("-" if value is None else f"{value:.2f}" for value in (row.precision, row.recall, row.within, row.across)),
        )
    table.caption = (
        "all: filters; kept: mean ± standard deviation over inputs; core: kept for every input; dead: for none; diversity: "
        "1 - core / mean kept; MACs: computed, of the layer's own; precision and recall: of the masks against the layer's "
        "targets; within and across: overlap (Jaccard) of the masks of two inputs of one class, and of two."
    )
    return table


def summary_table(told: RouteStatistics) -> Table:
    """Returns the table of what all inputs cost, by both counts, beside what was predicted before the training."""
    table = Table("multiply-accumulates, % of dense", title=f"{told.dense:,} multiply-accumulates dense")
    for name in ("mean", "std", "min", "max", "predicted"):
        table.add_column(name, justify="right")
    expected = told.estimate
    for label, found, predicted in (
        ("honest: all that is computed", told.honest, None if expected is None else expected.honest),
        ("paper: heads free", told.paper, None if expected is None else expected.paper),
    ):
        values = [found.mean, found.std, found.min, found.max, predicted]
        table.add_row(label, *("-" if value is None else f"{100 * value:.2f}" for value in values))
    agreement = ", ".join(f"{name} {value:.3f}" for name, value in told.agreement.items())
    table.caption = (
        f"Heads: {100 * told.heads / told.dense:.2f} % of dense. Masks against targets: {agreement}.\n"
        f"{told.inputs:,} inputs took {told.routes:,} distinct routes with {told.signatures:,} signatures "
        "(counts of filters by layer)."
    )
    return table


ROUTES = register(
    Study(
        "routes",
        LISTED["routes"].sentence,
        Viewing,
        _begin,
        tables=lambda told: [layer_table(told), summary_table(told)],
        figures=figures,
        result=RouteStatistics,
        told=lambda found: found.told,
        directory=lambda asked: asked.directory,
        example="microglia routes runs/gated",
    )
)
