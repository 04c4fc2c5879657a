"""The command `tickets`: lottery tickets and their controls, level by level over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microglia.cli.app import Data, DeviceName, Json, Shown, command, given_recipe
from microglia.lab.recipe import RecipeError, put, read_yaml, resolve
from microglia.studies.tickets.statements import ARMS
from microglia.studies.tickets.study import Search, arm_table, find_tickets, statement_table


@command
def tickets(
    words: Annotated[list[str] | None, typer.Argument(metavar="[MODEL] [KEY=VALUE]...")] = None,
    data: Data = None,
    density: Annotated[float | None, typer.Option(help="Where the levels end; 0.035 after 15 levels of 20 %.")] = None,
    seeds: Annotated[int, typer.Option(help="Initializations, each with its own order of data.", min=1)] = 3,
    draws: Annotated[int, typer.Option(help="Of each random control, at every level and seed.", min=1)] = 1,
    arms: Annotated[str, typer.Option(help="Trained beside dense and iterative tickets.")] = ",".join(ARMS[2:]),
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe of the method tickets; options override it.")] = None,
    device: DeviceName = None,
    out: Annotated[Path, typer.Option(help="Directory of the runs and the figure; the same command goes on there.")] = Path(
        "runs/tickets"
    ),
    json_: Json = False,
) -> Shown:
    """Find lottery tickets and train their controls: iterative, one-shot, other initial weights, random masks."""
    words = list(words or [])
    source = {"method": "tickets", **(read_yaml(recipe) if recipe is not None else {})}
    given = {
        "model": words.pop(0) if words and "=" not in words[0] else None,
        "data": data,
        "prune.density": density,
        "device": device,
    }
    for key, value in given.items():
        if value is not None:
            source = put(source, key, value)
    resolved = resolve(given_recipe(source, words, recipe, typed=given))
    if resolved.prune["density"] is None and resolved.prune["params"] is None:
        raise RecipeError("Tickets need to know where the levels end: give --density, such as 0.035.")
    from microglia.studies.tickets.figures import draw  # slow to import

    told = find_tickets(Search(resolved, out, seeds, draws, tuple(arm for arm in arms.split(",") if arm)))
    pictures = [str(path) for path in draw(told, out)]
    shown = [arm_table(told), statement_table(told), "\n".join(f"Written: {path}" for path in pictures)]
    return {**told, "pictures": pictures}, shown
