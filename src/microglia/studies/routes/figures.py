"""Pictures of routes: core filters by layer, heat maps dense beside masked, and which class uses which filter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from microglia.report.chart import COLORS
from microglia.report.printed import save
from microglia.studies.routes.study import Heat

LABELS = 70  # at most so many layers or classes are named at an axis
PALE = "#c9d6df"
Used = tuple[str, Tensor, Sequence[str]]
"""(layer, how often each class uses each of its filters (classes, filters), names of the classes)."""


def draw(told: Mapping[str, Any], heat: Heat, used: Used, directory: Path) -> list[Path]:
    """Writes the pictures as PNG and SVG, named after the split; returns their paths.

    Args:
        told: What `microglia.dynamic.statistics` told, with ``task`` and ``split``.
        heat: Maps of some images.
        used: Of the layer to show by class.
        directory: Where.

    Raises:
        FileError: They cannot be written.
    """
    title = f"{told['task']}, {told['split']} split"
    makers = {
        "core": partial(core_figure, told["layers"], title),
        "heat": partial(heat_figure, heat, title),
        "classes": partial(class_figure, used, title),
    }
    return [path for name, make in makers.items() for path in save(make, directory, told["split"], name)]


def core_figure(layers: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Returns the bars of each layer: all filters (pale), those an input uses on average, those every input uses (dark).

    Source: FTWT, figure of the core filters.
    """
    figure = Figure(figsize=(max(7.5, min(18.0, 2 + 0.3 * len(layers))), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(layers))
    total = np.array([row["filters"] for row in layers])
    kept = np.array([row["kept"] for row in layers]) * total
    spread = np.array([row["std"] for row in layers]) * total
    axes.bar(places, total, width=0.85, color=PALE, label="all filters")
    axes.bar(places, kept, width=0.6, color=COLORS[5], yerr=spread, ecolor="0.3", capsize=2, label="kept, mean ± std of inputs")
    axes.bar(places, [row["core"] for row in layers], width=0.35, color=COLORS[0], label="core: kept for every input")
    step = -(-len(layers) // LABELS)
    axes.set_xticks(list(places)[::step], [row["layer"] for row in layers][::step], rotation=90, fontsize=7)
    axes.set_xlim(-0.7, len(layers) - 0.3)
    axes.set_ylabel("filters")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color="0.9")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", frameon=False, ncols=3)
    return figure


def heat_figure(heat: Heat, title: str) -> Figure:
    """Returns a row for each image: the image, its dense heat map and its masked one, each on its own scale of colours."""
    rows = len(heat.images)
    figure = Figure(figsize=(7.2, 0.8 + 2.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\nmean |response| of {heat.layer}")
    panels = figure.subplots(rows, 3, squeeze=False)
    for number, (image, dense, masked) in enumerate(zip(heat.images, heat.dense, heat.masked, strict=True)):
        left, middle, right = panels[number]
        pixels = image.permute(1, 2, 0).numpy()
        left.imshow(pixels if pixels.shape[-1] == 3 else pixels.mean(-1), cmap="gray", vmin=0, vmax=255)
        left.set_title("input", fontsize="small")
        for axes, values in ((middle, dense), (right, masked)):
            axes.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=float(values.max()) or 1.0)
        middle.set_title("dense: all gates open", fontsize="small")
        alike = f"cosine {float(heat.cosine[number]):.3f}, correlation {float(heat.correlation[number]):.3f}"
        right.set_title(f"{int(heat.kept[number])} of {heat.filters} filters\n{alike}", fontsize="small")
    for axes in panels.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def class_figure(used: Used, title: str) -> Figure:
    """Returns how often each class uses each filter of a layer, the filters used most on the left."""
    layer, often, classes = used
    values = often.numpy()
    ordered = values[:, np.argsort(-values.mean(0), kind="stable")]
    figure = Figure(figsize=(8, max(3.0, min(14.0, 1.6 + 0.25 * len(values)))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(ordered, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="fraction of the class's inputs")
    step = -(-len(values) // LABELS)
    axes.set_yticks(range(0, len(values), step), list(classes[: len(values)])[::step], fontsize=8)
    axes.set_xlabel(f"filters of {layer}, by use")
    axes.set_ylabel("class")
    axes.set_title(f"{title}: the layer of the largest diversity", fontsize="medium")
    return figure
