"""Observations: a method's own measurements of a run, each with its own type.

A method stores an observation as JSON (`microglia.storage.run.Run.observations`). A family registers the type under the same
name, so that a result or a report reads it as that type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from microglia.core.registry import Registry


class Observation:
    """Base of observations that the final table of a run shows; by default every method returns nothing."""

    def computed(self) -> dict[str, float]:
        """Returns fractions of the dense model's multiply-accumulates per input, by the label of the counting rule."""
        return {}

    def kept(self, others: Mapping[str, Any]) -> str:
        """Returns a description of the kept parts instead of the number of weights; ``others`` are its observations by name."""
        return ""


observations: Registry[type[Any]] = Registry("observation")
"""Name of an observation -> its frozen dataclass; `observations.add(name)` is the decorator that registers one."""
