"""Observations: what a method tells of a run beside the usual measurements, each with its own type.

A method stores an observation as JSON (`microglia.storage.run.Run.observations`). A family registers the type under the same
name, so that a result or a report reads it back as that type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from microglia.core.registry import Registry


class Observation:
    """Base of observations that the final table of a run shows; each method says nothing by default."""

    def computed(self) -> dict[str, float]:
        """Returns ways to count the multiply-accumulates per input: label -> fraction of the dense model's."""
        return {}

    def kept(self, others: Mapping[str, Any]) -> str:
        """Returns what the run kept, in words instead of the number of weights; ``others`` are its observations by name."""
        return ""


observations: Registry[type[Any]] = Registry("observation")
"""Name of an observation -> its frozen dataclass; `observations.add(name)` is the decorator that registers one."""
