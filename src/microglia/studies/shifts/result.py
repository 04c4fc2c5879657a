"""The result of a comparison on shifted images."""

from __future__ import annotations

from dataclasses import dataclass

from microglia.studies.result import MeanStd, Result


@dataclass(frozen=True)
class Condition(Result):
    """One model on images of one shift.

    Attributes:
        shift: Name of the shift, or ``clean``.
        severity: Severity, 1 to 5; 0 for clean images.
        accuracy: Accuracy, in [0, 1].
        macs: Multiply-accumulates over inputs, as fractions of the dense network's.
        agreement: Agreement of the masks with their targets; None for a model without gates.
    """

    optional = ("agreement",)

    shift: str
    severity: int
    accuracy: float
    macs: MeanStd
    agreement: dict[str, float] | None = None


@dataclass(frozen=True)
class ShiftedRun(Result):
    """One model under all conditions.

    Attributes:
        run: As given.
        name: Unique name in the table.
        dynamic: Whether it has gates.
        results: One for each condition, the clean images first.
    """

    run: str
    name: str
    dynamic: bool
    results: tuple[Condition, ...]


@dataclass(frozen=True)
class Shifts(Result):
    """Models on clean and on shifted images.

    Attributes:
        data: Name of the data set.
        inputs: Number of test images.
        runs: The models.
    """

    data: str
    inputs: int
    runs: tuple[ShiftedRun, ...]
