"""Families: how a report reads the runs of methods that the usual labels and counts do not describe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from microglia.report.records import Record


@dataclass(frozen=True)
class Family:
    """What the shared parts of a report ask of a family's runs, instead of the usual answer.

    Attributes:
        applies: Whether a run is one of the family.
        method: Returns the name of its row.
        asked: Returns its budget in words.
        strength: Returns a number that sorts budgets, the weakest first.
        left: Returns the fraction of the dense multiply-accumulates that it computes; None for none at all.
        shown: Recipe keys, or their beginnings before a dot, that the answers above already name.
        patterned: Whether the lines of a figure should name the pattern.
        check: Raises ValueError, with the reason, for a run that cannot be reported.
    """

    applies: Callable[[Record], bool]
    method: Callable[[Record], str]
    asked: Callable[[Record], str]
    strength: Callable[[Record], float]
    left: Callable[[Record], float | None]
    shown: tuple[str, ...] = ()
    patterned: bool = True
    check: Callable[[Record], None] = lambda record: None


families: list[Family] = []
"""Filled by `microglia.report.section.register`."""


def family_of(record: Record) -> Family | None:
    """Returns the family of a run, None where the usual answers hold."""
    return next((family for family in families if family.applies(record)), None)


def common_family(records: Iterable[Record]) -> Family | None:
    """Returns the family that all of several runs are of, or None."""
    found = [family_of(record) for record in records]
    return found[0] if found and all(one is found[0] for one in found) else None


def left_of(record: Record) -> float | None:
    """Returns the fraction of the dense multiply-accumulates that a run's model computes; None where that is 0."""
    if (family := family_of(record)) is not None:
        return family.left(record)
    whole = record.dense.macs.total
    return (record.pruned.macs.effective / whole if whole else 1.0) or None


def checked(record: Record) -> Record:
    """Returns a run that can be reported.

    Raises:
        ValueError: It lacks what its family needs.
    """
    if (family := family_of(record)) is not None:
        family.check(record)
    return record
