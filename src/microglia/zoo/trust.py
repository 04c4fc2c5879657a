"""Rules for models that a file names: known models may be built, others only if the caller trusts the file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from microglia.core.errors import FileError
from microglia.zoo.registry import FAMILIES, MODELS

_trusting: ContextVar[bool] = ContextVar("microglia_trust", default=False)

PLAIN = re.compile(r"[A-Za-z0-9][\w.\-]*")
HUB = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
LIBRARIES = {"timm": PLAIN, "torchvision": PLAIN, "hf": HUB}
"""Library -> the form of its plain model names. Folders, files and addresses have other forms."""

OPTIONS = {"pretrained": bool, "drop_rate": float, "drop_path_rate": float, "img_size": int, "patch_size": int, "maps": bool}
"""Options that a file may pass to one of these libraries, and their types; none is a path, a callable or remote code."""


@contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """Context in which files may name models of any kind; ``False`` changes nothing."""
    token = _trusting.set(trust or _trusting.get())
    try:
        yield
    finally:
        _trusting.reset(token)


def require_known(name: object, options: object, where: object, *, folder: str | None = None) -> None:
    """Raises unless a model that a file names is known or the caller trusts the file; builds and imports nothing.

    Args:
        name: Name of the model, as the file spells it.
        options: Options of the model, as the file spells them.
        where: The file, for the message.
        folder: Folder of the model's code according to the file, for the message.

    Raises:
        FileError: The model is unknown and the file not trusted; the text shows the name.
    """
    if not isinstance(name, str) or not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise FileError(f"{where} is damaged: it names no model with options, but {_short(name)} with {_short(options)}.")
    if _trusting.get() or _known(name, options):
        return
    given = f" with {_short(dict(options))}" if options else ""
    raise FileError(_refusal(where, "model", f"{_short(name)}{given}", name, folder))


def _refusal(where: object, what: str, shown: str, name: str, folder: str | None) -> str:
    place = f" (the module {_short(name.partition(':')[0])} in the folder {_short(folder)})" if folder is not None else ""
    return (
        f"{where} names the {what} {shown}{place}, which is none that this library builds from a file by itself, for it "
        f"may run code: look at {'the name' if folder is None else 'that module'} and, if you trust it, add --trust (in Python "
        f"pass the {what}, or trust=True)."
    )


def require_known_recipe(
    recipe: Mapping[str, Any], where: object, *, folder: str | None = None, model_folder: str | None = None
) -> None:
    """Raises as `require_known` for task and model of a recipe in a file, and for data that could be a folder with code.

    Args:
        recipe: As the file spells it.
        where: The file, for the message.
        folder: Folder of the code of the task, or of the model, according to the file, for the message.
        model_folder: Folder of the model's code, if it is another than the task's.
    """
    task, model = recipe.get("task"), recipe.get("model", "conv-2")
    if isinstance(task, str) and ":" in task:
        if not _trusting.get():
            raise FileError(_refusal(where, "task", _short(task), task, folder))
        folder = model_folder
    if model != task or not isinstance(task, str):  # a user's own task brings its own model, of the same name
        for holder in (recipe, task):
            given = holder.get("model_options") if isinstance(holder, Mapping) else None
            require_known(model, given or {}, where, folder=folder)
    _require_plain_data(recipe.get("data"), where)
    if isinstance(task, Mapping):
        _require_plain_data(task.get("data"), where)


def _require_plain_data(data: object, where: object) -> None:
    if isinstance(data, str) and data.startswith("hf:") and not _trusting.get() and not _of_hub(data.removeprefix("hf:")):
        raise FileError(
            f"{where} names the data {_short(data)}, which is no plain name on the hub, for a folder may bring code: look at "
            "it and, if you trust it, add --trust."
        )


def needs_trust(recipe: Mapping[str, Any]) -> bool:
    """Tells whether a recipe names something that needs the caller's trust."""
    token = _trusting.set(False)
    try:
        require_known_recipe(recipe, "the recipe")
    except FileError:
        return True
    finally:
        _trusting.reset(token)
    return False


def _known(name: str, options: Mapping[str, Any]) -> bool:
    source, colon, rest = name.partition(":")
    if not colon:  # the zoo's own builders check their options
        own = name in MODELS or any(name.startswith(prefix) for prefix in FAMILIES)
        return own and all(isinstance(value, bool | int | float | str) for value in options.values())
    if source not in LIBRARIES or not LIBRARIES[source].fullmatch(rest):
        return False
    if source == "hf" and not _of_hub(rest):
        return False
    return all(key in OPTIONS and _is(value, OPTIONS[key]) for key, value in options.items())


def _of_hub(name: str) -> bool:
    return HUB.fullmatch(name) is not None and not Path(name).exists()  # an existing folder takes precedence over the hub


def _is(value: object, kind: type) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    return isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
