"""The commands `surface` and `descent`: the loss around a trained network, and test error over width or samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from microglia.cli.app import Checkpoint, Data, Device, Json, Shown, SplitName, Target, command
from microglia.core.errors import MicrogliaError
from microglia.studies.descent.double_descent import DescentConfig
from microglia.studies.descent.study import WIDTHS, Descending, descent_table, view_descent
from microglia.studies.surface.study import Surveying, surface_table, view_surface
from microglia.tasks.task import Split


@command
def surface(
    target: Target,
    side: Annotated[int, typer.Option(help="Places in each direction of the plane, odd.")] = 25,
    range_: Annotated[float, typer.Option("--range", help="How far from the network, in lengths of the directions.")] = 1.0,
    normalization: Annotated[str, typer.Option(help="Of the directions: filter, layer, weight or none.")] = "filter",
    limit: Annotated[int | None, typer.Option(help="Batches of 256 to look at, the same everywhere; default all.")] = None,
    split: SplitName = "train",
    trajectory: Annotated[bool, typer.Option("--trajectory", help="The plane of the training, where the run kept it.")] = False,
    data: Data = None,
    checkpoint: Checkpoint = None,
    seed: Annotated[int, typer.Option(help="Of the directions.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Directory; default RUN/surface. The same command goes on there.")] = None,
    device: Device = "auto",
    json_: Json = False,
) -> Shown:
    """Picture the loss around a network: a plane of contours and a line, filter-normalized."""
    asked = Surveying(
        target, side, range_, normalization, limit, _split(split), trajectory, data, checkpoint, seed, out, device  # type: ignore[arg-type]
    )  # fmt: skip
    told = view_surface(asked)
    pictures = "\n".join(f"Picture: {path}" for path in told["pictures"] if path.endswith((".png", ".html")))
    return told, [surface_table(told), *told["notes"], pictures]


@command
def descent(
    data: Data = None,
    family: Annotated[str, typer.Option(help="mlp, cnn, or a network with an option width, such as resnet8.")] = "mlp",
    widths: Annotated[str | None, typer.Option(help=f"Such as {','.join(map(str, WIDTHS))}, which is the default.")] = None,
    samples: Annotated[str | None, typer.Option(help="Numbers of training images instead, such as 50,100,200.")] = None,
    width: Annotated[int | None, typer.Option(help="The one width with --samples; default 16.")] = None,
    noise: Annotated[float, typer.Option(help="Fraction of the training labels made wrong.")] = 0.1,
    steps: Annotated[int, typer.Option(help="Optimizer steps, the same for all.")] = 4000,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    optimizer: Annotated[str, typer.Option(help="adam or sgd.")] = "adam",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    schedule: Annotated[str, typer.Option(help="constant, or root: lr / sqrt(1 + step // 512).")] = "constant",
    seed: Annotated[int, typer.Option(help="Root of every random number.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Directory; what is trained there is not trained again.")] = None,
    device: Device = "auto",
    json_: Json = False,
) -> Shown:
    """Train networks of growing width, or on growing data, with noisy labels: does the test error rise and fall again?"""
    if samples is not None and widths is not None:
        raise MicrogliaError("Give --widths, or --samples with one --width, not both: one of them varies at a time.")
    if samples is None and width is not None:
        raise MicrogliaError("--width is the one width of --samples; several are --widths, such as --widths 1,2,4.")
    config = DescentConfig(family, noise, steps, batch_size, optimizer, lr, schedule, seed)  # type: ignore[arg-type]
    counts = _numbers("samples", samples) if samples is not None else ()
    varied = _numbers("widths", widths) if widths is not None else WIDTHS
    if samples is not None:
        varied = (16 if width is None else width,)
    told = view_descent(Descending(config, varied, counts, data or "digits", out, device))
    pictures = "\n".join(f"Picture: {path}" for path in told["pictures"] if path.endswith((".png", ".html")))
    return told, [descent_table(told), pictures]


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise MicrogliaError(f"The {name} are whole numbers of at least 1 such as 1,2,4,8; got {text!r}.")
    return found


def _split(name: str) -> Split:
    for split in get_args(Split):
        if split == name:
            return split  # type: ignore[no-any-return]
    raise MicrogliaError(f"The split is train, validation or test; got {name!r}.")
