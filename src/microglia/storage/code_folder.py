"""A run remembers where the code of a user's own model was, and finds it again where the run is trusted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from microglia.core.errors import FileError
from microglia.storage.run import read_json
from microglia.zoo.origin import import_from, module_of, origin_of
from microglia.zoo.trust import require_known_recipe

ENVIRONMENT = "environment.json"
"""File of a run that says where it ran, and under `CODE` where the module of its model was."""
CODE = "code"
MODEL_CODE = "model_code"
"""Under this of its model, where `CODE` is of a task of the user's own that takes another one's model."""


def _named(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the names in a recipe that may stand for code of the user's own, by where a run remembers their folders."""
    task, model = recipe.get("task"), recipe.get("model")
    if not isinstance(task, str):
        return {CODE: model}
    return {CODE: task} if model in (None, task) else {CODE: task, MODEL_CODE: model}


def origins(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a run remembers of the code that its recipe names; None for names of the library."""
    return {key: origin_of(str(name)) for key, name in _named(recipe).items()}


def admit(recipe: Mapping[str, Any], file: Path) -> None:
    """Raises as `microglia.zoo.trust.require_known_recipe`; of a trusted run, makes the code of its model and task importable.

    Args:
        recipe: As the file holds it, without what the user typed.
        file: The recipe; a run's own has the run's environment beside it.

    Raises:
        FileError: The file names what it may not name; the text says which module that is and where it was.
        ModelError: The module is not where it was.
    """
    names = _named(recipe)
    folders = {key: _remembered(file.parent, key, module_of(name)) for key, name in names.items()}
    require_known_recipe(recipe, file, folder=folders[CODE], model_folder=folders.get(MODEL_CODE))
    for key, folder in folders.items():
        if folder is not None:
            import_from(str(names[key]), folder, file.parent / ENVIRONMENT)


def _remembered(run: Path, key: str, module: str | None) -> str | None:
    """Returns the folder that a run remembers of a module; a file that does not say it so counts as not saying it."""
    if module is None or not (run / ENVIRONMENT).is_file():
        return None
    try:
        told = read_json(run / ENVIRONMENT).get(key)
    except FileError:
        return None
    if not isinstance(told, Mapping) or told.get("module") != module or not isinstance(told.get("folder"), str):
        return None
    folder: str = told["folder"]
    return folder if Path(folder).is_absolute() and "\0" not in folder else None
