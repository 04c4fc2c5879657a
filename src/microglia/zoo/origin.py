"""The folder of the code of a user's own model: recorded from the import path, and found again from another folder."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from microglia.zoo.registry import ModelError
from microglia.zoo.trust import LIBRARIES


def module_of(name: object) -> str | None:
    """Returns the module of a model ``package.module:function``, None for any other model."""
    source, colon, _ = str(name).partition(":")
    return source if colon and source and source not in LIBRARIES else None


def origin_of(name: str) -> dict[str, str] | None:
    """Returns the ``module`` of a user's own model and the ``folder`` of its import.

    Args:
        name: The model's name. None is returned if it is not ``package.module:function`` or is not on the import path.
    """
    module = module_of(name)
    if module is None or (folder := _folder(module.partition(".")[0])) is None:
        return None
    return {"module": module, "folder": str(folder)}


def import_from(name: str, folder: str, where: object) -> None:
    """Makes the module of a user's own model importable from its recorded folder; the caller trusts the folder.

    The folder comes right before the current folder on the import path, so that it hides no library.

    Args:
        name: The model's name, ``package.module:function``.
        folder: Absolute path.
        where: The file that names the folder, for the message.

    Raises:
        ModelError: The module is not found, or another module of the same name comes first.
    """
    module = module_of(name)
    assert module is not None
    top = module.partition(".")[0]
    if PathFinder.find_spec(top, [folder]) is None:
        if _folder(top) is None:
            raise ModelError(
                f"{where} says that the code of {name} is the module {module!r} in {folder}, where it is not: start the "
                "command in the folder that has it, or put that folder on PYTHONPATH."
            )
        return
    if folder not in sys.path:
        here = [place for place, entry in enumerate(sys.path) if entry in ("", str(Path.cwd()))]
        sys.path.insert(here[0] if here else len(sys.path), folder)
        importlib.invalidate_caches()
    if (found := _folder(top)) != Path(folder).resolve():
        raise ModelError(
            f"{where} says that the code of {name} is the module {module!r} in {folder}, but a module of this name in {found} "
            "comes first: start the command where there is none."
        )
    warnings.warn(f"As trusted, the module {module!r} is imported from {folder}, which {where} names.", stacklevel=2)


def _folder(top: str) -> Path | None:
    """Returns the folder on the import path that holds a top-level module, imported or not."""
    try:
        spec: ModuleSpec | None = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # such as a module without a spec
        return None
    if spec is None:
        return None
    inside = list(spec.submodule_search_locations or ())
    if inside:
        return Path(inside[0]).resolve().parent
    return Path(spec.origin).resolve().parent if spec.origin is not None and spec.has_location else None
