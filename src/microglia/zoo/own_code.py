"""The user's own code by its name ``package.module:function``: imported, and called with the arguments of its signature."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from microglia.core.errors import UnknownNameError
from microglia.zoo.registry import ModelError


def function_of(name: str, what: str = "model", *, other: str = "") -> Callable[..., Any]:
    """Returns the function ``package.module:function``; this imports the module.

    Args:
        name: As above.
        what: Kind of the function's result, for messages.
        other: A sentence about other possible meanings of such a name, for messages.

    Raises:
        UnknownNameError: There is no such module, or the name is not in it.
        ModelError: The name is not a function.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module was found; an import inside it failed
        raise UnknownNameError(
            f"There is no module {module_name!r} for the {what} {name!r}: is its folder on PYTHONPATH?{other}"
        ) from error
    try:
        found = attrgetter(attribute)(module)
    except AttributeError as error:
        raise unknown(module_name, attribute, [n for n in vars(module) if n[0] != "_"], f"dir({module_name})", what) from error
    if not callable(found):
        raise ModelError(f"{name} is a {type(found).__name__}, not a function that returns a {what}.")
    return found  # type: ignore[no-any-return]


def called(name: str, function: Callable[..., Any], offered: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Calls a function with options by keyword, and with those offered arguments that its signature takes.

    Raises:
        ModelError: The options do not fit its signature, which the text shows.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # some callables written in C have none
        signature = inspect.Signature()
    arguments = {key: value for key, value in offered.items() if takes(function, key)} | dict(options)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ModelError(f"{name}{signature} cannot be called with {', '.join(arguments) or 'nothing'}: {error}.") from error
    return function(**arguments)


def takes(function: Callable[..., Any], keyword: str) -> bool:
    """Tells whether a function takes a keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return False
    named = any(p.name == keyword for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return named or any(p.kind is p.VAR_KEYWORD for p in parameters)


def unknown(source: str, name: str, known: Sequence[str], listing: str, what: str = "model") -> UnknownNameError:
    """Returns the error for a name that a source does not have, with the nearest names."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return UnknownNameError(f"There is no {source} {what} named {name!r}.{hint} {listing} lists all {len(known)}.")
