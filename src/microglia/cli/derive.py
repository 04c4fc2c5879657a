"""The command of a study, derived from its frozen config: fields give names, types and defaults, the docstring the help."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import typer

from microglia.cli.fields import Asked, asked_of, declare, joined, option, parameter
from microglia.cli.options import Checkpoint, Data, Device, DeviceName, Json, Shown, given_recipe
from microglia.core.errors import MicrogliaError
from microglia.lab.recipe import Recipe, RecipeError, put, read_yaml, resolve
from microglia.studies.options import Option
from microglia.studies.study import Study, conduct

SHARED = {"data": Data, "checkpoint": Checkpoint, "device": Device}
"""Options that other commands have too."""
DENSITY = Annotated[float | None, typer.Option(help="Fraction of the prunable weights to keep, in (0, 1].")]
RECIPE = Annotated[Path | None, typer.Option(help="YAML recipe; options and KEY=VALUE override it.")]
WORDS = Annotated[
    list[str] | None, typer.Argument(metavar="[MODEL] [KEY=VALUE]...", help="A model, then settings of the recipe.")
]
SHOWN = (".png", ".html")
"""Forms of a figure whose paths are printed."""


def derived(study: Study[Any, Any]) -> Callable[..., Any]:
    """Returns the function of a study's command, for `microglia.cli.app.command`.

    Args:
        study: Any study; its config's fields become the options.
    """

    def function(**given: Any) -> Shown:
        told = conduct(study, configured(study, given))
        pictures = "\n".join(f"Picture: {path}" for path in told["pictures"] if path.endswith(SHOWN))
        return told, [*study.tables(told.result), *([pictures] if pictures else [])]

    function.__name__ = study.name
    function.__doc__ = "\n\n".join(filter(None, (study.sentence, study.details)))
    parameters = [p for one in asked_of(study.config) for p in _parameters(one)]
    declare(function, [*parameters, parameter("json_", Json, False)])
    return function


def configured(study: Study[Any, Any], given: Mapping[str, Any]) -> Any:
    """Returns the config from the given options.

    Args:
        study: The study whose config is returned.
        given: The value of every option, as `derived` declares them.

    Raises:
        MicrogliaError: An option cannot be read or does not fit another.
    """
    settled = study.settle({name: value for name, value in given.items() if name != "json_"})
    known = [one for one in asked_of(study.config) if not one.option.hidden or one.name in settled]
    try:
        return study.config(**{one.name: _value(one, settled, study) for one in known})
    except ValueError as error:
        raise MicrogliaError(f"These options do not fit: {error}.") from error


# ------------------------------------------------------------------------------------------------------------- declaring
def _parameters(one: Asked) -> list[inspect.Parameter]:
    """Returns the parameters of a command that give a field."""
    if one.option.hidden:
        return []
    if one.option.recipe is not None:
        own = {"words": WORDS, "data": Data, "density": DENSITY, "recipe": RECIPE, "device": DeviceName}
        return [parameter(name, annotation, None) for name, annotation in own.items()]
    if one.option.parts is not None:
        return _parts(one)
    if one.option.words:
        return _words(one)
    if one.asked in SHARED:
        return [parameter(one.asked, SHARED[one.asked], one.default)]
    kind, default = one.type, one.default
    if one.option.repeated:
        kind, default = list[str], None
    elif one.sequence is not None:
        kind, default = str, None if one.default in (None, ()) else joined(one.default)
    elif get_origin(kind) is Literal:
        kind = str
    optional = one.optional or (one.sequence is not None and default is None)
    return [parameter(one.asked, option(kind, optional, one.help, one.option.least if one.sequence is None else None), default)]


def _parts(one: Asked) -> list[inspect.Parameter]:
    """Returns one option for each part of a field that is a dataclass."""
    found = {inner.name: inner for inner in asked_of(one.type)}
    parameters = []
    for name, part in (one.option.parts or {}).items():
        inner = found[part]
        kind = str if get_origin(inner.type) is Literal else inner.type
        parameters.append(parameter(name, option(kind, inner.optional, inner.help), getattr(one.default, part)))
    return parameters


def _words(one: Asked) -> list[inspect.Parameter]:
    """Returns the words of a command line that give a field: one, any number, or a fixed number."""
    kind = list[one.sequence] if one.sequence is not None else str  # type: ignore[name-defined]
    return [
        parameter(name, Annotated[kind, typer.Argument(metavar=name.upper(), help=one.help)], inspect.Parameter.empty)
        for name in one.option.words
    ]


# --------------------------------------------------------------------------------------------------------------- reading
def _value(one: Asked, given: Mapping[str, Any], study: Study[Any, Any]) -> Any:
    """Returns the value of a field."""
    if one.option.recipe is not None:
        return _recipe(one.option, given, study)
    if one.option.parts is not None:
        return replace(one.default, **{part: given[name] for name, part in one.option.parts.items()})
    if one.option.words:
        values = [given[name] for name in one.option.words]
        return tuple(values[0]) if one.sequence is not None else tuple(values) if len(values) > 1 else values[0]
    typed = given[one.name if one.option.hidden else one.asked]
    if one.sequence is None:
        return typed
    if typed is None or typed == []:
        return one.default
    return tuple(typed) if one.option.repeated else _read(one, typed)


def _read(one: Asked, text: str) -> tuple[Any, ...]:
    """Returns the values of a list such as ``1,3,5``.

    Raises:
        MicrogliaError: A value is invalid, or below the minimum.
    """
    words, least = [word for word in text.split(",") if word], one.option.least
    try:
        found = tuple(one.sequence(word) for word in words)
    except ValueError:
        found = ()
    if one.sequence is str or (found and (least is None or min(found) >= least)):
        return found
    kind = one.option.kind or ("whole numbers" if one.sequence is int else "numbers")
    low = "" if least is None else f" of at least {least}"
    example = one.option.example or joined((one.default or ())[:4])
    raise RecipeError(f"The {one.name} are {kind}{low} such as {example}; got {text!r}.")


def _recipe(how: Option, given: Mapping[str, Any], study: Study[Any, Any]) -> Recipe:
    """Returns the recipe from a model, settings and options.

    Raises:
        RecipeError: No model is named, or the recipe cannot be read.
    """
    words, file, run = list(given["words"] or []), given["recipe"], given.get(how.masked) if how.masked else None
    source = read_yaml(run / "recipe.yaml") if run is not None else dict(how.recipe or {})
    source |= read_yaml(file) if file is not None else {}
    typed = {
        "model": words.pop(0) if words and "=" not in words[0] else None,
        "data": given["data"],
        "prune.density": given["density"],
        "device": given["device"],
    }
    for key, value in typed.items():
        if value is not None:
            source = put(source, key, value)
    asked = given_recipe(source, words, file or run, typed=typed)
    if "model" not in asked and not isinstance(asked.get("task"), str):  # a user's own task brings its model
        raise RecipeError(
            f"Which model is to be trained? Name one, such as `{study.example}`, or give a --recipe that names one."
        )
    return resolve(asked)
