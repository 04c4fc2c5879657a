"""Sizes of tensors in a configuration of transformers, for models whose layers differ in width: data, never code.

``config.json`` keeps every field of the dense architecture. Its ``model_type`` is "microglia", so that plain transformers
refuses the directory by this name, and a field of the same name lists the tensors with another shape.
`microglia.hugging_face` opens it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from microglia.core.errors import FileError
from microglia.graph.cutting.modules import apply_indices
from microglia.storage.files import write_atomic

SIZES = "microglia"
"""Type of the configuration, and its field with the sizes."""
FORMAT = 1
"""Version of this field. Its architecture is not named ``model_type``: transformers takes such a field for a configuration."""


def sizes_of(module: Any) -> dict[str, Any] | None:
    """Returns what a configuration must say beside its own fields, so that the class builds a model's shapes again.

    Args:
        module: A model of transformers.

    Returns:
        Version, type of the architecture, and tensor name -> shape where it differs; None if the class builds other tensors, or
        modules that compute with other numbers.
    """
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            built = type(module)(module.config)
    except Exception:
        return None
    dense, shapes = ({name: list(t.shape) for name, t in m.state_dict().items()} for m in (built, module))
    found = {name: shape for name, shape in shapes.items() if shape != dense.get(name)}
    if dense.keys() != shapes.keys() or misfit(found, dense) is not None:
        return None
    resize(built, found)
    if _numbers(built) != _numbers(module):
        return None
    return {"version": FORMAT, "architecture": module.config.model_type, "shapes": found}


def misfit(shapes: Mapping[str, Any], dense: Mapping[str, list[int]]) -> str | None:
    """Returns the first tensor whose shape is no part of the dense one, or None."""
    for name, shape in shapes.items():
        whole = isinstance(shape, list) and all(type(size) is int for size in shape)
        if not whole or len(shape) != len(dense[name]) or any(not 1 <= s <= d for s, d in zip(shape, dense[name], strict=True)):
            return name
    return None


def resize(module: nn.Module, shapes: Mapping[str, list[int]]) -> None:
    """Gives tensors of a model other shapes, in place: their first entries stay. Layers follow; shared tensors stay shared."""
    first = {name: {str(k): [*range(size)] for k, size in enumerate(shape)} for name, shape in shapes.items()}
    apply_indices(module, first, {})


def save_sized(module: Any, save_directory: str | Path, **options: Any) -> None:
    """Writes what ``save_pretrained`` writes, with the sizes of tensors in ``config.json``.

    Args:
        module: A cut model of transformers.
        save_directory: Directory, created if needed.
        options: Options of ``save_pretrained``; not ``push_to_hub``.

    Raises:
        FileError: No list of sizes describes the model.
    """
    name, own = type(module).__name__, sizes_of(module)
    if own is None:
        refuse(name)
    if options.get("push_to_hub"):
        raise FileError(f"save_pretrained of a {name} with layers of different widths only writes: upload the directory later.")
    vars(module.config).pop(SIZES, None)
    if own["shapes"]:
        setattr(module.config, SIZES, own)
    type(module).save_pretrained(module, save_directory, **options)
    path = Path(save_directory) / "config.json"
    if own["shapes"] and options.get("is_main_process", True):
        content = {**json.loads(path.read_text()), "model_type": SIZES, SIZES: own}
        write_atomic(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def refuse(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    """Raises `FileError` in the place of ``save_pretrained``."""
    raise FileError(
        f"The configuration of {name} cannot say the widths of this pruned model, so from_pretrained could not read it: use "
        "microglia.save(model, directory) and microglia.load(directory, fresh_model)."
    )


def _numbers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns the class of each module, and the whole numbers and tuples of them that it computes with, by path."""
    found = {}
    for path, module in model.named_modules():
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(module).items() if not k.startswith("_")}
        kept = {k: v for k, v in values.items() if all(type(n) is int for n in (v if isinstance(v, tuple) else (v,)))}
        found[path] = {**kept, "class": type(module)}
    return found
