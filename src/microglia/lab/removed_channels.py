"""The channels that a shrunk model lost: a table and a bar picture, layer by layer."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from microglia.storage.files import write_atomic

PICTURE = "channels.png"
LABELS = 70  # at most so many layers are named under the bars
Json = Mapping[str, Any]


def channels(layer: Json) -> tuple[int, int]:
    """Returns the output channels of a layer before and after."""
    return layer["before"][layer["outputs"]], layer["after"][layer["outputs"]]


def removal_table(removed: Json) -> Table:
    """Returns the table of what went per layer."""
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
        caption.append(f"Widths are multiples of {got['round_to']:g} where a group is wide enough.")
    caption.append(f"Largest difference to the masked model at any value, in float64: {removed['error']:.1e}.")
    table.caption = "\n".join([*caption, *removed["notes"]])
    return table


def draw(removed: Json, title: str, path: Path) -> Path:
    """Writes the bar picture: channels per layer before (pale) and after (dark); the same numbers, the same bytes.

    Raises:
        FileError: It cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    layers = removed["layers"]
    figure = Figure(figsize=(max(6.0, min(18.0, 2 + 0.24 * len(layers))), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(layers))
    before, after = zip(*(channels(layer) for layer in layers), strict=True) if layers else ((), ())
    axes.bar(places, before, width=0.85, color="#c9d6df", label="before")
    axes.bar(places, after, width=0.55, color="#0072B2", label="after")
    step = max(1, math.ceil(len(layers) / LABELS))
    names = [layer["name"].removesuffix(".weight") for layer in layers]
    axes.set_xticks(list(places)[::step], names[::step], rotation=90, fontsize=7)
    axes.set_xlim(-0.7, len(layers) - 0.3)
    axes.set_ylabel("output channels")
    axes.set_title(title, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color="0.9")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", frameon=False, ncols=2)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    write_atomic(path, content.getvalue())
    return path


def _shape(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
