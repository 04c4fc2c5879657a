"""Distributions in a packed file: shared values, gaps between kept weights, and EIE's balance by the depth of its queues.

Source: Han et al. 2016, "Deep Compression", figure 5, and "EIE", figure 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from microglia.compress.container import Container
from microglia.compress.eie import lay_out, simulate
from microglia.compress.engine_rows import MATRIX, Machine
from microglia.compress.relative_index import gap_counts

GAP_BITS = 5
"""Bits of the gaps that are counted where the file has a code for every entry instead."""
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
"""Depths of the queues."""


@dataclass(frozen=True)
class Distributions:
    """The distributions in one layer with shared weights.

    Attributes:
        table: Shared values of the kept weights, ascending.
        counts: Kept weights of each value.
        gaps: Gap codes 0, 1, 2 ...: how often each occurs, fillers in the last one.
        balance: Load-balance efficiency of EIE, in [0, 1], for each of `DEPTHS`; empty for other layers than linear ones.
    """

    table: tuple[float, ...]
    counts: tuple[int, ...]
    gaps: tuple[int, ...]
    balance: tuple[float, ...] = ()


def distributions(container: Container, name: str, machine: Machine | None = None) -> Distributions:
    """Returns the distributions in a shared tensor of an open packed file.

    Args:
        container: An open packed file.
        name: Name of a tensor with the form ``shared`` or ``grouped``.
        machine: The engine; its depth is not used.
    """
    tensor, kept = container.decoded(name)
    table, counts = np.unique(tensor[kept].double().numpy(), return_counts=True)
    positions = np.flatnonzero(kept.reshape(-1).numpy())
    gaps = gap_counts(positions, container.rows[name].get("gap") or GAP_BITS)
    balance: Sequence[float] = ()
    if tensor.ndim == MATRIX and positions.size:
        balance = balances(kept.numpy(), machine or Machine())
    return Distributions(tuple(table.tolist()), tuple(counts.tolist()), tuple(gaps.tolist()), tuple(balance))


def balances(kept: npt.NDArray[np.bool_], machine: Machine) -> list[float]:
    """Returns the load-balance efficiency of a matrix for each of `DEPTHS`, with the same random inputs.

    Args:
        kept: Which weights are kept, boolean (m, n).
        machine: The engine; its depth is not used.
    """
    layout = lay_out(kept, machine.elements)
    inputs = np.zeros(layout.columns)
    count = round(machine.activations * layout.columns)
    inputs[np.random.default_rng(machine.seed).choice(layout.columns, count, replace=False)] = 1
    return [simulate(layout, inputs, depth=depth).balance for depth in DEPTHS]
