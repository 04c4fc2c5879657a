"""The memory that a run will need, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from microglia.lab.execute import make_task
from microglia.lab.recipe import Recipe, method_config
from microglia.methods import methods
from microglia.train.memory import MemoryNeed, need_of

ROWS = {
    "weights": "weights and buffers, with teacher and average",
    "masks": "masks",
    "gradients": "gradients",
    "optimizer": "states of the optimizer",
    "activations": "activations of a training batch",
    "evaluation": "largest layer of an evaluation, without a training",
    "method": "the method's own, while it chooses",
}
NOT_COUNTED = "The data in memory, and the libraries (about 500 MB), come on top."


def memory_of(recipe: Recipe) -> MemoryNeed:
    """Returns the memory that a recipe will need; it builds the model and reads the data, and trains nothing.

    Raises:
        MicrogliaError: Model, data, layers, pattern or budget are not valid.
    """
    task, config = make_task(recipe), method_config(recipe)
    methods[recipe.method].check(task, config)
    model = task.build()
    trainings = [config.train, *([] if task.pretrained else [config.dense])]
    return need_of(model, task, [one for one in trainings if one.epochs], method=config.own_bytes(model))


def before_run(recipe: Recipe, directory: Path) -> tuple[dict[str, Any], list[Any]]:
    """Returns the place of a run and the memory that it will need: as JSON, and to print."""
    need = memory_of(recipe)
    return {"directory": str(directory), "memory": need.to_dict()}, [f"Run: {directory}", memory_table(need)]


def memory_table(need: MemoryNeed) -> Table:
    """Returns what a run will hold, by part, with a warning below if this is more than is free."""
    free = "" if need.available is None else f" {_size(need.available)} are free now."
    warning = "" if need.fits else " It does not fit: take smaller batches, fewer score_batches, or another method."
    table = Table("memory", "bytes", "", title="before the run", caption=f"{NOT_COUNTED}{free}{warning}")
    for name, words in ROWS.items():
        table.add_row(words, f"{getattr(need, name):,}", _size(getattr(need, name)))
    table.add_row("at the same time, at most", f"{need.total:,}", _size(need.total), style="bold")
    return table


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
