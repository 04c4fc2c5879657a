"""The command `instability`: do two copies of a network that part at an epoch end in one basin?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microglia.cli.app import Data, DeviceName, Json, Shown, command, given_recipe
from microglia.lab.recipe import RecipeError, put, read_yaml, resolve
from microglia.studies.instability.study import Sensing, instability_table, sense


@command
def instability(
    words: Annotated[list[str] | None, typer.Argument(metavar="[MODEL] [KEY=VALUE]...")] = None,
    data: Data = None,
    at: Annotated[str, typer.Option(help="Epochs at which the copies part, such as 0,1,2,5.")] = "0,1,2,5",
    masks: Annotated[
        Path | None, typer.Option(help="A finished run: its recipe, and its masks beside the dense network.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Find masks of this density for every seed and epoch: iterative magnitude pruning rewound to it."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Initializations, each with masks of its own where --density is given.", min=1)
    ] = 1,
    pairs: Annotated[int, typer.Option(help="Pairs of noises for each.", min=1)] = 1,
    points: Annotated[int, typer.Option(help="Of the straight line between the copies.", min=3)] = 30,
    recalibrate: Annotated[int, typer.Option(help="Batches for the batch-norm statistics of every point.", min=0)] = 100,
    limit: Annotated[int | None, typer.Option(help="Batches of 256 of each split to look at; default all.", min=1)] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe; options override it.")] = None,
    device: DeviceName = None,
    out: Annotated[Path, typer.Option(help="Directory; the same command goes on there.")] = Path("runs/instability"),
    json_: Json = False,
) -> Shown:
    """Train two copies from each of some epochs on with other noise, and walk the straight line between them.

    Dense alone; beside the masks of a run (--masks); or beside masks found for every epoch and random ones (--density).
    """
    if masks is not None and density is not None:
        raise RecipeError("Masks are either those of a run or found: give --masks or --density, not both.")
    words = list(words or [])
    try:
        epochs = tuple(int(word) for word in at.split(","))
    except ValueError:
        raise RecipeError(f"The epochs are whole numbers such as 0,1,2,5; got {at!r}.") from None
    source = read_yaml(masks / "recipe.yaml") if masks is not None else {"method": "tickets", "prune": {"density": 1.0}}
    source = {**source, **(read_yaml(recipe) if recipe is not None else {})}
    given = {
        "model": words.pop(0) if words and "=" not in words[0] else None,
        "data": data,
        "prune.density": density,
        "device": device,
    }
    for key, value in given.items():
        if value is not None:
            source = put(source, key, value)
    from microglia.studies.instability.figures import draw  # slow to import

    resolved = resolve(given_recipe(source, words, recipe or masks, typed=given))
    told = sense(Sensing(resolved, epochs, out, masks, seeds, pairs, points, recalibrate, limit, density is not None))
    pictures = [str(path) for path in draw(told, out)]
    stable = [
        f"{name}: stable from epoch {epoch} on." if epoch is not None else f"{name}: not stable at any of these epochs."
        for name, epoch in told["stable_from"].items()
    ]
    return {**told, "pictures": pictures}, [instability_table(told), *stable, "\n".join(f"Written: {p}" for p in pictures)]
