"""Options that a method or a kind of task adds to `prune`: the fields of its config, with names, types, defaults and help.

A method registered from outside needs nothing more: its field ``its_field`` is the option ``--its-field``. A field with the
name of a shared option, such as ``seed``, is set by ``prune.seed=VALUE`` only; so is a field that is a config of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from typer import main as typer_main
from typer.core import TyperCommand
from typer.models import CommandInfo

from microglia.cli.fields import Asked, asked_of, declare, joined, option, parameter
from microglia.core.errors import MicrogliaError
from microglia.lab.recipe import Recipe, RecipeError, is_setting, named_method, override, put, read_yaml
from microglia.lab.recipe_task import OWN, named_kind, spelled
from microglia.methods import methods
from microglia.methods.config import Method
from microglia.methods.what import COMMON
from microglia.storage.plain_yaml import parse_yaml
from microglia.tasks.kinds import DEFAULT, kind_of_model, kinds

BEFORE = "Training"
"""Panel of the help before which the own options are listed."""
LINE = "microglia.line"
DECIDING = ("method", "model", "task", "task.kind", "prune.flops", "prune.ms", "prune.pattern")
"""Settings of a recipe on which its method and its kind of task depend."""
MOST = 4
"""Maximum number of owners that a sentence names."""


@dataclass(frozen=True)
class OwnOption:
    """An option that not every command line has.

    Attributes:
        asked: The field.
        owners: Methods and tasks that have it, by topic: ``method`` or ``task`` -> names.
        key: Setting of the recipe, such as ``prune.permute``; empty if this line's method and task do not have the option.
        panel: Heading in the help; empty for an option that is not listed.
        default: Default that the help prints.
    """

    asked: Asked
    owners: Mapping[str, Sequence[str]]
    key: str = ""
    panel: str = ""
    default: Any = None

    @property
    def flag(self) -> str:
        """The option as typed."""
        return f"--{self.asked.name.replace('_', '-')}"


@dataclass(frozen=True)
class Line:
    """A command line before its own options are read.

    Attributes:
        method: Name of its method.
        task: Kind of its task, or the name of a user's own task function.
        error: Why method or task are not known; None if they are.
        options: Its own options by name, with those that it may not use.
        given: Values of the typed ones.
    """

    method: str
    task: str
    error: MicrogliaError | None = None
    options: Mapping[str, OwnOption] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def declared(self) -> list[Any]:
        """Its own options as parameters of the command, which the parser and the values read."""
        return _declared(self.options.values())


class OwnOptionsCommand(TyperCommand):
    """A command with the options of the method and the task that its line names, in panels of their own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Adds the own options, parses the line, and sets the values of own options aside, for `own_settings`."""
        line = _read_line(super().make_parser(ctx), args)
        taken = {flag for param in super().get_params(ctx) for flag in param.opts}
        ctx.meta[LINE] = Line(line.method, line.task, line.error, _offered(line.method, line.task, taken))
        rest: list[str] = super().parse_args(ctx, args)
        for name in ctx.meta[LINE].options:
            if (value := ctx.params.pop(f"own_{name}", None)) is not None:
                ctx.meta[LINE].given[name] = value
        return rest

    def get_params(self, ctx: Any) -> list[Any]:
        """Returns the parameters of the command, and the own options before those of the training."""
        shared = list(super().get_params(ctx))
        if LINE not in ctx.meta:
            return shared
        place = next((n for n, one in enumerate(shared) if getattr(one, "rich_help_panel", None) == BEFORE), len(shared))
        return [*shared[:place], *ctx.meta[LINE].declared, *shared[place:]]


def own_settings(ctx: typer.Context) -> dict[str, Any]:
    """Returns the settings of the recipe that the own options of a line give, by key.

    Raises:
        MicrogliaError: Method or task of the line are not known, they do not have an option, or a value cannot be read.
    """
    line: Line = ctx.meta[LINE]
    if line.error is not None:
        raise line.error
    for name in line.given:
        if not line.options[name].key:
            raise _refusal(line.options[name], line)
    return {line.options[name].key: _value(line.options[name], given) for name, given in line.given.items()}


# ------------------------------------------------------------------------------------------------------- method and task
def _read_line(parser: Any, args: Sequence[str]) -> Line:
    """Returns the method and the task of a line, of which the shared options and KEY=VALUE alone are known."""
    parser.ignore_unknown_options = True
    found = parser.parse_args(args=list(args))[0]
    words = [word for word in found.get("words") or () if not word.startswith("-")]
    try:
        source = spelled(read_yaml(Path(found["recipe"])) if found.get("recipe") else {})
        typed = {"method": found.get("method"), "prune.pattern": found.get("pattern"), "task.kind": found.get("task")}
        typed |= {"prune.flops": found.get("flops"), "prune.ms": found.get("ms")}
        typed["model"] = next((word for word in words if kind_of_model(word) != DEFAULT), None)
        for key, value in typed.items():
            source = source if value is None else put(source, key, value)
        source = override(source, [word for word in words if word.partition("=")[0] in DECIDING])
        method, task = named_method(source), named_kind(source)
        _ = methods[method], None if OWN.fullmatch(task) else kinds[task]
    except MicrogliaError as error:
        return Line(Recipe.method, DEFAULT, error)
    return Line(method, task)


def _offered(method: str, task: str, taken: Collection[str]) -> dict[str, OwnOption]:
    """Returns every own option of the package by name: those of a method and a task, and the others without a key.

    Args:
        method: The method.
        task: The kind of task.
        taken: Options of the command itself.
    """
    own: dict[str, list[OwnOption]] = {}
    for name, one in methods.items():
        if name in (one.original, method):
            for asked in _fields(one):
                known = asked.name in COMMON or name == method
                key = f"prune.{asked.name}" if known else ""
                panel = f"Options of the method {method}" if name == method and is_setting(one.config, asked.name) else ""
                default = one.defaults.get(asked.name, asked.default)
                own.setdefault(asked.name, []).append(OwnOption(asked, {"method": [name]}, key, panel, default))
    for name, kind in kinds.items():
        for asked in asked_of(kind.options):
            key = "" if name != task else asked.name if task == DEFAULT else f"task.{asked.name}"
            panel = f"Options of the task {task}" if key else ""
            own.setdefault(asked.name, []).append(OwnOption(asked, {"task": [name]}, key, panel, asked.default))
    free = {name: found for name, found in own.items() if found[0].flag not in taken}
    return {name: _merged(found) for name, found in free.items() if not found[0].asked.is_config}


def _fields(method: Method) -> list[Asked]:
    return [asked for asked in asked_of(method.config) if asked.name in COMMON or is_setting(method.config, asked.name)]


def _merged(found: Sequence[OwnOption]) -> OwnOption:
    """Returns one option of those of the same name: the listed one, or one without a key if none or several are."""
    owners: dict[str, list[str]] = {}
    for one in found:
        for topic, names in one.owners.items():
            owners.setdefault(topic, []).extend(names)
    usable = [one for one in found if one.panel] or [one for one in found if one.key]
    first = (usable or found)[0]
    twice = len({one.key for one in usable}) != 1
    return OwnOption(first.asked, owners, "" if twice else first.key, "" if twice else first.panel, first.default)


def _refusal(one: OwnOption, line: Line) -> MicrogliaError:
    """Returns the sentence about an option that the method and the task of a line do not have, or both have."""
    here = {"method": line.method, "task": line.task}
    if all(here[topic] in one.owners.get(topic, ()) for topic in here):
        both = f"both the method {line.method} and the task {line.task} have the option {one.flag}"
        return RecipeError(f"Here {both}: give prune.{one.asked.name}=VALUE or task.{one.asked.name}=VALUE instead.")
    owners = " and ".join(_several(topic, names) for topic, names in one.owners.items())
    given = " and ".join(f"the {topic} here is {here[topic]}" for topic in one.owners)
    topic, names = next(iter(one.owners.items()))
    instead = f"--{topic} {names[0]}" if len(names) == 1 else f"one of them by --{topic}"
    return RecipeError(f"{one.flag} is an option of {owners}, and {given}: leave it out, or choose {instead}.")


def _several(topic: str, names: Sequence[str]) -> str:
    """Returns 'the method a', 'the methods a and b', or 'the methods a, b, c, d and 3 more'."""
    shown = [*names[:MOST], f"{len(names) - MOST} more"] if len(names) > MOST + 1 else list(names)
    return f"the {topic} {shown[0]}" if len(shown) == 1 else f"the {topic}s {', '.join(shown[:-1])} and {shown[-1]}"


# -------------------------------------------------------------------------------------------------- declaring and reading
def _declared(options: Iterable[OwnOption]) -> list[Any]:
    """Returns options as parameters of a command."""

    def function(**given: Any) -> None:
        """Holds the options for a moment."""

    parameters = []
    for one in options:
        kind, text = _kind(one.asked), f"{one.asked.help} {_default(one.default)}".strip()
        flags = f"{one.flag}/--no-{one.flag[2:]}" if kind is bool else one.flag
        listed = option(kind, True, text, None, flags, rich_help_panel=one.panel or None, hidden=not one.panel)
        parameters.append(parameter(f"own_{one.asked.name}", listed, None))
    declare(function, parameters)
    made = typer_main.get_command_from_info(
        CommandInfo(callback=function), pretty_exceptions_short=False, rich_markup_mode="rich"
    )
    return list(made.params)


def _default(value: Any) -> str:
    """Returns the sentence about a default; none where the help says it, and for what is off."""
    if value is None or value is MISSING or value is False or value in ("", ()) or isinstance(value, Mapping):
        return ""
    return f"Default: {'on' if value is True else joined(value) if isinstance(value, tuple) else value}."


def _kind(asked: Asked) -> type:
    """Returns the type of an option: that of a plain field, else text, which `_value` reads."""
    return asked.type if len(asked.kinds) == 1 and asked.type in (bool, int, float) else str  # type: ignore[no-any-return]


def _value(one: OwnOption, given: Any) -> Any:
    """Returns the value of a field from a typed one, such as [1, 2] from ``1,2``.

    Raises:
        RecipeError: The text is not YAML.
    """
    kinds = one.asked.kinds
    if not isinstance(given, str) or any(kind is str or get_origin(kind) is Literal for kind in kinds):
        return given
    lists = [kind for kind in kinds if get_origin(kind) in (tuple, Sequence)]
    if lists and get_args(lists[0])[0] is str:
        return given.split(",")
    if lists and given[:1] not in ("[", "{") and ("," in given or len(kinds) == 1):
        given = f"[{given}]"
    try:
        return parse_yaml(given)
    except ValueError as error:
        raise RecipeError(f"The value of {one.flag} is not valid YAML: {error}.") from None
