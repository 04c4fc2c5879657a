"""The result of least squares over the number of features."""

from __future__ import annotations

from dataclasses import dataclass

from microglia.studies.result import Result


@dataclass(frozen=True)
class Risk(Result):
    """The risk at one number of features.

    Attributes:
        features: Number of features.
        risk: Simulated risk without a penalty.
        error: Its standard error.
        exact: Exact risk; None where it is infinite.
        ridge: Simulated risk with the best penalty.
        ridge_error: Its standard error.
    """

    features: int
    risk: float
    error: float
    exact: float | None
    ridge: float
    ridge_error: float


@dataclass(frozen=True)
class Risks(Result):
    """The risk over the number of features.

    Attributes:
        command: Name of the study.
        samples: Rows of the data.
        noise: Variance of the noise.
        signal: Squared length of the coefficients.
        draws: Data sets for each number of features.
        seed: Root of the draws.
        rows: The risks, in increasing order of features.
    """

    command: str
    samples: int
    noise: float
    signal: float
    draws: int
    seed: int
    rows: tuple[Risk, ...]
