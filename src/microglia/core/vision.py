"""torchvision, imported even where its compiled operators do not load."""

from __future__ import annotations

import importlib
from typing import Any

import torch

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""Schemas of the operators that torchvision looks up during its import."""

_declared: list[torch.library.Library] = []  # a schema lives as long as its library object


def import_torchvision() -> Any:
    """Imports torchvision, even if its compiled operators do not load.

    The wheel built for CUDA finds no CUDA libraries with a CPU-only torch. Its operators are then not registered, and the
    import ends in "operator torchvision::nms does not exist". Image classifiers need none of them, so in this one case the
    schemas are declared without an implementation and the import is tried again. A call of such an operator afterwards still
    raises torchvision's own error.

    Returns:
        The module.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        declare_operators()
        return importlib.import_module("torchvision")


def declare_operators() -> None:
    """Declares the unregistered schemas of `OPERATORS`; only for a torchvision whose library cannot load."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in OPERATORS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)  # type: ignore[no-untyped-call]
    _declared.append(library)
