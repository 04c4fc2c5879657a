"""The result of a path through networks with dropped units."""

from __future__ import annotations

from dataclasses import dataclass

from microglia.studies.result import Number, Result


@dataclass(frozen=True)
class Place(Result):
    """One place of the built path.

    Attributes:
        segment: Number of the segment.
        kind: Kind of the segment.
        share: Share of the segment before the place, in [0, 1].
        loss: Loss there.
    """

    segment: int
    kind: str
    share: float
    loss: Number


@dataclass(frozen=True)
class BuiltPath(Result):
    """The built path; see `microglia.studies.dropout_paths.dropout_stability.examine_path`.

    Attributes:
        ends: Loss of both networks.
        dropped: Loss of each network with dropped units, from every hidden layer on.
        epsilon: Largest rise of each network's loss by dropped units.
        bound: Largest loss that the theorem allows.
        maximum: Largest loss of the path.
        barrier: Maximum less the larger end.
        segments: Number of segments.
        rows: Places of the path.
    """

    ends: tuple[Number, ...]
    dropped: tuple[tuple[Number, ...], ...]
    epsilon: tuple[Number, ...]
    bound: Number
    maximum: Number
    barrier: Number
    segments: int
    rows: tuple[Place, ...]


@dataclass(frozen=True)
class StraightLine(Result):
    """The straight line between both networks.

    Attributes:
        ts: Places, in [0, 1].
        loss: Loss at each.
        maximum: Largest loss.
        barrier: Maximum less the larger end.
    """

    ts: tuple[float, ...]
    loss: tuple[Number, ...]
    maximum: Number
    barrier: Number


@dataclass(frozen=True)
class PathComparison(Result):
    """The built path beside the straight line.

    Attributes:
        task: Name of the task.
        split: Part of the data.
        targets: Both networks, as given.
        hidden: Number of units of each hidden layer.
        rescale: Factor of kept units of both networks; None for all units over kept ones.
        notes: Remarks for the reader.
        path: The built path.
        line: The straight line.
    """

    task: str
    split: str
    targets: tuple[str, ...]
    hidden: tuple[int, ...]
    rescale: tuple[float | None, ...]
    notes: tuple[str, ...]
    path: BuiltPath
    line: StraightLine
