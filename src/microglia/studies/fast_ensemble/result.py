"""The result of fast geometric ensembling."""

from __future__ import annotations

from dataclasses import dataclass

from microglia.studies.result import Number, Result
from microglia.studies.space.ensembling import Cycles


@dataclass(frozen=True)
class Member(Result):
    """One member of the ensemble.

    Attributes:
        member: Its number, from 1.
        epoch: Epoch at its end.
        loss: Mean training loss of that epoch.
        accuracy: Test accuracy alone, in [0, 1].
        ensemble: Test accuracy of all members so far.
        seconds: Duration.
    """

    member: int
    epoch: int
    loss: Number
    accuracy: float
    ensemble: float
    seconds: float


@dataclass(frozen=True)
class FastEnsemble(Result):
    """The members and their ensemble.

    Attributes:
        task: Name of the task.
        target: The network, as given.
        cycles: Cycles of the learning rate.
        start: Test accuracy before.
        members: The members.
    """

    task: str
    target: str
    cycles: Cycles
    start: float
    members: tuple[Member, ...]
