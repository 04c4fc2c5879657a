"""Costs of the linear layers of a packed file on EIE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from microglia.compress.container import Container
from microglia.compress.eie import Costs, lay_out, simulate
from microglia.compress.grouped import GROUPED
from microglia.core.errors import FileError

MATRIX = 2
ALL = "all"
"""Name of the sum over the layers."""


@dataclass(frozen=True)
class Machine:
    """The engine and its input.

    Attributes:
        elements: Number of processing elements.
        clock: MHz.
        depth: Depth of the queues.
        activations: Fraction of the inputs that are not zero, in [0, 1].
        seed: Seed of the choice of these inputs.
    """

    elements: int = 64
    clock: float = 800.0
    depth: int = 8
    activations: float = 0.35
    seed: int = 0


def engine_rows(container: Container, machine: Machine) -> list[dict[str, Any]]:
    """Returns the costs of every linear layer with shared weights, and their sum, JSON-ready.

    A row has ``layer``, ``entries`` (fillers included), ``cycles``, ``ideal`` (cycles of a balanced engine), ``balance`` (in
    [0, 1]), ``frames`` (products in a second), and ``energy`` and ``dense_energy`` in microjoules.

    Args:
        container: An open packed file.
        machine: The engine and its input.

    Raises:
        FileError: The file has no linear layer with shared weights.
    """
    rows: list[dict[str, Any]] = []
    generator = np.random.default_rng(machine.seed)
    for name, row in container.rows.items():
        if row["form"] not in ("shared", GROUPED) or len(row["shape"]) != MATRIX:
            continue
        kept = container.decoded(name)[1].numpy()
        layout = lay_out(kept, machine.elements)  # cycles depend on where entries are, not on their values
        inputs = np.zeros(layout.columns)
        inputs[generator.choice(layout.columns, round(machine.activations * layout.columns), replace=False)] = 1
        cycles = simulate(layout, inputs, depth=machine.depth)
        own: dict[str, float] = {
            "entries": int(layout.codes.size),
            "cycles": cycles.total,
            "ideal": cycles.ideal,
            "energy": Costs().engine(cycles, machine.clock),
            "dense_energy": Costs().dense(layout.rows, layout.columns),
        }
        rows.append({"layer": name.replace("parametrizations.", "").removesuffix(".original"), **own})
    if not rows:
        raise FileError(f"{container.path} has no linear layer with shared weights: pack it with bits, such as --bits 4.")
    total = {"layer": ALL, **{key: sum(row[key] for row in rows) for key in rows[0] if key != "layer"}}
    return [_rated(row, machine) for row in (*rows, total)]


def _rated(row: dict[str, Any], machine: Machine) -> dict[str, Any]:
    cycles = row["cycles"]
    return {
        **row,
        "balance": row["ideal"] / cycles if cycles else 1.0,
        "frames": machine.clock * 1e6 / cycles if cycles else 0.0,
    }
