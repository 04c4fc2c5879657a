"""Microglia: prune any PyTorch model, see it get measurably faster and smaller, and load the result anywhere.

`mask` writes zeros, `shrink` removes channels, `accelerate` makes blocks of zeros fast, `save` and `load` keep a model
without pickle, `pack` and `unpack` keep it in one small file. Pruners that step inside anybody's loop are in
`microglia.methods`, builders of tasks in `microglia.tasks`, experiments in `microglia.studies`. A name is imported when it is
first used, so that ``import microglia`` costs nothing.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from microglia.core.progress import Bar, show_with

if TYPE_CHECKING:
    from microglia import methods, studies, tasks
    from microglia.compress import pack, unpack
    from microglia.core.budget import Budget
    from microglia.core.errors import MicrogliaError
    from microglia.core.masks import fold, mask, masks_of
    from microglia.core.patterns import NM, Block, Channel, Unstructured
    from microglia.core.selection import select
    from microglia.dynamic.activations import sparse_activations
    from microglia.export import export
    from microglia.graph import permute_channels, prune_channels
    from microglia.graph.shrink import shrink
    from microglia.lab.execute import execute
    from microglia.lab.recipe import Recipe
    from microglia.measure import measure
    from microglia.report.hub import push
    from microglia.runtime.accelerate import accelerate
    from microglia.scores import score
    from microglia.storage.archive import load, save
    from microglia.tasks.task import Task
    from microglia.train.evaluate import evaluate
    from microglia.train.fit import fit
    from microglia.train.optim import FitConfig

    __version__: str

__all__ = [
    "NM",
    "Block",
    "Budget",
    "Channel",
    "FitConfig",
    "MicrogliaError",
    "Recipe",
    "Task",
    "Unstructured",
    "accelerate",
    "evaluate",
    "execute",
    "export",
    "fit",
    "fold",
    "load",
    "mask",
    "masks_of",
    "measure",
    "methods",
    "pack",
    "permute_channels",
    "prune_channels",
    "push",
    "save",
    "score",
    "select",
    "shrink",
    "sparse_activations",
    "studies",
    "tasks",
    "unpack",
]

_PLACES = {
    **dict.fromkeys(("NM", "Block", "Channel", "Unstructured"), "core.patterns"),
    **dict.fromkeys(("fold", "mask", "masks_of"), "core.masks"),
    **dict.fromkeys(("permute_channels", "prune_channels", "shrink"), "graph"),
    **dict.fromkeys(("load", "save"), "storage.archive"),
    **dict.fromkeys(("pack", "unpack"), "compress"),
    "Budget": "core.budget",
    "FitConfig": "train.optim",
    "MicrogliaError": "core.errors",
    "Recipe": "lab.recipe",
    "Task": "tasks.task",
    "accelerate": "runtime",
    "evaluate": "train.evaluate",
    "execute": "lab.execute",
    "export": "export",
    "fit": "train.fit",
    "measure": "measure",
    "push": "report.hub",
    "score": "scores",
    "select": "core.selection",
    "sparse_activations": "dynamic",
}
"""The module of every name at the top."""

_MOVED = {
    **dict.fromkeys(
        ("Acdc", "AtInit", "Awg", "Ftwt", "Gradual", "OneShot", "Pas", "Pdp", "Smart", "SparseTraining"), "methods"
    ),
    **dict.fromkeys(("build", "image_task"), "tasks"),
    **dict.fromkeys(("MaskSet", "enforce"), "core.masks"),
    **dict.fromkeys(("permutation_of", "plan_of"), "graph"),
    "Accelerated": "runtime",
    "Evidence": "scores",
    "Gathered": "dynamic",
    "load_data": "data",
    "mark_roles": "core.roles",
    "measure_latency": "measure",
    "prunable_layers": "core.layers",
    "recalibrate": "train.recover",
    "resolve": "lab.recipe",
    "soft_topk": "core.soft_topk",
}
"""The module of every name that version 0.1 had at the top: it still works there, and a warning names its place."""


def _bar(title: str, total: int, done: int) -> Bar:
    """Returns the bar that fits the terminal, notebook or log; its room is imported at the first one."""
    return import_module("microglia.train.progress").fitting(title, total, done)  # type: ignore[no-any-return]


show_with(_bar)


def __getattr__(name: str) -> Any:
    """Returns a public name, an older name, or a room such as ``microglia.data``, imported now."""
    if name == "__version__":
        from importlib.metadata import version  # slow to import

        return version("microglia")
    if name in _PLACES:
        value = globals()[name] = getattr(import_module(f"microglia.{_PLACES[name]}"), name)
        return value
    if name in _MOVED:
        place = f"microglia.{_MOVED[name]}"
        warnings.warn(f"microglia.{name} has moved; write `from {place} import {name}`.", DeprecationWarning, stacklevel=2)
        return getattr(import_module(place), name)
    if not name.startswith("_") and find_spec(f"microglia.{name}") is not None:
        return import_module(f"microglia.{name}")
    raise AttributeError(f"module 'microglia' has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    """Returns the public names, imported or not."""
    return sorted({*__all__, "__version__", *(name for name in globals() if name.startswith("__"))})


class _Package(ModuleType):
    """This module's class: the import of the room ``measure`` does not put the room over the verb of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
