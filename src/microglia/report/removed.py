"""The channels that a shrunk model lost: a table and a chart of bars, layer by layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from microglia.core.errors import MissingLibraryError
from microglia.core.optional import needs
from microglia.report.chart import Axis, Bars, Chart, Panel
from microglia.storage.files import write_atomic

PICTURE = "channels.png"
LABELS = 70
"""Maximum number of layers that are named under the bars."""
Json = Mapping[str, Any]


def channels(layer: Json) -> tuple[int, int]:
    """Returns the output channels of a layer before and after."""
    return layer["before"][layer["outputs"]], layer["after"][layer["outputs"]]


def removal_table(removed: Json) -> Table:
    """Returns the table of removed channels per layer."""
    table = Table(title="Removed channels")
    table.add_column("layer", no_wrap=True, overflow="fold")
    for name in ("weight before", "weight after", "channels", "channels kept", "weights kept"):
        table.add_column(name)
    for layer in removed["layers"]:
        before, after = channels(layer)
        table.add_row(
            layer["name"].removesuffix(".weight"),
            _shape(layer["before"]),
            _shape(layer["after"]),
            f"{before} -> {after}" if after != before else str(before),
            _percent(after, before),
            _percent(math.prod(layer["after"]), math.prod(layer["before"])),
        )
    groups, got = removed["groups"], removed["got"]
    reached = ", ".join(f"{term} {value:.4g}" for term, value in got.items() if term != "round_to")
    caption = [
        f"{groups['pruned']} of {groups['found']} groups of coupled channels lost some{'; got ' + reached if got else ''}."
    ]
    if got.get("round_to", 0) > 1:
        caption.append(f"Widths are multiples of {got['round_to']:g}; narrower groups have a smaller step.")
    caption.append(f"Largest difference to the masked model at any value, in float64: {removed['error']:.1e}.")
    table.caption = "\n".join([*caption, *removed["notes"]])
    return table


def removal_chart(removed: Json, title: str) -> Chart:
    """Returns the bars: channels per layer before (pale) and after (dark)."""
    layers = removed["layers"]
    names = [layer["name"].removesuffix(".weight") for layer in layers]
    places, step = list(range(len(layers))), max(1, math.ceil(len(layers) / LABELS))
    before, after = zip(*(channels(layer) for layer in layers), strict=True) if layers else ((), ())
    across = Axis(ticks=places[::step], labels=names[::step], limits=(-0.7, len(layers) - 0.3), upright=True)
    bars = (Bars("before", places, before, "#c9d6df", 0.85, names), Bars("after", places, after, width=0.55, notes=names))
    size = (max(6.0, min(18.0, 2 + 0.24 * len(layers))), 4.8)
    return Chart(title, [Panel(across, Axis("output channels"), bars=bars)], size=size)


def draw_removed(removed: Json, title: str, path: Path) -> Path | None:
    """Writes the bars as a PNG; the same numbers, the same bytes. Without matplotlib it warns and returns None.

    Raises:
        FileError: The file cannot be written.
    """
    try:
        needs("report", "matplotlib", what="The picture of the removed channels")
    except MissingLibraryError as error:  # no reason to lose the run
        warnings.warn(str(error), stacklevel=2)
        return None
    from microglia.report.printed import images  # slow to import

    write_atomic(path, images(removal_chart(removed, title), ("png",))["png"])
    return path


def _shape(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
