"""The lottery-ticket experiment: tickets and their controls level by level over seeds, and what the paper says of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from microglia.core.errors import MicrogliaError
from microglia.lab.execute import make_task
from microglia.lab.recipe import Recipe, RecipeError, as_dict, begun, method_config
from microglia.methods import LotteryConfig, methods
from microglia.methods.lottery import Level, Tickets, levels_to
from microglia.report.spread import Spread
from microglia.storage.run import Run
from microglia.studies.listed import LISTED
from microglia.studies.options import Option
from microglia.studies.result import Told, decode
from microglia.studies.study import Study, Work, register
from microglia.studies.tickets.figures import figures
from microglia.studies.tickets.result import ArmLevel, TicketSearch
from microglia.studies.tickets.statements import ARMS, statements
from microglia.train.engine import accelerator

TITLES = {**{arm: arm for arm in ARMS}, "oneshot": "one-shot", "reinit": "re-initialized", "shuffle": "random mask"}
Json = dict[str, Any]


@dataclass(frozen=True)
class Search:
    """Which tickets to find, and which controls to train.

    Attributes:
        recipe: A recipe of the method ``tickets``; its density is where the levels end.
        directory: Directory of one run for each seed; the same command goes on there.
        seeds: Initializations, each with its own order of data.
        draws: Draws of each random control, at every level and seed.
        arms: Controls that are trained beside the dense network and the iterative tickets: other initial weights, random masks,
            one-shot tickets.
    """

    recipe: Annotated[Recipe, Option(recipe={"method": "tickets"})]
    directory: Annotated[Path, Option(name="out")] = Path("runs/tickets")
    seeds: Annotated[int, Option(least=1)] = 3
    draws: Annotated[int, Option(least=1)] = 1
    arms: tuple[str, ...] = ARMS[2:]


def find_tickets(asked: Search) -> Told[TicketSearch]:
    """Runs every arm of every seed, each level a durable stage, and returns what they tell.

    The result holds:

    - ``task``, ``headline`` and ``recipe``;
    - ``rows``: ``seed``, ``arm``, ``draw``, and the values of a level, see `microglia.methods.lottery.Tickets.told`;
    - ``summary``: mean and standard deviation over seeds and draws, by arm and level;
    - ``statements``: each statement of the paper, and whether it holds here.

    Raises:
        MicrogliaError: The recipe is not one of tickets, or what `microglia.lab.execute.execute` raises.
    """
    if unknown := [arm for arm in asked.arms if arm not in ARMS[2:]]:
        raise RecipeError(f"The arms beside dense and iterative are {', '.join(ARMS[2:])}; got {unknown[0]!r}.")
    rows = [row for number in range(asked.seeds) for row in _of_seed(asked, number)]
    summary = summarize(rows)
    content = {
        "task": make_task(asked.recipe).name,
        "headline": "accuracy",
        "recipe": as_dict(asked.recipe),
        "rows": rows,
        "summary": summary,
        "statements": statements(summary),
    }
    return Told(decode(TicketSearch, content))


def _of_seed(asked: Search, number: int) -> list[Json]:
    seed = asked.recipe.seed + number
    recipe = begun(replace(asked.recipe, seed=seed), asked.directory / f"seed-{seed}")
    config = method_config(recipe)
    if not isinstance(config, LotteryConfig) or not config.iterative or config.control != "none":
        raise MicrogliaError(
            "The experiment needs the method 'tickets' with iterative=true and control=none; got the method "
            f"{recipe.method!r} with {recipe.prune}."
        )
    task = make_task(recipe)
    methods[recipe.method].check(task, config)
    record = {"command": "tickets", "recipe": as_dict(recipe), "arms": list(asked.arms), "draws": asked.draws}
    run = Run(asked.directory / f"seed-{recipe.seed}", record, seed=recipe.seed, device=accelerator(recipe.device).device.type)
    try:
        search = Tickets(task, run, config)
        return [
            {"seed": recipe.seed, "arm": arm, "draw": draw, **search.told(level)} for arm, draw, level in _levels(asked, search)
        ]
    finally:
        run.close()


def _levels(asked: Search, search: Tickets) -> Iterator[tuple[str, int, Level]]:
    """Yields every level of every arm of one seed."""
    level = dense = search.dense()
    yield "dense", 0, dense
    count = levels_to(search.pruner.weights, search.pruner.target, search.config.rate)
    at_once = Tickets(search.task, search.run, replace(search.config, iterative=False)) if "oneshot" in asked.arms else None
    for number in range(1, count + 1):
        level = search.below(level, number)
        yield "iterative", 0, level
        if at_once is not None:
            yield "oneshot", 0, at_once.below(dense, number)
        for arm in asked.arms:
            if arm in ("reinit", "shuffle"):
                for draw in range(asked.draws):
                    yield arm, draw, search.control(level, "reinit" if arm == "reinit" else "shuffle", draw)


def summarize(rows: Sequence[Json]) -> list[Json]:
    """Returns mean and standard deviation (None of one) over seeds and draws, by arm and level, in the order of `ARMS`."""
    found: dict[tuple[str, int], list[Json]] = {}
    for row in rows:
        found.setdefault((row["arm"], row["level"]), []).append(row)
    return [
        {
            "arm": arm,
            "level": level,
            "density": own[0]["density"],
            "n": len(own),
            "accuracy": Spread.of([row["test"]["accuracy"] for row in own]).to_dict(),
            "early_stop": Spread.of([row["early_stop"]["step"] for row in own]).to_dict(),
            "early_stop_accuracy": Spread.of([row["early_stop"]["validation_accuracy"] for row in own]).to_dict(),
        }
        for (arm, level), own in sorted(found.items(), key=lambda item: (ARMS.index(item[0][0]), item[0][1]))
    ]


def arm_table(told: TicketSearch) -> Table:
    """Returns accuracy and early-stop step of every arm against density, mean and standard deviation."""
    arms = [arm for arm in ARMS if any(row.arm == arm for row in told.summary)]
    steps = {row.end for row in told.rows if row.end is not None}
    at = f"at the end, step {', '.join(f'{step:,}' for step in sorted(steps))}" if steps else "at the end of training"
    table = Table("density", title=f"{told.task}: tickets and controls, test accuracy (%) {at} @ step of least validation loss")
    for arm in arms:
        table.add_column(TITLES[arm], justify="right")
    cells = {(row.arm, row.level): row for row in told.summary}
    for level in sorted({row.level for row in told.summary}):
        of_level = {arm: cells.get((arm, level)) for arm in arms}
        density = next(row.density for row in of_level.values() if row is not None)
        table.add_row(f"{100 * density:.1f} %", *(_cell(row) for row in of_level.values()))
    return table


def _cell(row: ArmLevel | None) -> str:
    if row is None:
        return ""
    accuracy, spread = row.accuracy.mean, row.accuracy.std
    deviation = "" if spread is None else f" ± {100 * spread:.2f}"
    return f"{100 * accuracy:.2f}{deviation} @ {row.early_stop.mean:.0f}"


def statement_table(told: TicketSearch) -> Table:
    """Returns what the paper says and what was found."""
    table = Table("what Frankle and Carbin 2019 say", "here", "found", title="Statements (outside one pooled standard error)")
    for row in told.statements:
        unknown = "cannot be told" if row.found else "no such level"
        verdict = {True: "holds", False: "does not hold", None: unknown}[row.holds]
        table.add_row(row.text, verdict, row.found)
    return table


def _begin(asked: Search) -> Work[TicketSearch]:
    if asked.recipe.prune["density"] is None and asked.recipe.prune["params"] is None:
        raise RecipeError("Tickets need to know where the levels end: give --density, such as 0.035.")
    return Work(lambda run: find_tickets(asked).result)


register(
    Study(
        "tickets",
        LISTED["tickets"].sentence,
        Search,
        _begin,
        tables=lambda told: [arm_table(told), statement_table(told)],
        figures=figures,
        result=TicketSearch,
        directory=lambda asked: asked.directory,
        example="microglia tickets lenet-300-100 --data mnist --density 0.035",
    )
)
