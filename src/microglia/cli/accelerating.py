"""The command `accelerate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microglia.cli.app import command
from microglia.cli.options import Checkpoint, Data, Json, Shown, Target
from microglia.core.errors import RunError
from microglia.lab.accelerating import accelerated
from microglia.lab.target import open_target
from microglia.report.acceleration import acceleration_tables
from microglia.runtime.dense.kinds import execution_names
from microglia.storage.archive import save

EXAMPLE = "microglia accelerate runs/demo --batch 32 && microglia measure runs/demo/accelerated --batch 32"


def accelerate(
    target: Target,
    out: Annotated[Path | None, typer.Option(help="Directory of the accelerated model; default TARGET/accelerated.")] = None,
    data: Data = None,
    checkpoint: Checkpoint = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples per call, for which the kernels are chosen.")] = 1,
    precision: Annotated[str, typer.Option(help="float32; or bf16 or int8, which round.")] = "float32",
    executions: Annotated[str, typer.Option(help="Compared with: torch, all (installed), or names with commas.")] = "torch",
    json_: Json = False,
) -> Shown:
    """Choose a model's fastest execution by timing, and save it with its kernels: it is loaded without timing."""
    if out is None and not Path(target).is_dir():
        raise RunError(f"{target} is the name of a network: give the directory of its accelerated model by --out.")
    model, task = open_target(target, data, checkpoint)
    fast, record = accelerated(model, task, batch, against=execution_names(executions.split(",")), precision=precision)
    place = save(fast, out if out is not None else Path(target) / "accelerated")
    return {**record, "model": str(place)}, [*acceleration_tables(record), f"Model: {place}"]


command(accelerate, example=EXAMPLE)
