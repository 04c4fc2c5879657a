"""The count of the papers on filter pruning: removed filters cost nothing, and the layers that read them cost as before."""

from __future__ import annotations

from collections.abc import Mapping

from microglia.core.errors import MicrogliaError
from microglia.measure.macs import Macs


def producer_macs(dense: Macs, filters: Mapping[str, tuple[int, int]]) -> int:
    """Returns the multiply-accumulates that published tables of filter pruning print for a smaller model.

    Each layer counts with the filters that it keeps, and with all of its former input channels. The exact count, by
    `microglia.measure.count_macs` of the smaller model, is lower: its layers read fewer channels too.

    Example:
        >>> producer_macs(Macs(300, 300.0, layers={"a": 100, "b": 200}), {"a.weight": (8, 4), "a": (8, 4)})
        250

    Args:
        dense: The count of the model before, with its layers.
        filters: Weight -> filters before and after; a weight without an entry keeps all.

    Raises:
        MicrogliaError: The count has no layers, or a weight has more filters after than before.

    Source: the README of HRank's public code, which says that its numbers leave consumer columns out.
    """
    if not dense.layers:
        raise MicrogliaError(
            "The papers' count goes layer by layer, and this one holds only sums: count the dense model again."
        )
    wrong = next((name for name, (before, after) in filters.items() if not 0 <= after <= before or before < 1), None)
    if wrong is not None:
        raise MicrogliaError(f"filters holds (before, after) with 0 <= after <= before; {wrong} has {filters[wrong]}.")
    total = dense.other
    for name, count in dense.layers.items():
        before, after = filters.get(name, (1, 1))
        total += count * after // before
    return total
