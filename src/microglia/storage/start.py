"""Weights to start from, in the files that this library wrote: a saved model, a run, or a stage of a run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from microglia.core.errors import CheckpointError
from microglia.core.restore import without_masks
from microglia.storage.archive import WEIGHTS
from microglia.storage.files import ENTRY, parse, read_state, read_tensors


def read_start(path: str | os.PathLike[str]) -> dict[str, Tensor] | None:
    """Returns weights of a network as it is built, by name, from a file of this library; masks are written into them as zeros.

    Args:
        path: The directory of a run or of a saved model, its ``model.safetensors``, or a file of a run's ``stages``.

    Returns:
        None for everything else.

    Raises:
        CheckpointError: The saved network has other layers or widths than as it is built, or the stage holds no model.
        FileError: A file is damaged, or newer than this library.
    """
    path = Path(path)
    places = (path / WEIGHTS, path / "model" / WEIGHTS) if path.is_dir() else (path,)
    file = next((place for place in places if place.is_file()), None)
    kind = None if file is None else _kind(file)
    if file is None or kind not in _STATES:
        return None
    weights, removed = without_masks(_STATES[kind](file))
    if removed:
        text = f"{removed:,} weights in {path} are zero by masks; they start as zeros, and their masks are not taken over."
        warnings.warn(text, stacklevel=2)
    return weights


def _of_model(file: Path) -> dict[str, Tensor]:
    state, bound, _ = read_tensors(file, kind="weights")
    if bound is not None:  # the digest of changes that alter names, shapes or meaning of the weights
        raise CheckpointError(
            f"{file} holds a network whose layers or widths were changed, so that its weights fit no network as it is built; "
            f"continue with it in Python: microglia.load({str(file.parent)!r})."
        )
    return state


def _of_stage(file: Path) -> dict[str, Tensor]:
    content = read_state(file)
    state: Any = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} is a stage of a run without a model; take the run's directory.")
    return state


_STATES = {"microglia.weights": _of_model, "microglia.state": _of_stage}
"""Format of a file -> what reads the state of a network in it."""


def _kind(file: Path) -> str | None:
    """Returns the format that the header of a safetensors file names; None where it names none or cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = parse((opened.metadata() or {}).get(ENTRY, "{}"))
    except (SafetensorError, OSError, ValueError):
        return None  # whoever reads the file says what is wrong with it
    found = header.get("format") if isinstance(header, dict) else None
    return found if isinstance(found, str) else None
