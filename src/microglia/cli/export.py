"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microglia.cli.app import command
from microglia.cli.exporting import Exporting, export_saved, export_table
from microglia.cli.options import Data, Json, Shown
from microglia.core.errors import MicrogliaError
from microglia.export.int8 import COUNT, MAX_DROP

EXAMPLE = "microglia export runs/demo --to onnx --accuracy"


def export(
    target: Annotated[Path, typer.Argument(help="A run directory or a saved model's.")],
    to: Annotated[str | None, typer.Option(help="onnx, openvino, program, executorch or hf; default by --out.")] = None,
    out: Annotated[Path | None, typer.Option(help="File or directory to write; default RUN/exported.onnx and so on.")] = None,
    data: Data = None,
    dynamic: Annotated[str, typer.Option(help="Free dimensions of the inputs, such as 0,2,3 for images of any size.")] = "0",
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators; default torch's.")] = None,
    accuracy: Annotated[bool, typer.Option("--accuracy", help="Evaluate the test split by that engine, and time it.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Round to 8 bits, calibrated on training data (openvino).")] = False,
    calibrate: Annotated[int, typer.Option(min=1, help="Training examples that calibrate --int8.")] = COUNT,
    max_drop: Annotated[float, typer.Option(help="Loss of validation score that --int8 may cost.")] = MAX_DROP,
    recover: Annotated[int, typer.Option(min=0, help="Steps of training with rounded layers where --int8 costs more.")] = 0,
    json_: Json = False,
) -> Shown:
    """Write a run's model as a file of another engine, compared with the model before it counts as written."""
    words = [word.strip() for word in dynamic.split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise MicrogliaError(f"--dynamic takes dimensions such as 0,2,3; got {dynamic!r}.")
    free = tuple(map(int, words))
    result = export_saved(Exporting(target, out, to, data, free, opset, accuracy, int8, calibrate, max_drop, recover))
    files = "\n".join(f"File: {file}" for file in result["export"]["files"])
    return result, [export_table(result), files]


command(export, example=EXAMPLE)
