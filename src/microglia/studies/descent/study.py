"""Double descent on a data set: test error over widths, or over numbers of samples, every network a durable cell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from microglia.core.errors import MicrogliaError
from microglia.data import load_data
from microglia.storage.run import Run
from microglia.studies.descent.double_descent import (
    DescentConfig,
    descend,
    effective_capacity,
    interpolation_threshold,
    member,
    with_samples,
)
from microglia.train.engine import accelerator

EPSILON = 0.01
"""Training error below which the noisy labels count as fitted."""
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)
Json = dict[str, Any]


@dataclass(frozen=True)
class Descending:
    """What to train.

    Attributes:
        config: How.
        widths: Of the networks; with ``samples`` a single one.
        samples: Numbers of training images, nested; empty for all of them, width by width.
        data: Data set.
        out: Where everything goes; None for a directory of its own under ``runs``. More widths or samples can be added there.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    config: DescentConfig = field(default_factory=DescentConfig)
    widths: Sequence[int] = WIDTHS
    samples: Sequence[int] = ()
    data: str = "digits"
    out: Path | None = None
    device: str = "cpu"

    @property
    def recipe(self) -> Json:
        """What makes a cell the same cell: all but which cells there are."""
        return {"command": "descent", "data": self.data, **asdict(self.config)}

    @property
    def directory(self) -> Path:
        """Where everything goes."""
        if self.out is not None:
            return self.out
        mark = hashlib.blake2b(json.dumps(self.recipe, sort_keys=True).encode(), digest_size=3).hexdigest()
        name = f"descent-{self.config.family}-{self.data}-{mark}"
        return Path("runs") / "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def view_descent(asked: Descending) -> Json:
    """Trains what is not trained yet, draws errors over width or samples and returns them, JSON-ready.

    The result holds ``data``, ``config``, ``over`` (``width`` or ``samples``), ``rows`` (see
    `microglia.studies.descent.double_descent.descend`), ``epsilon``, ``threshold`` (the least width that fits its training
    labels to that error), ``capacity`` (the most samples that were), ``peak`` (the row of the largest test error between two
    smaller ones, None where there is none), ``chance`` (error of guessing) and ``pictures``.

    Raises:
        MicrogliaError: A setting is not as it should be, or a training diverged.
    """
    # Slow to import, and the command line imports this file for every command.
    from microglia.studies.descent.figures import draw

    if asked.samples and len(asked.widths) != 1:
        raise MicrogliaError(
            f"Over numbers of samples the width is one and the same; got {len(asked.widths)} widths. Give either several "
            "widths, or one width and several numbers of samples."
        )
    device = accelerator(asked.device).device
    data = load_data(asked.data)
    samples = sorted(set(asked.samples)) or [len(data.train)]
    cells = [(width, count) for width in sorted(set(asked.widths)) for count in samples]
    for width, count in cells:  # what is wrong shows before the first training
        with_samples(data, count)
        member(asked.config.family, width, len(data.classes), data.shape)
    run = Run(asked.directory, asked.recipe, seed=asked.config.seed, device=device.type)
    try:
        rows = descend(data, asked.config, cells, run)
        result = {
            "command": "descent",
            "data": data.name,
            "config": asdict(asked.config),
            "over": "samples" if asked.samples else "width",
            "rows": rows,
            "epsilon": EPSILON,
            "threshold": interpolation_threshold(rows, EPSILON),
            "capacity": effective_capacity(rows, EPSILON),
            "peak": interior_peak(rows),
            "chance": 1 - 1 / len(data.classes),
        }
        result["pictures"] = [str(path) for path in draw(result, asked.directory)]
        run.finish(result)
        return result
    finally:
        run.close()


def interior_peak(rows: Sequence[Mapping[str, Any]]) -> Json | None:
    """Returns the row whose test error stands highest above both sides, with that ``height``; None without one.

    The valley on a side is the least test error there; the height is over the higher of the two.
    """
    errors = [row["test_error"] for row in rows]
    heights = [
        (min(errors[number] - min(errors[:number]), errors[number] - min(errors[number + 1 :])), number)
        for number in range(1, len(errors) - 1)
    ]
    height, number = max(heights, default=(0.0, 0))
    return {**rows[number], "height": height} if height > 0 else None


# ----------------------------------------------------------------------------------------------------------- for people
def descent_table(told: Mapping[str, Any]) -> Table:
    """Returns the table of all cells."""
    config = told["config"]
    table = Table(
        title=f"{config['family']} on {told['data']}: {config['steps']:,} steps each, label noise {100 * config['noise']:g} %"
    )
    for name in ("width", "samples", "parameters", "train error, %", "test error, %"):
        table.add_column(name, justify="right")
    for row in told["rows"]:
        numbers = [f"{row[name]:,}" for name in ("width", "samples", "parameters")]
        table.add_row(*numbers, *(f"{100 * row[name]:.2f}" for name in ("train_error", "test_error")))
    table.caption = f"{sentence(told)} Training error counts the noisy labels, test error the true ones."
    return table


def sentence(told: Mapping[str, Any]) -> str:
    """Returns what was found, in words."""
    level, over, peak = f"{100 * told['epsilon']:g} % training error", told["over"], told["peak"]
    reached = told["threshold"] if over == "width" else told["capacity"]
    if reached is None:
        fitted = f"Nothing fits to {level}."
    elif over == "width":
        fitted = f"Width {reached:,} is the first that fits to {level}."
    else:
        fitted = f"{reached:,} samples are the most that it fits to {level}."
    if peak is None:
        return f"{fitted} The test error has no peak inside."
    height = f"{100 * peak['test_error']:.2f} %, {100 * peak['height']:.2f} points above the valleys on both sides"
    return f"{fitted} The test error peaks at {over} {peak[over]:,}: {height}."
