"""All that the command line knows of a config's fields beside their names, types and defaults: help texts, and how to ask."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin


@dataclass(frozen=True)
class Option:
    """How a field is asked for, where its name, type and default do not say it; a note in the field's ``Annotated`` type.

    Attributes:
        name: The option without dashes; empty for the field's name.
        words: Names of the words that give the field without an option: one, or as many as a tuple has; empty for an option.
        least: Smallest whole number; None for any.
        example: Values that the error names where the default has none, such as ``50,100``.
        kind: Name of the values of a list in errors; empty for numbers or whole numbers.
        repeated: Whether a list of words is given by the option again and again, instead of by commas.
        parts: Where the field is a dataclass: option -> field of it. The field's default gives the defaults.
        recipe: Where the field is a recipe: what a recipe holds before any word; None for another field.
        masked: Option with a run whose recipe is taken instead of ``recipe``; empty for none.
        hidden: Whether Python alone sets the field.
    """

    name: str = ""
    words: tuple[str, ...] = ()
    least: int | None = None
    example: str = ""
    kind: str = ""
    repeated: bool = False
    parts: Mapping[str, str] | None = None
    recipe: Mapping[str, Any] | None = None
    masked: str = ""
    hidden: bool = False


def option_of(hint: Any) -> tuple[Any, Option]:
    """Returns the type of a field without notes, and how the field is asked for.

    Args:
        hint: Type of the field, such as ``Annotated[int, Option(least=1)]``.
    """
    if get_origin(hint) is not Annotated:
        return hint, Option()
    kind, *notes = get_args(hint)
    return kind, next((note for note in notes if isinstance(note, Option)), Option())


def described(config: type) -> dict[str, str]:
    """Returns the help text of every field: what the "Attributes" of its class's docstring say of it.

    A config that is composed of parts has the texts of all parts. Marks of code are left out, and "None for" becomes
    "default:", for nobody types None.
    """
    found: dict[str, str] = {}
    for part in reversed(config.__mro__):
        found |= _attributes(inspect.cleandoc(vars(part).get("__doc__") or ""))
    return {name: re.sub(r"\bNone for\b", "default:", text).replace("`", "") for name, text in found.items()}


def _attributes(docstring: str) -> dict[str, str]:
    """Returns the entries under "Attributes" of a docstring."""
    found: dict[str, str] = {}
    block = docstring.partition("Attributes:\n")[2]
    for line in block.splitlines():
        if line and not line.startswith(" "):
            break
        if entry := re.match(r"    (\w+): (.*)", line):
            name = entry[1]
            found[name] = entry[2]
        elif line.strip():
            found[name] += f" {line.strip()}"
    return found
