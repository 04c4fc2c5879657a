"""Families: labels and counts of runs for methods that the usual ones do not describe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from microglia.report.records import Record


@dataclass(frozen=True)
class Family:
    """A family's answers to the questions of a report's shared parts, instead of the usual answers.

    Attributes:
        applies: Tells whether a run belongs to the family.
        method: Returns the name of the run's row.
        asked: Returns the run's budget in words.
        strength: Returns a number to sort budgets, the weakest first.
        left: Returns the computed fraction of the dense multiply-accumulates; None if it is zero.
        shown: Recipe keys, or their prefixes before a dot, that the answers above already name.
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
    """Returns the family of a run, None if the usual answers hold."""
    return next((family for family in families if family.applies(record)), None)


def common_family(records: Iterable[Record]) -> Family | None:
    """Returns the common family of several runs, or None."""
    found = [family_of(record) for record in records]
    return found[0] if found and all(one is found[0] for one in found) else None


def left_of(record: Record) -> float | None:
    """Returns the fraction of the dense multiply-accumulates that a run's model computes; None if it is 0."""
    if (family := family_of(record)) is not None:
        return family.left(record)
    whole = record.dense.macs.total
    return (record.pruned.macs.effective / whole if whole else 1.0) or None


def checked(record: Record) -> Record:
    """Returns the run if it can be reported.

    Raises:
        ValueError: The run lacks fields that its family needs.
    """
    if (family := family_of(record)) is not None:
        family.check(record)
    return record
