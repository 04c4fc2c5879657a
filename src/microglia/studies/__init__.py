"""Studies: one folder for each experiment, on the base `microglia.studies.study`.

The base is imported when one of its names is first used, because the list of commands needs `microglia.studies.listed` alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from microglia.core.registry import Registry
from microglia.studies.listed import LISTED

if TYPE_CHECKING:
    from microglia.studies.result import MeanStd, Result, Row, Told, decode, encode
    from microglia.studies.study import Figure, Study, Work, conduct, register

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

_OF_RESULT = ("MeanStd", "Result", "Row", "Told", "decode", "encode")


def __getattr__(name: str) -> Any:
    """Returns a name of the base, imported now."""
    if name in __all__:
        return getattr(import_module(f"microglia.studies.{'result' if name in _OF_RESULT else 'study'}"), name)
    raise AttributeError(f"module 'microglia.studies' has no attribute {name!r}")


def every_study() -> Registry[Study[Any, Any]]:
    """Imports every study of this library and returns all that are registered, by name."""
    from microglia.studies.study import studies

    for place in LISTED.values():
        import_module(f"microglia.studies.{place.folder}.study")
    return studies
