"""Instability against the epoch at which two copies of a network part: dense, and under masks given or found for that epoch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from microglia.core.errors import MicrogliaError
from microglia.core.masks import MaskSet, masks_of
from microglia.lab.execute import make_task
from microglia.lab.recipe import Recipe, RecipeError, as_dict, begun, method_config
from microglia.report.spread import Spread
from microglia.storage.archive import load
from microglia.storage.files import digest
from microglia.storage.run import Run
from microglia.studies.instability.analysis import STABLE, Training, instability, smallest_stable
from microglia.studies.instability.figures import figures
from microglia.studies.instability.masks import Rewound, check_rewound
from microglia.studies.instability.result import Instability
from microglia.studies.listed import LISTED
from microglia.studies.options import Option
from microglia.studies.result import Told, decode
from microglia.studies.space.gauge import Gauge
from microglia.studies.study import Study, Work, register
from microglia.train.engine import accelerator

Json = dict[str, Any]
OfEpoch = Callable[[int], MaskSet | None]
"""The masks of a network by the epoch at which its copies part; None for the dense one."""
FOUND = "by iterative magnitude pruning, rewound to each epoch"
"""In the record of a run, instead of the digest of given masks."""


@dataclass(frozen=True)
class Sensing:
    """Which network to train in two copies, and where they part.

    Attributes:
        recipe: Recipe of the model, the data and the training; its pruning counts only where masks are found.
        at: Epochs of that training at which the copies part, 0 and its last included (the last has no masks to be found for).
        directory: Directory of one run for each seed; the same command goes on there.
        masks: A finished run whose masks are put on at the parting, beside the dense network; None for dense alone.
        seeds: Initializations, each with masks of its own where they are found.
        pairs: Pairs of noises for each.
        points: Points of the straight line between the copies.
        recalibrate: Training batches for the batch-norm statistics of every point.
        limit: Batches of 256 of each split to look at; None for all.
        find: Whether masks are found for every seed and epoch beside the dense network, by the recipe's iterative magnitude
            pruning down to its density, rewound to that very epoch; and as many weights at random as a control.
    """

    recipe: Annotated[Recipe, Option(recipe={"method": "tickets", "prune": {"density": 1.0}}, masked="masks")]
    at: tuple[int, ...] = (0, 1, 2, 5)
    directory: Annotated[Path, Option(name="out")] = Path("runs/instability")
    masks: Path | None = None
    seeds: Annotated[int, Option(least=1)] = 1
    pairs: Annotated[int, Option(least=1)] = 1
    points: Annotated[int, Option(least=3)] = 30
    recalibrate: Annotated[int, Option(least=0)] = 100
    limit: Annotated[int | None, Option(least=1)] = None
    find: Annotated[bool, Option(hidden=True)] = False


def sense(asked: Sensing) -> Told[Instability]:
    """Returns the instability of every network, epoch, seed and pair; each training is a stage that is never done twice.

    The result holds:

    - ``task`` and ``recipe``;
    - ``rows``: ``network``, ``density``, ``masks``, ``seed``, ``pair``, and the values of
      `microglia.studies.instability.analysis.instability`;
    - ``summary``: mean and standard deviation of the instability of each split, by network and epoch;
    - ``stable_from``: by network, the first epoch from which on the mean is below 2 %.

    A network is ``dense``, ``masked`` (masks of a run), ``imp`` or ``random`` (found masks and their control);
    ``masks`` is a digest of its masks, None of the dense one.

    Source: Frankle et al. 2020, figures 2-5.

    Raises:
        MicrogliaError: An epoch is no part of the training, or the masks fit another network.
    """
    epochs = asked.recipe.train.epochs
    if not asked.at or min(asked.at) < 0 or max(asked.at) > epochs:
        raise MicrogliaError(f"Copies part at epochs of the training, 0 to {epochs}; got {list(asked.at)}.")
    masks = _masks(asked)
    rows = [row for number in range(asked.seeds) for row in _of_seed(asked, number, masks)]
    summary = summarize(rows)
    content = {
        "task": make_task(asked.recipe).name,
        "recipe": as_dict(asked.recipe),
        "rows": rows,
        "summary": summary,
        "stable_from": {
            name: smallest_stable([row for row in summary if row["network"] == name])
            for name in dict.fromkeys(row["network"] for row in rows)
        },
    }
    return Told(decode(Instability, content))


def _masks(asked: Sensing) -> MaskSet | None:
    if asked.masks is None:
        return None
    found = masks_of(load(asked.masks / "model", make_task(asked.recipe).build()))
    if not found:
        raise MicrogliaError(f"The model of {asked.masks} has no masks; give a run that masks, such as one of tickets.")
    if asked.seeds > 1:
        raise MicrogliaError(
            "Masks belong to the initialization they were found for: with a run's masks leave seeds at 1, or have masks found "
            "for every seed with --density."
        )
    return found


def _of_seed(asked: Sensing, number: int, masks: MaskSet | None) -> Iterator[Json]:
    seed = asked.recipe.seed + number
    recipe = begun(replace(asked.recipe, seed=seed), asked.directory / f"seed-{seed}")
    task = make_task(recipe)
    if task.pretrained:
        raise MicrogliaError("Copies part on the way from the initialization; leave the checkpoint out.")
    if asked.find:
        check_rewound(task, recipe, asked.at)
    config = method_config(recipe).train
    settings = {name: getattr(asked, name) for name in ("points", "recalibrate", "limit")}
    mark = FOUND if asked.find else None if masks is None else digest(masks)
    record = {"command": "instability", "recipe": as_dict(recipe), "masks": mark, **settings}
    run = Run(asked.directory / f"seed-{recipe.seed}", record, seed=recipe.seed, device=accelerator(recipe.device).device.type)
    gauge = Gauge(task, recalibrate=asked.recalibrate, limit=asked.limit, seed=recipe.seed)
    networks: dict[str, OfEpoch] = {"dense": lambda epoch: None}
    if masks is not None:
        networks["masked"] = lambda epoch: masks
    if asked.find:
        found = Rewound(task, run, recipe)
        networks |= {"imp": found.masks, "random": found.control}
    try:
        for name, of_epoch in networks.items():
            for epoch in asked.at:
                own = of_epoch(epoch)
                told = {"density": 1.0 if own is None else own.density, "masks": None if own is None else digest(own)}
                training = Training(task, run, config, own, name)
                for pair in range(asked.pairs):
                    seen = instability(training, epoch, gauge, points=asked.points, pair=pair)
                    yield {"network": name, **told, "seed": recipe.seed, "pair": pair, **seen}
    finally:
        run.close()


def summarize(rows: Sequence[Json]) -> list[Json]:
    """Returns mean and standard deviation (None of one) of the instability by network and epoch; stable where means are."""
    found: dict[tuple[str, int], list[Json]] = {}
    for row in rows:
        found.setdefault((row["network"], row["epoch"]), []).append(row)
    summary = []
    for (network, epoch), own in found.items():
        spread = {split: Spread.of([row["instability"][split] for row in own]).to_dict() for split in own[0]["instability"]}
        ends = {split: statistics.fmean(end for row in own for end in row["ends"][split]) for split in spread}
        stable = all(value["mean"] < STABLE for value in spread.values())
        summary.append(
            {
                "network": network,
                "density": own[0]["density"],
                "epoch": epoch,
                "n": len(own),
                "instability": spread,
                "error": ends,
                "stable": stable,
            }
        )
    return summary


def instability_table(told: Instability) -> Table:
    """Returns the instability of each network by the epoch at which its copies part."""
    table = Table("network", "parts at epoch", title=f"{told.task}: rise of the error (%) on the line between two copies")
    for title in ("train", "test", "error of the copies, test (%)", "stable"):
        table.add_column(title, justify="right")
    for row in told.summary:
        cells = []
        for split in ("train", "test"):
            value = row.instability[split]
            cells.append(f"{100 * value.mean:.2f}" + ("" if value.std is None else f" ± {100 * value.std:.2f}"))
        name = row.network if row.density == 1 else f"{row.network}, {100 * row.density:.3g} %"
        table.add_row(name, str(row.epoch), *cells, f"{100 * row.error['test']:.2f}", "yes" if row.stable else "no")
    return table


def _stable(told: Instability) -> list[str]:
    return [
        f"{name}: stable from epoch {epoch} on." if epoch is not None else f"{name}: not stable at any of these epochs."
        for name, epoch in told.stable_from.items()
    ]


def _settle(given: Json) -> Json:
    """Returns the options with masks to be found where a density is given.

    Raises:
        RecipeError: Masks are given and to be found.
    """
    if given["masks"] is not None and given["density"] is not None:
        raise RecipeError("Masks are either those of a run or found: give --masks or --density, not both.")
    return {**given, "find": given["density"] is not None}


register(
    Study(
        "instability",
        LISTED["instability"].sentence,
        Sensing,
        lambda asked: Work(lambda run: sense(asked).result),
        tables=lambda told: [instability_table(told), *_stable(told)],
        figures=figures,
        result=Instability,
        directory=lambda asked: asked.directory,
        settle=_settle,
        details=(
            "Dense alone; beside the masks of a run (--masks); or beside masks found for every seed and epoch by iterative "
            "magnitude pruning rewound to it, and random ones (--density)."
        ),
        example="microglia instability lenet-300-100 --data digits --at 0,1,2 train.epochs=4",
    )
)
