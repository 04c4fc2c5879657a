"""The command `connect`: the straight line and a trained curve between two networks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from microglia.cli.app import Data, Device, Json, Shown, command
from microglia.core.errors import MicrogliaError
from microglia.studies.connect.study import TRAINING, Connecting, connection_table, sentences
from microglia.studies.connect.study import connect as connect_networks
from microglia.train.optim import identity


@command
def connect(
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help="A run directory, or a saved model's.")],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help="Another, of the same architecture and data.")],
    curve: Annotated[str, typer.Option(help="bezier, chain, or none for the straight line alone.")] = "bezier",
    bends: Annotated[int, typer.Option(help="Trained points of the curve.")] = 1,
    data: Data = None,
    epochs: Annotated[int, typer.Option(help="Of the curve's training.")] = TRAINING.epochs,
    lr: Annotated[float, typer.Option(help="Its learning rate: held for half of it, then down to 1 %.")] = TRAINING.lr,
    batches: Annotated[int | None, typer.Option(help="Batches after which an epoch ends; default all.")] = None,
    points: Annotated[int, typer.Option(help="Places at which each path is measured.")] = 61,
    recalibrate: Annotated[int, typer.Option(help="Batches for the batch-norm statistics of every place.")] = 100,
    limit: Annotated[int | None, typer.Option(help="Batches of 256 of each split to look at; default all.")] = None,
    plane: Annotated[int, typer.Option(help="Rows and columns of a heat map of the plane; 0 for none.")] = 0,
    ensemble: Annotated[bool, typer.Option(help="Whether to average the networks along the curve.")] = False,
    seed: Annotated[int, typer.Option(help="Root of every random number.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Directory; the same command goes on there. Default under runs/.")] = None,
    device: Device = "auto",
    json_: Json = False,
) -> Shown:
    """Connect two trained networks: how high is the loss on the straight line, and on a curve trained between them?"""
    try:
        fit = replace(TRAINING, epochs=epochs, lr=lr, max_batches=batches)
    except ValueError as error:
        raise MicrogliaError(f"The curve cannot be trained so: {error}.") from error
    asked = Connecting(
        (run_a, run_b), curve, bends, fit, data, points, recalibrate, limit, plane, ensemble, seed, out, device
    )  # fmt: skip
    asked = replace(asked, out=out if out is not None else _own_directory(asked))
    told = connect_networks(asked)
    pictures = "\n".join(f"Picture: {path}" for path in told["pictures"] if path.endswith((".png", ".html")))
    return told, [connection_table(told), *sentences(told), pictures]


def _own_directory(asked: Connecting) -> Path:
    """Returns the directory under runs/ of a connection: the same command, the same directory."""
    names = [Path(target).resolve().name for target in asked.targets]
    own = {**asdict(asked), "fit": identity(asdict(asked.fit))}
    told = {**own, "targets": [str(Path(target).resolve()) for target in asked.targets], "device": None, "out": None}
    mark = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=3).hexdigest()
    return Path("runs") / f"connect-{names[0]}-{names[1]}-{mark}"
