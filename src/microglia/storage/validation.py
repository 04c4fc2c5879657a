"""Problems that pydantic finds in values from a file or a command line, in words for the reader."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

MOST, LONGEST = 20, 200
"""Problems that are told at once, and characters of each value in them."""


def adapter_of(kind: Any) -> TypeAdapter[Any]:
    """Returns what validates values of a class; it is made once, because that takes longer than to validate many values."""
    return _adapter_of(kind)


@cache
def _adapter_of(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def problems(error: ValidationError, whole: str, *, under: str = "") -> str:
    """Returns the problems of one value, each with its field and what was given there.

    Args:
        error: As pydantic raised it.
        whole: Name of the value itself, for a problem of no field.
        under: Prefix of the names of its fields, such as ``task.``.
    """
    found = error.errors()
    lines = []
    for problem in found[:MOST]:
        place = ".".join(str(part) for part in problem["loc"])
        silent = problem["type"] == "missing" or isinstance(problem["input"], Mapping)
        given = "" if silent else f"; got {brief(problem['input'])}"
        unknown = problem["type"].endswith("unexpected_keyword_argument") or problem["type"] == "extra_forbidden"
        message = "there is no such field" if unknown else problem["msg"].removeprefix("Value error, ")
        lines.append(f"{under + place if place else whole}: {message}{given}")
    return " | ".join([*lines, *([f"and {len(found) - MOST} more"] if len(found) > MOST else [])])


def brief(value: Any) -> str:
    """Returns a value as code, cut where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
