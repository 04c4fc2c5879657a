"""The result of an instability analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from microglia.studies.result import MeanStd, Result


@dataclass(frozen=True)
class CopyPair(Result):
    """Two copies of a network that part at an epoch, and the straight line between their ends.

    Attributes:
        network: ``dense``, ``masked``, ``imp`` or ``random``.
        density: Density of its masks.
        masks: Digest of its masks; None for the dense network.
        seed: Seed of the initialization.
        pair: Number of the pair of noises.
        epoch: Epoch at which the copies part.
        alphas: Places on the line, in [0, 1].
        error: Split -> error at each place.
        instability: Split -> rise of the error.
        stable: Whether no rise reaches 2 %.
        ends: Split -> error of both copies.
    """

    network: str
    density: float
    masks: str | None
    seed: int
    pair: int
    epoch: int
    alphas: tuple[float, ...]
    error: dict[str, tuple[float, ...]]
    instability: dict[str, float]
    stable: bool
    ends: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class EpochSummary(Result):
    """All pairs of one network and epoch.

    Attributes:
        network: Name of the network.
        density: Density of its masks.
        epoch: Epoch at which the copies part.
        n: Number of pairs.
        instability: Split -> rise of the error over pairs.
        error: Split -> mean error of the copies.
        stable: Whether no mean rise reaches 2 %.
    """

    network: str
    density: float
    epoch: int
    n: int
    instability: dict[str, MeanStd]
    error: dict[str, float]
    stable: bool


@dataclass(frozen=True)
class Instability(Result):
    """The instability of every network and epoch.

    Attributes:
        task: Name of the task.
        recipe: The recipe.
        rows: All pairs.
        summary: All networks and epochs.
        stable_from: Network -> first epoch from which on it is stable; None if there is none.
    """

    task: str
    recipe: dict[str, Any]
    rows: tuple[CopyPair, ...]
    summary: tuple[EpochSummary, ...]
    stable_from: dict[str, int | None]
