"""Checks that a file's plan of gates has the right form and fits the weights, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from microglia.core.errors import FileError

Fits = Callable[[Any], bool]


def check_form(values: Any, choices: Mapping[str, Collection[str]]) -> None:
    """Raises `FileError` unless every field of a plan in JSON has the right type and range.

    Args:
        values: Values read from a file.
        choices: Allowed values of ``pool``, ``rule`` and a site's ``activation``.
    """
    fields: dict[str, Fits] = {
        "sites": lambda v: isinstance(v, list | tuple) and len(v) > 0 and all(_site(s, choices["activation"]) for s in v),
        "pool": lambda v: _text(v) and v in choices["pool"],
        "softmax": lambda v: isinstance(v, bool),
        "rule": lambda v: _text(v) and v in choices["rule"],
        "r": lambda v: isinstance(v, Mapping) and all(_number(r) and 0 < r <= 1 for r in v.values()),
        "keep": lambda v: isinstance(v, Mapping) and all(_size(kept) for kept in v.values()),
        "blocks": lambda v: isinstance(v, Mapping) and all(_size(block) for block in v.values()),
        "boost": lambda v: isinstance(v, bool),
        "static": lambda v: isinstance(v, bool),
    }
    _check(isinstance(values, Mapping), "it is no mapping")
    _check("sites" in values, "it names no sites")
    strange = next((str(name)[:80] for name in values if name not in fields), None)
    _check(strange is None, f"it holds {strange!r}, which this version does not know")
    for name, value in values.items():
        _check(fields[name](value), f"{name!r} is not what a plan holds there")
    _check_layers(values)


def _check_layers(values: Mapping[str, Any]) -> None:
    outputs = {site["layer"]: site["outputs"] for site in values["sites"]}
    once = len(outputs) == len(values["sites"]) == len({site["carrier"] for site in values["sites"]})
    _check(once, "two of its gates hang on one layer")
    blocks = values.get("blocks", {})
    for name in ("r", "keep", "blocks"):
        strange = next((layer for layer in values.get(name, {}) if layer not in outputs), None)
        _check(strange is None, f"{name!r} is of {str(strange)[:80]!r}, which has no gate")
    ragged = next((layer for layer, block in blocks.items() if outputs[layer] % block), None)
    _check(ragged is None, f"the filters of {ragged!r} are no whole number of blocks")
    units = {layer: count // blocks.get(layer, 1) for layer, count in outputs.items()}
    above = next((layer for layer, kept in values.get("keep", {}).items() if kept > units[layer]), None)
    _check(above is None, f"it keeps more filters of {above!r} than there are")


def check_weights(heads: Mapping[tuple[str, str], tuple[int, int]], weights: Mapping[str, Tensor]) -> None:
    """Raises `FileError` unless the file's weights hold every head, in the plan's shape.

    Args:
        heads: (layer, carrier) of each gate -> shape of its head's weight.
        weights: Weights by the names of the model's state.
    """
    for (layer, carrier), wanted in heads.items():
        for name, shape in {"weight": wanted, "bias": wanted[:1]}.items():
            found = weights.get(f"{carrier}.gate.{name}")
            got = None if found is None else tuple(found.shape)
            _check(got == shape, f"the {name} of the gate of {layer[:80]!r} should have shape {shape}, and has {got}")


def _check(sound: bool, reason: str) -> None:
    if not sound:
        raise FileError(f"The plan of the gates is damaged: {reason}.")


def _site(value: Any, activations: Collection[str]) -> bool:
    fields: dict[str, Fits] = {
        "layer": _text,
        "carrier": _text,
        "activation": lambda v: _text(v) and v in activations,
        "inputs": _size,
        "outputs": _size,
    }
    return (
        isinstance(value, Mapping) and value.keys() == fields.keys() and all(fits(value[name]) for name, fits in fields.items())
    )


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31
