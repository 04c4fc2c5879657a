"""The task of a recipe: by kind, ``task: {kind: ..., ...}``, or a user's own function, ``task: package.module:function``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from microglia.core.errors import MicrogliaError
from microglia.core.registry import unknown_name
from microglia.storage.validation import adapter_of, problems
from microglia.tasks.kinds import DEFAULT, ClassificationOptions, kind_of_model, kinds
from microglia.tasks.own import own_task
from microglia.tasks.task import Task
from microglia.zoo.own_code import takes

if TYPE_CHECKING:
    from microglia.lab.recipe import Recipe

OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
"""Form of the name of a user's own function."""


class TaskFieldError(MicrogliaError):
    """A task of a recipe that is not valid; the text names the field."""


def settle_task(source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recipe's mapping with its task in the one form that `microglia.Recipe` has.

    ``task: {kind: classification, data: ...}`` becomes fields of the recipe, as in earlier versions. The options of another
        kind are filled in with their defaults. Data and model of a user's own task get the task's name.

    Raises:
        TaskFieldError: The task or one of its options is wrong, or a field of classification is given beside another task.
        UnknownNameError: The kind is unknown.
    """
    task = source.get("task")
    rest = {key: value for key, value in source.items() if key not in ("task", "task_options")}
    options = source.get("task_options") or {}
    if options and not (isinstance(task, str) and OWN.fullmatch(task)):
        raise TaskFieldError(
            "task_options are the keywords of a task package.module:function; give a kind its options in task."
        )
    if task is None and kind_of_model(rest.get("model")) == DEFAULT:
        return rest
    if isinstance(task, str) and OWN.fullmatch(task):
        _refuse_beside(rest, task, task)
        return {"model": task, **rest, "data": task, "task": task, **({"task_options": dict(options)} if options else {})}
    if isinstance(task, str) or task is None:
        task = {"kind": task}
    if not isinstance(task, Mapping):
        raise TaskFieldError(f"The task is a mapping such as {{kind: {DEFAULT}}}, or package.module:function; got {task!r}.")
    return _of_kind(dict(task), rest)


def spelled(source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recipe's mapping with a task that is a kind alone, ``task: language``, as the mapping that it stands for."""
    task = source.get("task")
    alone = isinstance(task, str) and not OWN.fullmatch(task)
    return {**source, "task": {"kind": task}} if alone else dict(source)


def named_kind(source: Mapping[str, Any]) -> str:
    """Returns the kind of a recipe's task, as given or as its model implies; for a user's own task its name."""
    task = source.get("task")
    kind = task.get("kind") if isinstance(task, Mapping) else task
    return kind if isinstance(kind, str) else kind_of_model(source.get("model"))


def _of_kind(task: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    kind = task.pop("kind", None) or kind_of_model(rest.get("model"))
    if kind not in kinds:
        raise unknown_name("kind of task", kind, kinds)
    if kind != DEFAULT and "data" in rest and takes(kinds[kind].options, "data"):
        task.setdefault("data", rest["data"])
    options = asdict(_options(kind, task))
    if kind != DEFAULT:
        data = str(options.get("data", kind))
        _refuse_beside(rest, data, f"of kind {kind!r}")
        return {**rest, "data": data, "task": {"kind": kind, **options}}
    for key, value in task.items():
        if key in rest and rest[key] != value:
            raise TaskFieldError(f"{key} is given twice, as {rest[key]!r} and in task as {value!r}; give it once.")
    return {**rest, **task}


def _refuse_beside(rest: Mapping[str, Any], data: str, task: str) -> None:
    """Raises if a field of classification is given beside another task; fields that a resolved recipe adds are allowed."""
    usual = {**asdict(ClassificationOptions()), "data": data}
    for key, value in usual.items():
        if key in rest and rest[key] != value:
            raise TaskFieldError(
                f"{key} is a field of the task {DEFAULT}, and this recipe's task is {task}; give the task what it needs in "
                f"{'task_options' if OWN.fullmatch(task) else 'task'}."
            )


def _options(kind: str, given: Mapping[str, Any]) -> Any:
    try:
        return adapter_of(kinds[kind].options).validate_python(dict(given))
    except ValidationError as error:
        raise TaskFieldError(f"The task of kind {kind!r} is not valid: {problems(error, 'task', under='task.')}.") from None


def build_task(recipe: Recipe) -> Task:
    """Returns the task that a recipe names.

    Raises:
        MicrogliaError: Model, data, checkpoint or task are not valid.
    """
    if isinstance(recipe.task, str):
        name = recipe.task
        model = None if recipe.model == name else recipe.model
        return own_task(name, model, recipe.task_options, checkpoint=recipe.checkpoint, seed=recipe.seed)
    given = {"kind": DEFAULT, **{key: getattr(recipe, key) for key in asdict(ClassificationOptions())}}
    task = dict(recipe.task or given)
    kind = task.pop("kind")
    return kinds[kind].make(recipe.model, _options(kind, task), checkpoint=recipe.checkpoint, seed=recipe.seed)
