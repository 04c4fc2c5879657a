"""The result of the lottery-ticket experiment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from microglia.studies.result import MeanStd, Result


@dataclass(frozen=True)
class LevelRow(Result):
    """One level of one arm; see `microglia.methods.lottery.Tickets.told`.

    Attributes:
        seed: Seed of the initialization.
        arm: Name of the arm.
        draw: Draw of a random control.
        level: Number of the level, 0 for dense.
        kept: Weights kept.
        density: Fraction of the weights kept.
        test: Metrics on the test split.
        train: Metrics on the training split.
        early_stop: ``step`` of the least validation loss and the headline there; None without a validation split.
        end: Last step of the training; None in files of version 0.1.0.
    """

    optional = ("end",)

    seed: int
    arm: str
    draw: int
    level: int
    kept: int
    density: float
    test: dict[str, float | None]
    train: dict[str, float | None]
    early_stop: dict[str, int | float] | None
    end: int | None = None


@dataclass(frozen=True)
class ArmLevel(Result):
    """One arm at one level over seeds and draws.

    Attributes:
        arm: Name of the arm.
        level: Number of the level.
        density: Fraction of the weights kept.
        n: Number of runs.
        accuracy: Test accuracy.
        early_stop: Step of the least validation loss.
        early_stop_accuracy: Validation accuracy at that step.
    """

    arm: str
    level: int
    density: float
    n: int
    accuracy: MeanStd
    early_stop: MeanStd
    early_stop_accuracy: MeanStd

    def measured(self, what: str) -> MeanStd:
        """Returns ``accuracy`` or ``early_stop``."""
        return self.accuracy if what == "accuracy" else self.early_stop


@dataclass(frozen=True)
class Verdict(Result):
    """A statement of the paper, and whether it holds.

    Attributes:
        text: The statement.
        holds: Whether it holds; None if the runs cannot tell.
        found: The numbers.
    """

    text: str
    holds: bool | None
    found: str


@dataclass(frozen=True)
class TicketSearch(Result):
    """Tickets and their controls.

    Attributes:
        task: Name of the task.
        headline: Name of the main metric.
        recipe: The recipe.
        rows: Every level of every arm and seed.
        summary: Every arm and level.
        statements: The statements.
    """

    task: str
    headline: str
    recipe: dict[str, Any]
    rows: tuple[LevelRow, ...]
    summary: tuple[ArmLevel, ...]
    statements: tuple[Verdict, ...]
