"""The section of detection: true boxes beside those of the dense and the pruned models, on a few test images."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from microglia.report.chart import Axis, Chart, Panel
from microglia.report.records import Record
from microglia.report.rows import Group, Row
from microglia.report.section import Picture, Section, register
from microglia.tasks.box_pictures import KIND, drawn

CAPTION = "test images with their true boxes, and the boxes of the dense and the pruned models with a score of 0.25 or more"
MODELS = 2
"""Number of pruned models in the picture."""
GOLDEN = 0.6180339887
"""Step of the hue from class to class, so that neighbours differ."""
BARE = Axis(bare=True)
Pixels = npt.NDArray[np.uint8]
Pictures = dict[str, list[Pixels]]
"""``truth`` and ``predicted`` -> one picture per example."""


def pictures(group: Group) -> Iterator[Picture]:
    """Returns the boxes of the first pruned models beside the dense model's and the true ones."""
    found = [(row, own) for row in group.rows if (own := _first(row, "pruned")) is not None][:MODELS]
    dense = next((own for row in group.rows if (own := _first(row, "dense")) is not None), None)
    if found and dense:
        yield Picture("boxes", CAPTION, boxes_chart(group, dense, found))


def boxes_chart(group: Group, dense: Pictures, found: list[tuple[Row, Pictures]]) -> Chart:
    """Returns a row of pictures for each example: truth, dense and pruned boxes."""
    columns = [("truth", dense["truth"]), ("dense", dense["predicted"])]
    columns += [(f"{row.method}, {row.asked}", own["predicted"]) for row, own in found]
    count = min(len(own) for _, own in columns)
    places = [(place, title, own) for place in range(count) for title, own in columns]
    panels = [Panel(BARE, BARE, title="" if place else title, image=own[place]) for place, title, own in places]
    size = (2.8 * len(columns), 2.6 * count + 0.6)
    return Chart(f"{group.title}: boxes", panels, columns=len(columns), size=size, legend=-1, height=260 * count + 80)


def _first(row: Row, name: str) -> Pictures | None:
    """Returns the pictures of one model of a row's first run that has them."""
    return next((own for record in row.records if (own := _drawn(record, name)) is not None), None)


def _drawn(record: Record, name: str) -> Pictures | None:
    """Returns pictures with boxes; None for another kind of task, or for a damaged file."""
    shown: Any = record.shown.get(name)
    if not isinstance(shown, Mapping) or shown.get("kind") != KIND:
        return None
    try:
        colours = [colour(number) for number in range(max(1, len(shown["classes"])))]
        made = {key: [drawn(one["image"], one[key], colours) for one in shown["examples"]] for key in ("truth", "predicted")}
    except (KeyError, TypeError, ValueError):
        return None
    return made if made["truth"] else None


def colour(number: int) -> tuple[int, int, int]:
    """Returns the colour of a class, red, green and blue of 255."""
    red, green, blue = colorsys.hsv_to_rgb(GOLDEN * number % 1, 0.9, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


register(Section("detection", pictures=pictures))
