"""Which ways of the layers together make a whole model worth timing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from microglia.runtime.precisions import Precision
from microglia.runtime.report import is_dense

CONTIGUOUS = ("rows 4x1", "unstructured")
"""Ways to run a layer with contiguous input and output; all others keep channels last."""
CHAINED = 1.3
"""How many times as long as a layer's fastest way its blocks may take to join a chain; the time of the whole model decides."""
Found = Mapping[str, tuple[Any, float]]
"""Name of a way -> the way, and its milliseconds."""


def choices_of(measured: Sequence[Found], precision: Precision) -> dict[str, list[str]]:
    """Returns the whole models to time: title -> the way of each layer.

    One has each layer's fastest way that keeps channels last, one its fastest way: a layer in another layout makes its
    neighbours copy. One has blocks also where they are a little slower alone, in dense layers too: consecutive ones become a
    chain, whose intermediate results are never converted. In a precision with ways beside the exact ones these are left to two
    more: one with each layer's fastest way, and one in which every layer rounds, for values are converted between a layer that
    does and one that does not. Only the time of the whole model shows these costs.
    """
    exact = [{name: way for name, way in found.items() if not (precision.way and precision.rounds(name))} for found in measured]
    titled = {
        "sparse": [_fastest(found, _keeps_layout) for found in exact],
        "sparse, mixed layouts": [_fastest(found) for found in exact],
        "sparse, chained": [_chained(found) for found in exact],
    }
    if precision.way:
        short = precision.way.partition(" ")[0]
        titled[f"sparse, {short}"] = [_fastest(found, _keeps_layout) for found in measured]
        titled[f"sparse, {short} wherever it can"] = [
            next(filter(precision.rounds, found), _fastest(found, _keeps_layout)) for found in measured
        ]
    chosen: dict[str, list[str]] = {}
    for title, names in titled.items():
        if names not in chosen.values():
            title = "dense, layer by layer" if all(map(is_dense, names)) else title  # noqa: PLW2901
            chosen[title + precision.suffix] = names
    return chosen


def _keeps_layout(name: str) -> bool:
    return name not in CONTIGUOUS


def _chained(found: Found) -> str:
    """Returns a layer's fastest way in blocks, unless it is much slower than the fastest of all."""
    best, blocks = _fastest(found, _keeps_layout), [name for name in found if name.startswith("block")]
    near = min(blocks, key=lambda name: found[name][1], default=best)
    return near if found[near][1] <= CHAINED * found[best][1] else best


def _fastest(found: Found, allowed: Callable[[str], bool] = lambda name: True) -> str:
    return min(filter(allowed, found), key=lambda name: found[name][1])
