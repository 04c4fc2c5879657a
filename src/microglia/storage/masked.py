"""The change "masked": masks are buffers, so a file needs only their names and sizes beside the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from microglia.core.masks import MaskSet, masks_of
from microglia.storage.changes import Change, register_change


def _encode(masks: MaskSet) -> dict[str, Any]:
    return {name: {"shape": list(mask.shape), "kept": int(mask.sum())} for name, mask in masks.items()}


def _result(masks: MaskSet, model: nn.Module, dense: Callable[[], nn.Module]) -> dict[str, Any]:
    return {
        "masks": {"kept": masks.kept, "total": masks.total},
        "densities": {name: float(mask.float().mean()) for name, mask in masks.items()},
    }


register_change(
    "masks",
    Change(
        of=lambda model: masks_of(model) or None,
        encode=_encode,
        decode=lambda written, state: None,  # loading the weights attaches the masks that they hold; see core.restore
        replay=lambda model, masks: model,
        binds=False,
        zeroes=True,
        result=_result,
    ),
)
