"""Spreads: the mean and the deviation of repeated runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (over n - 1) of n values; no deviation for one value."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Returns the spread of at least one value."""
        found = list(values)
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))

    def to_dict(self) -> dict[str, Any]:
        """Returns mean and deviation as JSON values."""
        return {"mean": self.mean, "std": self.deviation}
