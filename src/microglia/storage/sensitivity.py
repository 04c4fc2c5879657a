"""The file of a sensitivity: curves measured by ``microglia sensitivity`` for the scope ``sensitivity:FILE``."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from microglia.core.allocation import scope_files
from microglia.core.errors import FileError
from microglia.core.sensitivity import LayerCurve, Sensitivity
from microglia.storage.files import VERSION, check_header, write_atomic
from microglia.storage.run import read_json

KIND = "sensitivity"
FILE = "sensitivity.json"
"""Name of the file in the directory of a study, and in the directory `FOLDER` of a run."""
FOLDER = "sensitivity"


def write_sensitivity(path: Path, found: Sensitivity, **notes: Any) -> None:
    """Writes measured curves with a digest.

    Args:
        path: The file.
        found: The curves; every loss is finite.
        notes: Further fields, JSON-ready, for the reader: the pattern, the split.

    Raises:
        FileError: The file cannot be written.
    """
    layers = {name: {"size": curve.size, "points": [list(p) for p in curve.points]} for name, curve in found.curves.items()}
    content = {**notes, "dense": found.dense, "layers": layers}
    header = {"format": f"microglia.{KIND}", "version": VERSION, "digest": _digest(content)}
    write_atomic(path, json.dumps({**header, **content}, indent=1) + "\n")


@scope_files.add(KIND)
def read_sensitivity(path: str | Path) -> Sensitivity:
    """Returns the curves of a file that `write_sensitivity` wrote.

    Args:
        path: The file, the directory of the study, or its run.

    Raises:
        FileError: The file is missing, damaged, of another kind, or newer than this library.
    """
    path = _file(Path(path))
    content = read_json(path)
    check_header(path, content, KIND)
    fields = {key: value for key, value in content.items() if key not in ("format", "version", "digest")}
    if content.get("digest") != _digest(fields):
        raise FileError(f"{path} is damaged: its content does not match its digest.")
    try:
        curves = {name: _curve(layer) for name, layer in fields["layers"].items()}
        return Sensitivity(_number(fields["dense"]), curves)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path} is damaged: it holds no curves of layers ({type(error).__name__}: {error}).") from error


def _file(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise FileError(f"There is no file {path}; `microglia sensitivity` writes one.")
        return path
    for found in (path / FILE, path / FOLDER / FILE):
        if found.is_file():
            return found
    raise FileError(f"The directory {path} holds no {FILE}; `microglia sensitivity {path}` writes one where that is a run.")


def _curve(layer: Mapping[str, Any]) -> LayerCurve:
    size = _count(layer["size"])
    points = tuple((_count(kept), _number(loss)) for kept, loss in layer["points"])
    if size < 1 or not points or not all(0 <= kept <= size for kept, _ in points):
        raise ValueError("a layer has no points, or keeps more weights than it has")
    return LayerCurve(size, points)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r:.40} is no number of weights")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r:.40} is no finite number")
    return float(value)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
