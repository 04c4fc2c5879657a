"""The command `sensitivity`: what each layer alone can lose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microglia.cli.app import command
from microglia.cli.options import Checkpoint, Data, Device, Json, Shown, Target
from microglia.core.errors import MicrogliaError
from microglia.studies.sensitivity.study import Probing, measure_sensitivity, sensitivity_table


@command
def sensitivity(
    target: Target,
    densities: Annotated[str | None, typer.Option(help="Of the one layer, such as 0.5,0.2,0.1.")] = None,
    pattern: Annotated[str, typer.Option(help="unstructured, block:OUTxIN, nm:N:M or channel.")] = "unstructured",
    score: Annotated[str, typer.Option(help="Name of a score; see `microglia methods`.")] = "magnitude",
    reduction: Annotated[str, typer.Option(help="Of the scores of a unit: mean, sum, max or l2.")] = "mean",
    layers: Annotated[list[str] | None, typer.Option(help="Selector of layers to look at; may be given again.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Selector of layers to leave out; may be given again.")] = None,
    split: Annotated[str, typer.Option(help="validation or train.")] = "validation",
    recalibrate: Annotated[int, typer.Option(help="Batches for the batch-norm statistics of every place.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Batches of 256 to look at, the same everywhere; default all.")] = None,
    data: Data = None,
    checkpoint: Checkpoint = None,
    seed: Annotated[int, typer.Option(help="Root of what is drawn.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Directory; default RUN/sensitivity; goes on there.")] = None,
    device: Device = "auto",
    json_: Json = False,
) -> Shown:
    """Show what each layer alone can lose: accuracy by layer and density, without retraining."""
    asked = Probing(
        target, _fractions(densities), pattern, score, reduction, tuple(layers or ("*",)), tuple(exclude or ()),  # type: ignore[arg-type]
        split, recalibrate, limit, data, checkpoint, seed, out, device,  # type: ignore[arg-type]
    )  # fmt: skip
    told = measure_sensitivity(asked)
    pictures = "\n".join(f"Picture: {path}" for path in told["pictures"] if path.endswith((".png", ".html")))
    return told, [sensitivity_table(told), *told["notes"], f"{pictures}\nScope: sensitivity:{told['file']}"]


def _fractions(text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(word) for word in text.split(","))
    except ValueError:
        raise MicrogliaError(f"The densities are fractions such as 0.5,0.2,0.1; got {text!r}.") from None
