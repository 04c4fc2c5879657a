"""The folder of the code of a user's own model: a run records it, and uses it again if the run is trusted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from microglia.core.errors import FileError
from microglia.storage.run import read_json
from microglia.zoo.origin import import_from, module_of, origin_of
from microglia.zoo.trust import require_known_recipe

ENVIRONMENT = "environment.json"
"""File of a run with its environment, and under `CODE` the folder of its model's module."""
CODE = "code"
MODEL_CODE = "model_code"
"""Key of the model's folder, if `CODE` is the folder of a user's own task."""


def _named(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the names in a recipe that may be code of the user's own, by the key of their folder."""
    task, model = recipe.get("task"), recipe.get("model")
    if not isinstance(task, str):
        return {CODE: model}
    return {CODE: task} if model in (None, task) else {CODE: task, MODEL_CODE: model}


def origins(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of the code that a recipe names; None for names of the library."""
    return {key: origin_of(str(name)) for key, name in _named(recipe).items()}


def admit(recipe: Mapping[str, Any], file: Path) -> None:
    """Raises as `microglia.zoo.trust.require_known_recipe`; for a trusted run, makes the code of model and task importable.

    Args:
        recipe: Recipe in the file, without the user's options.
        file: File of the recipe; a run's own file has the run's environment beside it.

    Raises:
        FileError: The file names code that needs trust; the text gives the module and its folder.
        ModelError: The module is not in its folder.
    """
    names = _named(recipe)
    folders = {key: _remembered(file.parent, key, module_of(name)) for key, name in names.items()}
    require_known_recipe(recipe, file, folder=folders[CODE], model_folder=folders.get(MODEL_CODE))
    for key, folder in folders.items():
        if folder is not None:
            import_from(str(names[key]), folder, file.parent / ENVIRONMENT)


def _remembered(run: Path, key: str, module: str | None) -> str | None:
    """Returns the recorded folder of a module; a malformed record counts as missing."""
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
