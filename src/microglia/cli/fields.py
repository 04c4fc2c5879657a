"""Fields of frozen configs as options of a command: studies and `prune` derive theirs from here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from microglia.studies.options import described, option_of

OUT = "Directory of all files; the same command resumes there."


class Asked:
    """A field of a config, and its option.

    Attributes:
        name: Name of the field.
        option: Declaration of the option.
        asked: Name of the command's parameter.
        help: Its help text.
        kinds: Types that the field may have, without None.
        optional: Whether it may be None.
        default: Default of the field; `MISSING` if it must be given.
    """

    def __init__(self, one: Field[Any], hint: Any, text: str) -> None:
        self.name = one.name
        hint, self.option = option_of(hint)
        self.asked = (self.option.name or one.name).replace("-", "_")
        self.help = text or (OUT if self.asked == "out" else "")
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        self.kinds = tuple(part for part in parts if part is not NoneType)
        self.optional = NoneType in parts
        self.default: Any = one.default_factory() if one.default_factory is not MISSING else one.default

    @property
    def type(self) -> Any:
        """Type of the field without None; the first one of several."""
        return self.kinds[0]

    @property
    def sequence(self) -> Any:
        """Type of the elements of a tuple or sequence of any length; None for another field."""
        parts = get_args(self.type)
        several = get_origin(self.type) in (tuple, Sequence) and (len(parts) == 1 or parts[-1] is ...)
        return parts[0] if several else None

    @property
    def is_config(self) -> bool:
        """Whether the field holds a config of its own."""
        return is_dataclass(self.type)


def asked_of(config: type) -> list[Asked]:
    """Returns the fields of a config in order, each with its help text."""
    hints, texts = get_type_hints(config, include_extras=True), described(config)
    return [Asked(one, hints[one.name], texts.get(one.name, "")) for one in fields(config)]


def option(kind: Any, optional: bool, text: str, least: int | None = None, *flags: str, **settings: Any) -> Any:
    """Returns the annotation of an option.

    Args:
        kind: Type of its value.
        optional: Whether it may be left out without a default.
        text: Help.
        least: Smallest number; None for any.
        flags: The option as typed; by default the parameter's name.
        settings: Further settings of `typer.Option`.
    """
    return Annotated[kind | None if optional else kind, typer.Option(*flags, help=escape(text), min=least, **settings)]


def parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """Returns a parameter of a command's function."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def declare(function: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> None:
    """Gives a function of ``**keywords`` the signature that the command line reads."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]


def joined(values: Sequence[Any]) -> str:
    """Returns values as one word of a command line."""
    return ",".join(map(str, values))
