"""The search of polarization for lambda and t: short trainings until the thresholds leave the operations that were asked.

The algorithm (spec: survey 8.3):
    bisect lambda in [0, largest] at t = 1.2 until the remaining operations are within 2 delta of the target
    then lower or raise t by 0.1 until they are within delta
Every short training is a probe: it starts from the same dense network, and its thresholds say what would remain.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

from microglia.methods.widths_observed import Probe

FIRST_T = 1.2
STEP_T = 0.1

Measure = Callable[[float, float], float]
"""(lambda, t) -> the fraction of operations that the thresholds leave after a short training."""


@dataclass(frozen=True)
class Strengths:
    """The end of a search.

    Attributes:
        strength: Lambda.
        t: Weight of a scale itself.
        probes: Every short training, in order.
    """

    strength: float
    t: float
    probes: tuple[Probe, ...]

    @property
    def told(self) -> list[dict[str, float]]:
        """The probes, JSON-ready."""
        return [asdict(probe) for probe in self.probes]


def find_strengths(measure: Measure, target: float, *, probes: int, largest: float, within: float) -> Strengths:
    """Returns lambda and t whose short training comes nearest to a target, after at most ``probes`` of these.

    Args:
        measure: Runs one short training.
        target: Fraction of operations to keep.
        probes: Maximum number of short trainings, at least 1.
        largest: Upper end of the interval of lambda.
        within: delta, the tolerated distance to the target.
    """
    low, high = 0.0, largest
    strength, t = (low + high) / 2, FIRST_T
    made: list[Probe] = []
    while len(made) < probes:
        made.append(Probe(strength, t, measure(strength, t)))
        off = made[-1].flops - target
        if abs(off) < within:
            break
        if abs(off) < 2 * within or made[-1].t != FIRST_T:  # near enough that t alone decides
            t = round(t + (STEP_T if off > 0 else -STEP_T), 6)
            if any((probe.strength, probe.t) == (strength, t) for probe in made):
                break  # the target lies between two steps of t
            continue
        low, high = (strength, high) if off > 0 else (low, strength)
        strength = (low + high) / 2
    best = min(made, key=lambda probe: abs(probe.flops - target))
    if abs(best.flops - target) >= within:
        warnings.warn(
            f"{target:.2f} of the operations were asked for, and the nearest of {len(made)} short trainings under polarization "
            f"leaves {best.flops:.2f}: the cut meets the budget outside the gap. Give more probes, longer ones, or a larger "
            "largest_strength.",
            stacklevel=2,
        )
    return Strengths(best.strength, best.t, tuple(made))
