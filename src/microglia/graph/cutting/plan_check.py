"""Checks that a file's plan has the right form, before anything is built or cut."""

from __future__ import annotations

import inspect
import keyword
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from microglia.core.errors import FileError
from microglia.graph.cutting.hugging_face import FIELDS
from microglia.graph.cutting.modules import NOTED

LARGEST = 2**26
"""Maximum total number of entries of a plan's example inputs; 268 MB in float32."""
SIZE = 2**31
"""Above every size and index of a plan."""


def check_form(source: Mapping[str, Any]) -> None:
    """Raises `FileError` unless every field of a plan in JSON has the right type."""
    forms: dict[str, Any] = {
        "kind": lambda v: v in ("module", "graph"),
        "kept": lambda v: _mapping(v, lambda by_dim: _mapping(by_dim, _indices, str.isdecimal)),
        "attributes": lambda v: _mapping(v, lambda own: _mapping(own, _sizes, NOTED.__contains__)),
        "biases": lambda v: _list(v, _text),
        "graphs": lambda v: _mapping(v, _example),
        "dynamic": lambda v: _list(v, _whole),
        "shapes": lambda v: _mapping(v, lambda two: _list(two, lambda one: _list(one, _whole)) and len(two) == 2),
        "parameters": lambda v: _list(v, _count) and len(v) == 2,
        "macs": lambda v: _list(v, _count) and len(v) == 2,
        "error": _finite,
        "found": _whole,
        "pruned": _whole,
        "notes": lambda v: _list(v, _text),
        "config": lambda v: _mapping(v, lambda fields: _mapping(fields, _whole, FIELDS.__contains__)),
    }
    for name, fits in forms.items():
        if name in source and not fits(source[name]):
            raise FileError(f"The plan of the shrunk model is damaged: {name!r} is not what a plan holds there.")


def check_names(names: Iterable[Any], model: nn.Module) -> None:
    """Raises `FileError` unless the model's forward takes each name: names become source code of its graph."""
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in names:
        sound = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
        if not sound or not (open_ended or name in parameters):
            raise FileError(f"The plan names the input {str(name)[:80]!r}, which the {type(model).__name__} does not take.")


def _example(value: Any) -> bool:
    if not isinstance(value, Mapping) or value.keys() != {"args", "kwargs"}:
        return False
    if not isinstance(value["args"], list | tuple) or not isinstance(value["kwargs"], Mapping):
        return False
    return _entries([*value["args"], *value["kwargs"].values()]) <= LARGEST


def _entries(value: Any) -> float:
    """Returns the number of entries of a written example's inputs; infinite for an invalid shape."""
    if isinstance(value, Mapping) and "shape" in value:
        shape = value["shape"]
        return math.prod(map(int, shape)) if _list(shape, _whole) and len(shape) <= 16 else math.inf
    if isinstance(value, Mapping):
        return _entries(list(value["items"].values())) if isinstance(value.get("items"), Mapping) else math.inf
    return sum(_entries(v) for v in value) if isinstance(value, list | tuple) else 1


def _indices(value: Any) -> bool:
    """Tells whether the value is a list of different indices, or such a list for each group."""
    if isinstance(value, list | tuple) and value and all(isinstance(v, list | tuple) for v in value):
        return all(_indices(v) and not any(isinstance(i, list | tuple) for i in v) for v in value)
    return _list(value, _whole) and len(set(value)) == len(value)


def _sizes(value: Any) -> bool:
    return _list(value, _whole) if isinstance(value, list | tuple) else _whole(value)


def _mapping(value: Any, fits: Any, key: Any = lambda name: True) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and key(k) and fits(v) for k, v in value.items())


def _list(value: Any, fits: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(fits, value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**63


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < SIZE


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value < math.inf
