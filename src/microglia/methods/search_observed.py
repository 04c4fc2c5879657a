"""The observation of methods that learn their masks."""

from __future__ import annotations

from dataclasses import dataclass, field

from microglia.storage.observations import observations


@dataclass(frozen=True)
class Snapshot:
    """The masks at one step of a search.

    Attributes:
        step: The step of the training.
        histogram: Number of units whose mask lies in each of several equal parts of [0, 1].
        undecided: Number of units whose mask is near neither 0 nor 1.
        temperature: Temperature of the soft masks, if the method has one.
    """

    step: int
    histogram: list[int]
    undecided: int
    temperature: float | None = None


@dataclass(frozen=True)
class Freeze:
    """The change when soft masks became exact.

    Attributes:
        step: The step of the training.
        units: Number of units.
        kept: Units that the exact mask keeps.
        undecided: Units whose soft mask was near neither 0 nor 1.
        largest: Maximum difference between a soft and an exact mask.
        mean: Mean difference.
        softens: Whether the masks of the method are ever soft.
        soft: Metrics on the validation split with the soft masks.
        hard: The same metrics with the exact masks.
    """

    step: int
    units: int
    kept: int
    undecided: int
    largest: float
    mean: float
    softens: bool = True
    soft: dict[str, float] = field(default_factory=dict)
    hard: dict[str, float] = field(default_factory=dict)


@observations.add("search")
@dataclass(frozen=True)
class Search:
    """The search of a method that learns its masks.

    Attributes:
        freeze: The change when the masks became exact; None before.
        history: The masks over the training.
        densities: Kept fraction by layer, or by group of coupled channels.
        flops: Kept fraction of the multiply-accumulates, where the budget of channels is of these.
    """

    freeze: Freeze | None = None
    history: list[Snapshot] = field(default_factory=list)
    densities: dict[str, float] = field(default_factory=dict)
    flops: float | None = None
