"""Weights to start from, in the files that this library wrote: a saved model, a run, or the dense stage of a run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from microglia.core.errors import CheckpointError
from microglia.core.restore import without_masks
from microglia.storage.archive import PLAN, WEIGHTS, read_saved
from microglia.storage.changes import written_changes
from microglia.storage.files import ENTRY, parse, read_state


def read_start(path: str | os.PathLike[str]) -> dict[str, Tensor] | None:
    """Returns weights of a network as it is built, by name, from a file of this library; masks are written into them as zeros.

    Args:
        path: The directory of a run or of a saved model, its ``model.safetensors``, or a file of a run's ``stages``.

    Returns:
        None for every other file.

    Raises:
        CheckpointError: The model has other changes than masks, or the stage holds no model.
        FileError: A file is damaged, or newer than this library.
    """
    path = Path(path)
    places = (path, path / "model") if path.is_dir() else (path.parent,) if path.name == WEIGHTS else ()
    directory = next((place for place in places if (place / PLAN).is_file()), None)
    if directory is None and not _is_stage(path):
        return None
    weights, removed = without_masks(_of_stage(path) if directory is None else _of_model(directory))
    if removed:
        text = f"{removed:,} weights in {path} are zero by masks; they start as zeros, and their masks are not taken over."
        warnings.warn(text, stacklevel=2)
    return weights


def _of_model(directory: Path) -> dict[str, Tensor]:
    plan, state = read_saved(directory)
    others = [key for key in written_changes(plan) if key != "masks"]
    if others:
        raise CheckpointError(
            f"{directory} holds a changed network ({', '.join(others)}), whose weights fit no network as it is built; "
            f"continue with it in Python: microglia.load({str(directory)!r})."
        )
    return state


def _of_stage(path: Path) -> dict[str, Tensor]:
    content = read_state(path)
    state: Any = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is a stage of a run without a model; take the run's directory.")
    return state


def _is_stage(path: Path) -> bool:
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            header = parse((file.metadata() or {}).get(ENTRY, "{}"))
    except (SafetensorError, OSError, ValueError):
        return False  # whoever reads the file says what is wrong with it
    return isinstance(header, dict) and header.get("format") == "microglia.state"
