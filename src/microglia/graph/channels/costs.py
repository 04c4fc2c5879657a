"""Parameters and multiply-accumulates of a model as functions of its widths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from microglia.graph.channels.groups import ChannelGroup
from microglia.graph.cutting.parts import Part
from microglia.graph.dims.atoms import Dim

Counts = dict[int, int]
"""Atom -> units kept."""


class Costs:
    """Parameters and multiply-accumulates of a model as functions of its widths.

    Args:
        parts: The traced parts of the model.
        groups: The groups that may change.
        parameters: Parameters of the whole model.
    """

    def __init__(self, parts: Sequence[Part], groups: Sequence[ChannelGroup], parameters: int) -> None:
        self.groups, self.units = groups, sum(g.rows * g.size for g in groups)
        self._count = parts[0].analysis.algebra.count
        self._parameters: list[Sequence[Dim]] = []
        self._macs: list[tuple[int, Sequence[Dim]]] = []
        for part in parts:
            unique = {id(t): name for name, t in part.analysis.trace.tensors.items() if isinstance(t, nn.Parameter)}
            self._parameters += [part.analysis.parameter_dims[name] for name in unique.values()]
            self._macs += [(part.weight, dims) for dims in part.analysis.macs.values()]
        self._untraced = 0
        self._untraced = parameters - self.parameters({})
        self.dense = {"params": self.parameters({}), "flops": self.macs({})}

    def _product(self, dims: Sequence[Dim], counts: Mapping[int, int]) -> int:
        return math.prod(self._count(d, counts) for d in dims)

    def parameters(self, counts: Mapping[int, int]) -> int:
        """Returns the remaining parameters, including those outside the traced parts."""
        return self._untraced + sum(self._product(dims, counts) for dims in self._parameters)

    def macs(self, counts: Mapping[int, int]) -> int:
        """Returns the remaining multiply-accumulates of the example batch."""
        return sum(weight * self._product(dims, counts) for weight, dims in self._macs)

    def fraction(self, term: str, counts: Mapping[int, int]) -> float:
        """Returns the remaining fraction of a budget's term."""
        if term == "density":
            return sum(g.rows * counts.get(g.atom, g.size) for g in self.groups) / self.units
        value = self.parameters(counts) if term == "params" else self.macs(counts)
        return value / max(1, self.dense[term])
