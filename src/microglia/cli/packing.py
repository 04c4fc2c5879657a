"""The commands `pack`, `unpack`, `inspect` and `eie`: a model as one small file, and what it costs to run from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from microglia import compress
from microglia.cli.app import Json, Shown, command
from microglia.compress.codebook import Initial
from microglia.compress.engine_rows import Machine, engine_rows
from microglia.core.budget import Budget
from microglia.core.errors import FileError, MicrogliaError
from microglia.lab.target import open_target
from microglia.report.packed import engine_table, packed_table
from microglia.storage.archive import PLAN, load, save
from microglia.storage.run import read_json

SUFFIX = ".mgpack"
Packed = Annotated[Path, typer.Argument(help="A packed file.")]


@command
def pack(
    target: Annotated[Path, typer.Argument(help="A run directory or a saved model's.")],
    bits: Annotated[str | None, typer.Option(help="Round to 2^bits - 1 shared values: 5, or type:Conv?d=8,*=5.")] = None,
    bytes_: Annotated[
        int | None, typer.Option("--bytes", help="Choose the bits of each layer for a file of at most that size.")
    ] = None,
    initial: Annotated[str, typer.Option(help="Initial centroids: linear, density or random.")] = "linear",
    exact: Annotated[bool, typer.Option("--exact", help="Find the best shared values by dynamic programming.")] = False,
    groups: Annotated[int, typer.Option(help="Codebooks of each layer, one for each group of output channels.")] = 1,
    out: Annotated[Path | None, typer.Option(help=f"File to write; default RUN/model{SUFFIX}.")] = None,
    json_: Json = False,
) -> Shown:
    """Write a model as one small file: shared values and positions, coded; nothing is rounded without --bits or --bytes."""
    path = out if out is not None else target / f"model{SUFFIX}"
    budget = None if bytes_ is None else Budget(bytes=bytes_)
    start: Initial = initial  # type: ignore[assignment] # kmeans refuses other words
    how: dict[str, Any] = {"initial": start, "exact": exact, "codebook_groups": groups}
    contents = compress.pack(_model(target), path, bits=_bits(bits), budget=budget, **how)
    return {"file": str(path), **contents.to_dict()}, [packed_table(contents, str(target)), f"File: {path}"]


@command
def unpack(
    file: Packed,
    out: Annotated[Path | None, typer.Option(help="Directory of the model; default FILE without its suffix.")] = None,
    json_: Json = False,
) -> Shown:
    """Read a packed file and save its model, bit for bit, as a directory that every command takes."""
    if out is None and not file.suffix:
        raise FileError(f"{file} has no suffix, so that no directory follows from its name: give one by --out.")
    directory = save(compress.unpack(file), out if out is not None else file.with_suffix(""))
    return {"model": str(directory)}, [f"Model: {directory}"]


@command
def inspect(file: Packed, json_: Json = False) -> Shown:
    """Show what a packed file holds: layers, density, bits by part, codebook, share of the file."""
    contents = compress.inspect(file)
    return {"file": str(file), **contents.to_dict()}, [packed_table(contents, str(file))]


@command
def eie(
    file: Packed,
    elements: Annotated[int, typer.Option(help="Processing elements.", min=1)] = 64,
    clock: Annotated[float, typer.Option(help="MHz.", min=1)] = 800,
    depth: Annotated[int, typer.Option(help="Depth of the queues.", min=1)] = 8,
    activations: Annotated[float, typer.Option(help="Fraction of the inputs that are not zero.", min=0, max=1)] = 0.35,
    seed: Annotated[int, typer.Option(help="Seed of the inputs that are zero.")] = 0,
    json_: Json = False,
) -> Shown:
    """Show what a packed file costs on EIE: cycles, balance, frames/s and energy of its linear layers.

    Inputs are zero at random. Energy is that of 45 nm: the engine's power times its time. The dense product reads every weight
    from DRAM.
    """
    machine = Machine(elements, clock, depth, activations, seed)
    layers = engine_rows(compress.open_packed(file), machine)
    return {"file": str(file), "layers": layers}, [engine_table(layers, machine, str(file))]


def _model(target: Path) -> nn.Module:
    """Returns the model of a run or a saved model; one of the user's own needs the run's recipe."""
    directory = target / "model" if (target / "model" / PLAN).is_file() else target
    if (directory / PLAN).is_file() and read_json(directory / PLAN).get("source"):
        return load(directory)
    return open_target(str(target))[0]


def _bits(text: str | None) -> int | dict[str, int] | None:
    """Returns the bits of a text such as ``5`` or ``type:Conv?d=8,*=5``.

    Raises:
        MicrogliaError: A number is missing.
    """
    if text is None:
        return None
    try:
        if "=" not in text:
            return int(text)
        parts = [part.rpartition("=") for part in text.split(",")]
        return {selector: int(number) for selector, _, number in parts}
    except ValueError:
        raise MicrogliaError(
            f"The bits are a number, or numbers by selector such as type:Conv?d=8,*=5; got {text!r}."
        ) from None
