"""Saving and loading a pruned model: safetensors and a JSON plan, no pickle anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from microglia.core.errors import FileError, MicrogliaError
from microglia.core.masks import masks_of, restore
from microglia.train.files import VERSION, check_header, read_tensors, write_atomic, write_tensors
from microglia.train.run import read_json
from microglia.zoo import build

PLAN, WEIGHTS = "plan.json", "model.safetensors"
SOURCE = "microglia_source"
"""Attribute under which `microglia.build` notes on a model how it was built."""


def save(model: nn.Module, directory: str | Path) -> Path:
    """Writes ``model.safetensors`` (weights, buffers, masks) and ``plan.json`` (how to build it, what is masked).

    Args:
        model: Any module, masked or folded. One that `microglia.build` made can be loaded by its directory alone.
        directory: Made if it is not there; a model saved there before is replaced, weights and plan each atomically.

    Returns:
        The directory.

    Raises:
        FileError: It cannot be written.
    """
    directory = Path(directory)
    mark = write_tensors(directory / WEIGHTS, model.state_dict(), kind="weights")
    plan = {
        "format": "microglia.model",
        "version": VERSION,
        "source": getattr(model, SOURCE, None),
        "class": type(model).__name__,
        "masks": {name: {"shape": list(m.shape), "kept": int(m.sum())} for name, m in masks_of(model).items()},
        "digest": mark,
    }
    write_atomic(directory / PLAN, json.dumps(plan, indent=2) + "\n")
    return directory


def load(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Returns the saved model, bit for bit.

    Args:
        directory: Where `save` put it.
        model: A freshly built model of the same architecture to load into; needed when the saved one was not made by
            `microglia.build`.

    Raises:
        FileError: A file is missing, damaged, truncated, foreign, or newer than this library; or the model does not fit.
    """
    directory = Path(directory)
    if not (directory / PLAN).is_file():
        raise FileError(f"{directory} holds no saved model: there is no {PLAN}.")
    plan = read_json(directory / PLAN)
    check_header(directory / PLAN, plan, "model")
    state, _, mark = read_tensors(directory / WEIGHTS, kind="weights")
    if mark != plan.get("digest"):
        raise FileError(f"{directory}: {WEIGHTS} and {PLAN} do not belong together; one of them was replaced.")
    model = model if model is not None else _build(directory, plan)
    try:
        return restore(model, state)
    except (RuntimeError, MicrogliaError) as error:
        raise FileError(f"The weights in {directory} do not fit {type(model).__name__}: {error}") from error


def _build(directory: Path, plan: dict[str, Any]) -> nn.Module:
    source = plan.get("source")
    if not isinstance(source, dict) or not {"name", "classes", "shape", "options"} <= source.keys():
        raise FileError(
            f"{directory} does not say how to build its {plan.get('class', 'model')}: pass a freshly built one, "
            "load(directory, model)."
        )
    return build(source["name"], classes=source["classes"], shape=tuple(source["shape"]), **source["options"])
