"""The routes of a finished gated model: which filters each input of a split used, as tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.errors import MicrogliaError
from microglia.core.registry import unknown_name
from microglia.core.running import twin
from microglia.data import ImageData
from microglia.dynamic import (
    Counter,
    Flow,
    Passage,
    detach_gates,
    frequencies,
    gate_plan,
    gates_of,
    listening,
    record,
    statistics,
)
from microglia.lab.target import open_target
from microglia.storage.run import read_json
from microglia.tasks.classification import ImageSource
from microglia.tasks.task import Split, Task
from microglia.train.engine import accelerator

SHOWN = 6
"""Images whose heat maps are drawn, each of another class."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Viewing:
    """What to look at.

    Attributes:
        target: A run, or a directory that `save` wrote.
        split: Of the data, whose inputs are sent through.
        data: Data set instead of the run's own.
        out: Where the pictures go; None for ``routes`` in the run, or beside a saved model.
        layer: Gated convolution whose heat maps are drawn; None for the one at two thirds of the depth.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    target: str
    split: Split = "test"
    data: str | None = None
    out: Path | None = None
    layer: str | None = None
    device: str = "cpu"

    @property
    def run(self) -> Path | None:
        """The run that the target is, or whose model it is."""
        near = (Path(self.target), Path(self.target).resolve().parent)
        return next((path for path in near if (path / "recipe.yaml").is_file()), None)

    @property
    def directory(self) -> Path:
        """Where the pictures go."""
        if self.out is not None:
            return self.out
        alone = Path(self.target)
        return self.run / "routes" if self.run is not None else alone.with_name(f"{alone.resolve().name}-routes")


@dataclass(frozen=True)
class Heat:
    """The response of one layer to some images, dense beside masked.

    Attributes:
        layer: Its name.
        images: The inputs as bytes, uint8 (images, channels, height, width).
        dense: Mean over channels of the absolute response of the same weights with all gates open, (images, h, w).
        masked: The same of what the gated model passes on.
        cosine: Similarity of the two maps of each image, (images,); of maps without a negative value it is near 1 anyway.
        correlation: The same of the maps less their means, (images,), which tells more.
        kept: Filters its gate kept for each image, int64 (images,).
        filters: Of how many.
    """

    layer: str
    images: Tensor
    dense: Tensor
    masked: Tensor
    cosine: Tensor
    correlation: Tensor
    kept: Tensor
    filters: int


def view_routes(asked: Viewing) -> Json:
    """Records the routes of a split through a gated model, draws them and returns what they tell.

    The result is that of `microglia.dynamic.statistics`, with ``task``, ``split``, ``estimate`` (``r``, ``honest`` and
    ``paper`` as predicted before the training; None without a run), ``heat`` (``layer``,
    ``cosine`` and ``correlation`` of each image drawn) and ``pictures``.

    Raises:
        MicrogliaError: There is no finished gated model, the split is empty, or no gate has the layer asked for.
    """
    # Slow to import, and the command line imports this file for every command.
    from microglia.studies.routes.figures import draw

    model, task = open_target(asked.target, asked.data)
    counter = counter_of(model, task, asked.target)
    data = image_data(task)
    if not len(getattr(data, asked.split)):
        raise MicrogliaError(f"The {asked.split} split of {data.name} has no images; ask for another --split.")
    layer = _layer(model, asked.layer)
    device = accelerator(asked.device).device
    model.to(device).eval()
    routes = record(model, task.data.batches(asked.split, 256).epoch(0), device)
    told = statistics(routes, counter)
    heat = heat_maps(model, data, asked.split, layer, device)
    widest = max(told["layers"], key=lambda row: row["diversity"])["layer"]
    result = {
        "task": task.name,
        "split": asked.split,
        **told,
        "estimate": _estimate(asked.run),
        "heat": {"layer": layer, "cosine": heat.cosine.tolist(), "correlation": heat.correlation.tolist()},
    }
    used = (widest, frequencies(routes)[widest], data.classes)
    pictures = draw(result, heat, used, asked.directory)
    return {**result, "pictures": [str(path) for path in pictures]}


def counter_of(model: nn.Module, task: Task, target: str) -> Counter:
    """Returns the counter of a gated model's operations.

    Raises:
        MicrogliaError: The model has no gates.
    """
    plan = gate_plan(model)
    if plan is None:
        raise MicrogliaError(
            f"The model {target} has no gates, so every input takes the same route. Routes are those of a run with "
            "--method ftwt; see `microglia methods`."
        )
    plain = detach_gates(twin(model)).eval()
    return Counter(plain, Flow(plain, task.example), plan, task.example)


def image_data(task: Task) -> ImageData:
    """Returns the images of a task.

    Raises:
        MicrogliaError: It is no task on images.
    """
    if not isinstance(task.data, ImageSource):
        raise MicrogliaError(f"{task.name} is no task on images in memory, and these are what this command looks at.")
    return task.data.images


@torch.no_grad()
def heat_maps(model: nn.Module, data: ImageData, split: Split, layer: str, device: torch.device | str = "cpu") -> Heat:
    """Returns the heat maps of the first image of each of some classes; the model, in evaluation mode, stays as it is.

    Source: FTWT; spec, section 7.12.

    Args:
        model: With gates.
        data: Its images.
        split: Where the images are from.
        layer: A gated convolution.
        device: Of the model.
    """
    images = getattr(data, split)
    chosen = [int((images.labels == label).nonzero()[0]) for label in images.labels.unique().tolist()[:SHOWN]]
    shown = images.images[chosen]
    inputs = data.normalization.apply(shown).to(device)
    passages: list[Passage] = []

    def hear(passage: Passage) -> None:
        if passage.gate.site.layer == layer:
            passages.append(passage)

    with listening(model, hear, fade=0.0):
        model(inputs)
    with listening(model, hear):
        model(inputs)
    opened, gated = passages
    dense = opened.response.abs().mean(1).cpu()
    masked = (gated.response * gated.mask[:, :, None, None]).abs().mean(1).cpu()
    cosine, correlation = _alike(dense.flatten(1), masked.flatten(1))
    return Heat(layer, shown, dense, masked, cosine, correlation, gated.mask.sum(1).cpu(), gated.mask.shape[1])


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosine similarity and correlation of the rows, (rows,) each."""
    apart = (rows - rows.mean(1, keepdim=True) for rows in (one, other))
    return functional.cosine_similarity(one, other), functional.cosine_similarity(next(apart), next(apart))


def _layer(model: nn.Module, asked: str | None) -> str:
    layers = list(gates_of(model))
    if asked is not None and asked not in layers:
        raise unknown_name("gated layer", asked, layers)
    return asked or layers[2 * len(layers) // 3]


def _estimate(run: Path | None) -> Json | None:
    result = None if run is None else run / "result.json"
    found = read_json(result).get("estimate") if result is not None and result.is_file() else None
    return None if not found else {key: found[key] for key in ("r", "honest", "paper")}


# ----------------------------------------------------------------------------------------------------------- for people
def layer_table(told: Mapping[str, Any]) -> Table:
    """Returns the table of what each layer's gate does, narrow enough for 80 columns."""
    title = f"{told['task']}: routes of {told['inputs']:,} inputs, {told['split']} split"
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("layer", no_wrap=True, overflow="fold")
    for name in ("all", "kept, %", "core", "dead", "diver-\nsity", "MACs,\n%", "preci-\nsion", "recall", "with-\nin", "across"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in told["layers"]:
        table.add_row(
            row["layer"],
            str(row["filters"]),
            f"{100 * row['kept']:.1f}±{100 * row['std']:.1f}",
            str(row["core"]),
            str(row["dead"]),
            f"{row['diversity']:.2f}",
            f"{100 * row['macs']:.1f}",
            *(("-" if row[name] is None else f"{row[name]:.2f}") for name in ("precision", "recall", "within", "across")),
        )
    table.caption = (
        "all: filters; kept: mean ± standard deviation over inputs; core: kept for every input; dead: for none; diversity: "
        "1 - core / mean kept; MACs: computed, of the layer's own; precision and recall: of the masks against the layer's "
        "targets; within and across: overlap (Jaccard) of the masks of two inputs of one class, and of two."
    )
    return table


def summary_table(told: Mapping[str, Any]) -> Table:
    """Returns the table of what all inputs cost, by both counts, beside what was predicted before the training."""
    table = Table("multiply-accumulates, % of dense", title=f"{told['dense']:,} multiply-accumulates dense")
    for name in ("mean", "std", "min", "max", "predicted"):
        table.add_column(name, justify="right")
    estimate = told["estimate"] or {}
    for label, count in (("honest: all that is computed", "honest"), ("paper: heads free", "paper")):
        values = [told[count][key] for key in ("mean", "std", "min", "max")] + [estimate.get(count)]
        table.add_row(label, *("-" if value is None else f"{100 * value:.2f}" for value in values))
    agreement = ", ".join(f"{name} {value:.3f}" for name, value in told["agreement"].items())
    table.caption = (
        f"Heads: {100 * told['heads'] / told['dense']:.2f} % of dense. Masks against targets: {agreement}.\n"
        f"{told['inputs']:,} inputs took {told['routes']:,} distinct routes with {told['signatures']:,} signatures "
        "(counts of filters by layer)."
    )
    return table
