"""The section of tasks with classes: a table with the metric of each class; and pictures of predicted maps."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from microglia.data.scenes import IGNORED
from microglia.report.cells import Entry, of_spread, of_words
from microglia.report.chart import Axis, Chart, Panel
from microglia.report.records import Record
from microglia.report.rows import Group, Row
from microglia.report.section import Picture, Section, Table, register
from microglia.report.spread import Spread
from microglia.tasks.pictures import read_picture

BETWEEN = "/"
"""Sign between the name of a metric and that of a class, as in ``iou/road``."""
WORDS = ("method", "asked", "settings")
CAPTION = "test images, their true classes, and the classes that the dense and the pruned models predict"
MODELS = 2
"""Number of pruned models in the picture."""
GOLDEN = 0.6180339887
"""Step of the hue from class to class, so that neighbours differ."""
BARE = Axis(bare=True)

Shown = Mapping[str, Any]


def tables(group: Group) -> list[Table]:
    """Returns a table for each metric by class, the dense models first; a class without pixels has an empty cell."""
    rows = [*group.baselines, *group.rows]
    names = list(dict.fromkeys(name for row in rows for record in row.records for name in _metrics(row, record)))
    metrics = dict.fromkeys(name.partition(BETWEEN)[0] for name in names if BETWEEN in name)
    return [_table(rows, metric, [name for name in names if name.startswith(f"{metric}{BETWEEN}")]) for metric in metrics]


def _metrics(row: Row, record: Record) -> Mapping[str, float | None]:
    return (record.dense if row.baseline else record.pruned).metrics


def _table(rows: list[Row], metric: str, names: list[str]) -> Table:
    classes = [name.partition(BETWEEN)[2] for name in names]
    body = []
    for row in rows:
        found = [[v for r in row.records if (v := _metrics(row, r).get(name)) is not None] for name in names]
        cells = [of_spread(Spread.of(values) if values else None, 100) for values in found]
        settings = "" if row.baseline else row.settings
        label = "dense" if row.baseline else row.method
        asked = "" if row.baseline else row.asked
        body.append((row, [of_words(label), of_words(asked), of_words(settings), Entry(str(row.after.n), row.after.n), *cells]))
    explained = f"The metric {metric} of each class on the test split, in per cent."
    return Table([*WORDS, "n", *classes], body, WORDS, explained).without_empty("settings")


def pictures(group: Group) -> Iterator[Picture]:
    """Returns the maps of the first pruned models beside the dense model's and the truth."""
    found = [(row, record) for row in group.rows for record in row.records[:1] if _maps(record.shown.get("pruned"))]
    dense = next((_maps(record.shown.get("dense")) for _, record in found), None)
    if found and dense:
        yield Picture("maps", CAPTION, maps_chart(group, dense, found[:MODELS]))


def _maps(shown: Any) -> list[dict[str, npt.NDArray[np.uint8]]] | None:
    """Returns the pictures of each example, decoded; None for another kind of task, or for a damaged file."""
    if not isinstance(shown, Mapping) or shown.get("kind") != "segmentation":
        return None
    try:
        keys = ("image", "truth", "predicted")
        return [{key: read_picture(example[key]) for key in keys} for example in shown["examples"]]
    except (KeyError, TypeError, ValueError):
        return None


def maps_chart(group: Group, dense: list[dict[str, npt.NDArray[np.uint8]]], found: list[tuple[Row, Record]]) -> Chart:
    """Returns a row of pictures for each example: image, truth, dense and pruned predictions."""
    pruned = [(f"{row.method}, {row.asked}", _maps(record.shown["pruned"]) or []) for row, record in found]
    panels = []
    for number, example in enumerate(dense):
        titles = ["image", "truth", "dense", *(name for name, _ in pruned)]
        given = [example["image"], coloured(example["truth"]), coloured(example["predicted"])]
        given += [coloured(maps[number]["predicted"]) if number < len(maps) else example["image"] for _, maps in pruned]
        panels += [Panel(BARE, BARE, title=t if number == 0 else "", image=i) for t, i in zip(titles, given, strict=True)]
    columns = 3 + len(pruned)
    size = (2.6 * columns, 2.2 * len(dense) + 0.6)
    return Chart(f"{group.title}: maps", panels, columns=columns, size=size, legend=-1, height=220 * len(dense) + 80)


def coloured(classes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Returns numbers of classes as colours, uint8 [H, W, 3]; a pixel without a class is black."""
    hues = ((GOLDEN * number % 1, 0.55 + 0.15 * (number % 3), 0.95 - 0.15 * (number % 2)) for number in range(IGNORED))
    palette = np.array([*(colorsys.hsv_to_rgb(*hue) for hue in hues), (0.0, 0.0, 0.0)])
    found: npt.NDArray[np.uint8] = (255 * palette[classes]).round().astype(np.uint8)
    return found


register(Section("segmentation", tables=tables, pictures=pictures))
