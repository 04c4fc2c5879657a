"""A user's own YOLOv5 file (``.pt``), read without its code: a pickled module, of which only the tensors are taken."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.errors import CheckpointError
from microglia.zoo.checkpoint import load_state, read_state

ALLOWED = ("models.", "ultralytics.nn.", "torch.nn.modules.")
"""Beginnings of the names of classes that become empty stubs; a file with any other name is refused."""
DEEPEST = 64
"""Deepest nesting of modules."""
HEAD = "model.24."
LEFT_OUT = ("anchor_grid", "stride", "grid")
"""Buffers of the last layer that are computed."""
_PLACES = ("ema", "model")


def is_pickled_model(path: str | os.PathLike[str]) -> bool:
    """Tells whether a file holds a pickled module of the form that YOLOv5 writes; nothing of it runs."""
    return any(name.startswith(ALLOWED[:2]) for name in _classes(Path(path)))


def read_yolov5(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the weights in a YOLOv5 file, in float32, under the names of `microglia.zoo.yolov5.YOLOv5`.

    The classes that the file names become empty stubs, so that none of its code runs and none of its packages is needed.

    Raises:
        CheckpointError: The file names anything but modules, or holds no YOLOv5 of version 6 or 7.
    """
    path = Path(path)
    names = _classes(path)
    foreign = [name for name in names if not name.startswith(ALLOWED)]
    if foreign:
        raise CheckpointError(
            f"{path} names {foreign[0]}, which is no module of YOLOv5 and could run code, so that the file is refused; save "
            "its state_dict() alone where you trust it."
        )
    stubs: list[Any] = [(type(name.rpartition(".")[2], (object,), {}), name) for name in names]
    try:
        with torch.serialization.safe_globals(stubs):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises many types on a foreign file
        reason = str(error).strip().partition("\n")[0][:200].rstrip(".")
        raise CheckpointError(f"{path} cannot be read as a YOLOv5 file ({type(error).__name__}: {reason}).") from error
    places = [content.get(place) for place in _PLACES] if isinstance(content, Mapping) else []
    model = next((one for one in places if one is not None), None)
    state = {} if model is None else _tensors(model, "", 0, path)
    if f"{HEAD}m.0.weight" not in state:
        raise CheckpointError(f"{path} holds no YOLOv5 of version 6 or 7: it has no {HEAD}m.0.weight.")
    return {_ours(name): tensor for name, tensor in state.items() if not name.removeprefix(HEAD).startswith(LEFT_OUT)}


def load_yolov5(
    model: nn.Module, path: str | os.PathLike[str], *, head: str = "own", state: Mapping[str, Tensor] | None = None
) -> None:
    """Loads a YOLOv5 file, or a plain checkpoint of one, into a model of the zoo.

    Args:
        model: A model of `microglia.zoo.yolov5`.
        path: The file.
        head: ``own`` loads all of it; ``fresh`` keeps the model's own heads where the file has another number of classes.
        state: The tensors of the file by name, if they were read before.

    Raises:
        CheckpointError: The file is refused, or its weights do not fit the model.
    """
    state = dict(read_any(path) if state is None else state)
    if head == "fresh":
        own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("heads.")}
        same = all(name in state and state[name].shape == tensor.shape for name, tensor in own.items())
        state = state if same else {**state, **own}
    load_state(model, state, path)


def read_any(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the tensors of a YOLOv5 file or of a plain checkpoint, by name."""
    return read_yolov5(path) if is_pickled_model(path) else read_state(path)


def _classes(path: Path) -> list[str]:
    """Returns the names in a file of torch.save that the safe reader does not know; none for files of another form."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return []
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # damaged: the reader says so
        return []


def _tensors(module: Any, prefix: str, depth: int, path: Path) -> dict[str, Tensor]:
    """Returns parameters and buffers below a stub, in float32 where they are floating point."""
    if depth > DEEPEST:
        raise CheckpointError(f"{path} holds modules nested deeper than {DEEPEST}; no YOLOv5 is.")
    held = getattr(module, "__dict__", {})
    own = [entry for key in ("_parameters", "_buffers") if isinstance(entry := held.get(key), Mapping)]
    found = {f"{prefix}{name}": tensor for entry in own for name, tensor in entry.items() if isinstance(tensor, Tensor)}
    below = held.get("_modules")
    for name, child in below.items() if isinstance(below, Mapping) else ():
        found |= _tensors(child, f"{prefix}{name}.", depth + 1, path)
    return {name: tensor.detach().float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def _ours(name: str) -> str:
    if name.startswith(f"{HEAD}m."):
        return f"heads.{name.removeprefix(f'{HEAD}m.')}"
    return "anchors" if name == f"{HEAD}anchors" else name
