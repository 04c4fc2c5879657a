"""Charts of routes: core filters by layer, heat maps dense beside masked, and which class uses which filter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from microglia.report.chart import COLORS, Axis, Bars, Chart, Field, Panel
from microglia.studies.routes.heat import Heat
from microglia.studies.routes.result import LayerRoutes

LABELS = 70
"""At most so many layers or classes are named at an axis."""
PALE = "#c9d6df"
BARE = Axis(bare=True)
Used = tuple[str, Tensor, Sequence[str]]
"""(layer, how often each class uses each of its filters (classes, filters), names of the classes)."""


def core_chart(layers: Sequence[LayerRoutes], title: str) -> Chart:
    """Returns bars of each layer: all filters (pale), those an input uses on average, those every input uses (dark).

    Source: FTWT, figure of the core filters.

    Args:
        layers: The gated layers.
        title: Title of the chart.
    """
    places = list(range(len(layers)))
    kept, spread = ([getattr(row, key) * row.filters for row in layers] for key in ("kept", "std"))
    bars = [
        Bars("all filters", places, [row.filters for row in layers], PALE, 0.85),
        Bars("kept, mean ± std of inputs", places, kept, COLORS[5], 0.6, errors=spread),
        Bars("core: kept for every input", places, [row.core for row in layers], COLORS[0], 0.35),
    ]
    step = -(-len(layers) // LABELS)
    across = Axis(
        limits=(-0.7, len(layers) - 0.3),
        ticks=places[::step],
        labels=[row.layer for row in layers][::step],
        upright=True,
    )
    size = (max(7.5, min(18.0, 2 + 0.3 * len(layers))), 4.8)
    return Chart(title, [Panel(across, Axis("filters", limits=(0, None)), bars=bars)], size=size, legend=3)


def heat_chart(heat: Heat, title: str) -> Chart:
    """Returns a row for each image: the image, its dense heat map and its masked one, each on its own scale of colors."""
    size = (7.2, 0.8 + 2.3 * len(heat.images))
    title = f"{title}\nmean |response| of {heat.layer}"
    return Chart(title, list(_heat_panels(heat)), columns=3, size=size, legend=-1, height=120 + 220 * len(heat.images))


def _heat_panels(heat: Heat) -> Iterator[Panel]:
    for number, image in enumerate(heat.images):
        pixels = image.permute(1, 2, 0).numpy()
        yield Panel(BARE, BARE, image=pixels if pixels.shape[-1] == 3 else pixels.mean(-1).astype(np.uint8), title="input")
        yield _map(heat.dense[number], "dense: all gates open")
        alike = f"cosine {float(heat.cosine[number]):.3f}, correlation {float(heat.correlation[number]):.3f}"
        yield _map(heat.masked[number], f"{int(heat.kept[number])} of {heat.filters} filters\n{alike}")


def _map(values: Tensor, title: str) -> Panel:
    rows, columns = values.shape
    field = Field(
        range(columns + 1),
        range(rows + 1),
        values.numpy(),
        "",
        colors="Viridis",
        limits=(0, float(values.max()) or 1.0),
        scale=False,
    )
    return Panel(BARE, Axis(bare=True, falling=True), field=field, title=title, aspect=rows / columns)


def class_chart(used: Used, title: str) -> Chart:
    """Returns how often each class uses each filter of a layer, the filters used most on the left."""
    layer, often, classes = used
    values = often.numpy()
    ordered = values[:, np.argsort(-values.mean(0), kind="stable")]
    count, filters = values.shape
    field = Field(range(filters + 1), range(count + 1), ordered, "fraction of the class's inputs", limits=(0, 1))
    step = -(-count // LABELS)
    up = Axis(
        "class", ticks=[place + 0.5 for place in range(0, count, step)], labels=list(classes[:count])[::step], falling=True
    )
    panel = Panel(Axis(f"filters of {layer}, by use"), up, field=field)
    size = (8, max(3.0, min(14.0, 1.6 + 0.25 * count)))
    return Chart(f"{title}: the layer of the largest diversity", [panel], size=size, legend=-1)
