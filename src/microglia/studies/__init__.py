"""Studies: one folder for each experiment, on the base `microglia.studies.study`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from microglia.core.registry import Registry
from microglia.studies.listed import LISTED
from microglia.studies.result import MeanStd, Result, Row, Told, decode, encode
from microglia.studies.study import Figure, Study, Work, conduct, register, studies

__all__ = [
    "Figure",
    "MeanStd",
    "Result",
    "Row",
    "Study",
    "Told",
    "Work",
    "conduct",
    "decode",
    "encode",
    "every_study",
    "register",
]


def every_study() -> Registry[Study[Any, Any]]:
    """Imports every study of this library and returns all that are registered, by name."""
    for place in LISTED.values():
        import_module(f"microglia.studies.{place.folder}.study")
    return studies
