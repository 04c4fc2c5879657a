"""Observations: what a method tells of a run beside the usual measurements, each with its own type.

A method stores an observation as JSON (`microglia.storage.run.Run.observations`). A family registers the type under the same
name, so that a result or a report reads it back as that type.
"""

from __future__ import annotations

from typing import Any

from microglia.core.registry import Registry

observations: Registry[type[Any]] = Registry("observation")
"""Name of an observation -> its frozen dataclass; `observations.add(name)` is the decorator that registers one."""
