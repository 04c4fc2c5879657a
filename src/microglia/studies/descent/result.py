"""The result of a double descent: one row for each trained network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from microglia.studies.descent.double_descent import DescentConfig
from microglia.studies.result import Number, Result


@dataclass(frozen=True)
class Cell(Result):
    """One trained network; errors in [0, 1], losses in nats.

    Attributes:
        width: Width of the network.
        samples: Training images.
        parameters: Parameters of the network.
        train_error: Error on the noisy training labels.
        train_loss: Loss on the noisy training labels.
        test_error: Error on the true test labels.
        test_loss: Loss on the true test labels.
    """

    width: int
    samples: int
    parameters: int
    train_error: float
    train_loss: Number
    test_error: float
    test_loss: Number

    def place(self, over: str) -> int:
        """Returns the width or the number of samples."""
        return self.width if over == "width" else self.samples


@dataclass(frozen=True)
class Peak(Cell):
    """A cell whose test error stands above both sides.

    Attributes:
        height: Height above the higher of the two valleys.
    """

    height: float


@dataclass(frozen=True)
class Descent(Result):
    """Test error over widths, or over numbers of samples.

    Attributes:
        command: Name of the study.
        data: Name of the data set.
        config: Training of every network.
        over: Quantity that varies.
        rows: The networks, in increasing order of it.
        epsilon: Training error below which labels count as fitted.
        threshold: Smallest width that fits; None if none does.
        capacity: Largest number of samples that is fitted; None if none is.
        peak: The cell of the peak; None without one.
        chance: Error of guessing.
    """

    command: str
    data: str
    config: DescentConfig
    over: Literal["width", "samples"]
    rows: tuple[Cell, ...]
    epsilon: float
    threshold: int | None
    capacity: int | None
    peak: Peak | None
    chance: float
