"""Double descent on a data set: test error over widths, or over numbers of samples, every network a durable cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

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
from microglia.studies.descent.figures import figures
from microglia.studies.descent.result import Descent
from microglia.studies.listed import LISTED
from microglia.studies.options import Option
from microglia.studies.places import under_runs
from microglia.studies.result import Told
from microglia.studies.study import Study, Work, conduct, register
from microglia.train.engine import accelerator

EPSILON = 0.01
"""Training error below which the noisy labels count as fitted."""
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)
PARTS = {name: name for name in DescentConfig.__dataclass_fields__}
"""Options of the training: all its fields."""
WIDTH = 16
"""The one width over numbers of samples."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Descending:
    """Which networks to train, and on which data.

    Attributes:
        config: How.
        widths: Widths of the networks; with several ``samples`` a single one; None for 1,2,4,8,16,32,64,128.
        samples: Numbers of training images, nested, such as 50,100,200; a single one with several widths; without any all
            images are taken, width by width.
        width: The one width with ``samples``, instead of ``widths``; None for 16.
        data: Data set.
        out: Directory, to which more widths or samples can be added; None for one of its own under ``runs``.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    config: Annotated[DescentConfig, Option(parts=PARTS)] = field(default_factory=DescentConfig)
    widths: Annotated[Sequence[int] | None, Option(least=1, example="1,2,4,8")] = None
    samples: Annotated[Sequence[int], Option(least=1, example="50,100,200")] = ()
    width: int | None = None
    data: str = "digits"
    out: Path | None = None
    device: str = "auto"

    @property
    def recipe(self) -> Json:
        """All that a cell depends on beside its width and samples."""
        return {"command": "descent", "data": self.data, **asdict(self.config)}

    @property
    def directory(self) -> Path:
        """Where everything goes."""
        return self.out or under_runs(f"descent-{self.config.family}-{self.data}", self.recipe)


def view_descent(asked: Descending) -> Told[Descent]:
    """Trains what is not trained yet, draws errors over width or samples and returns them, JSON-ready.

    The result holds:

    - ``data``, ``config``, ``over`` (``width`` or ``samples``) and ``pictures``;
    - ``rows``, see `microglia.studies.descent.double_descent.descend`;
    - ``epsilon``, and ``threshold``, the smallest width that fits its training labels to that error;
    - ``capacity``, the largest number of samples that were fitted so;
    - ``peak``, the row of the largest test error between two smaller ones, or None;
    - ``chance``, the error of guessing.

    Raises:
        MicrogliaError: A setting is not as it should be, or a training diverged.
    """
    return conduct(DESCENT, asked)


def _begin(asked: Descending) -> Work[Json]:
    given = (asked.width,) if asked.width is not None else WIDTHS if asked.widths is None else asked.widths
    samples, widths = sorted(set(asked.samples)), sorted(set(given))
    if len(samples) > 1 and len(widths) > 1:
        raise MicrogliaError(
            f"One of them varies at a time; got {len(widths)} widths and {len(samples)} numbers of samples. Give either "
            "several widths, or one width and several numbers of samples."
        )
    device = accelerator(asked.device).device
    data = load_data(asked.data)
    for count in samples:  # what is wrong shows before the first training
        with_samples(data, count)
    for width in widths:
        member(asked.config.family, width, len(data.classes), data.shape)

    def measure(run: Run) -> Json:
        cells = [(width, count) for width in widths for count in samples or [len(data.train)]]
        rows = descend(data, asked.config, cells, run)
        return {
            "command": "descent",
            "data": data.name,
            "config": asdict(asked.config),
            "over": "samples" if samples and len(widths) == 1 else "width",
            "rows": rows,
            "epsilon": EPSILON,
            "threshold": interpolation_threshold(rows, EPSILON),
            "capacity": effective_capacity(rows, EPSILON),
            "peak": interior_peak(rows),
            "chance": 1 - 1 / len(data.classes),
        }

    return Work(measure, asked.recipe, asked.config.seed, device.type)


def _settle(given: Json) -> Json:
    """Returns the options with one width beside numbers of samples.

    Raises:
        MicrogliaError: The one width is given beside several, or without samples.
    """
    if given["width"] is not None and given["widths"] is not None:
        raise MicrogliaError("Give --widths or one --width, not both.")
    if given["samples"] is None and given["width"] is not None:
        raise MicrogliaError("--width is the one width of --samples; several are --widths, such as --widths 1,2,4.")
    alone = given["samples"] is not None and given["widths"] is None and given["width"] is None
    one = WIDTH if alone else given["width"]
    return {**given, "width": one}


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
def descent_table(told: Descent) -> Table:
    """Returns the table of all cells."""
    config = told.config
    table = Table(title=f"{config.family} on {told.data}: {config.steps:,} steps each, label noise {100 * config.noise:g} %")
    for name in ("width", "samples", "parameters", "train error, %", "test error, %"):
        table.add_column(name, justify="right")
    for row in told.rows:
        numbers = [f"{getattr(row, name):,}" for name in ("width", "samples", "parameters")]
        table.add_row(*numbers, *(f"{100 * getattr(row, name):.2f}" for name in ("train_error", "test_error")))
    table.caption = f"{sentence(told)} Training error counts the noisy labels, test error the true ones."
    return table


def sentence(told: Descent) -> str:
    """Returns what was found, in words."""
    level, over, peak = f"{100 * told.epsilon:g} % training error", told.over, told.peak
    reached = told.threshold if over == "width" else told.capacity
    if reached is None:
        fitted = f"Nothing fits to {level}."
    elif over == "width":
        fitted = f"Width {reached:,} is the first that fits to {level}."
    else:
        fitted = f"{reached:,} samples are the most that it fits to {level}."
    if peak is None:
        return f"{fitted} The test error has no peak inside."
    height = f"{100 * peak.test_error:.2f} %, {100 * peak.height:.2f} points above the valleys on both sides"
    return f"{fitted} The test error peaks at {over} {peak.place(over):,}: {height}."


DESCENT = register(
    Study(
        "descent",
        LISTED["descent"].sentence,
        Descending,
        _begin,
        tables=lambda told: [descent_table(told)],
        figures=figures,
        result=Descent,
        directory=lambda asked: asked.directory,
        settle=_settle,
        example="microglia descent --data digits --widths 2,4,8,16,32,64 --noise 0.2",
    )
)
