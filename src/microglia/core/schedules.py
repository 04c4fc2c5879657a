"""Schedules: pure functions of progress in [0, 1] that lead from ``start`` to ``end`` density."""

from __future__ import annotations

from collections.abc import Callable

from microglia.core.registry import Registry

Schedule = Callable[[float, float, float], float]
"""(progress, start density, end density) -> density; progress is clamped to [0, 1]."""

schedules: Registry[Schedule] = Registry("schedule")


def _clamp(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)


@schedules.add("oneshot")
def oneshot(progress: float, start: float, end: float) -> float:
    """Returns ``end`` from the first moment on."""
    return end


@schedules.add("linear")
def linear(progress: float, start: float, end: float) -> float:
    """Returns the straight line from ``start`` to ``end``."""
    t = _clamp(progress)
    return (1 - t) * start + t * end


@schedules.add("cubic")
def cubic(progress: float, start: float, end: float) -> float:
    """Returns end + (start - end) (1 - t)^3: fast first, gentle at the end (Zhu and Gupta 2017, equation 1)."""
    t = _clamp(progress)
    return start if t == 0 else end + (start - end) * (1 - t) ** 3


@schedules.add("geometric")
def geometric(progress: float, start: float, end: float) -> float:
    """Returns start (end / start)^t: each equal step keeps the same fraction (iterative pruning, SynFlow)."""
    t = _clamp(progress)
    return end if t == 1 else start * (end / start) ** t
