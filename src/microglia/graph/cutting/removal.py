"""The record of a cut: the channels that each layer lost."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from microglia.core.layers import layer_kind
from microglia.graph.cutting.plan import plan_of
from microglia.measure.parameters import Weight, weights


def removal(dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    """Returns the record of a cut, JSON-ready: requested and reached budget, notes, shapes of weights before and after.

    Args:
        dense: The model before the cut.
        small: The shrunk model, masked or not.
    """
    plan = plan_of(small)
    after = {weight.name: list(weight.value.shape) for weight in weights(small)}
    layers = [
        {"name": w.name, "before": list(w.value.shape), "after": after[w.name], "outputs": _outputs(w)}
        for w in weights(dense)
        if w.value.ndim > 1 and len(after.get(w.name, ())) == w.value.ndim
    ]
    return {
        "kind": plan.kind,
        "asked": dict(plan.asked),
        "got": dict(plan.got),
        "groups": {"found": plan.found, "pruned": plan.pruned},
        "error": plan.error,
        "notes": list(plan.notes),
        "layers": layers,
    }


def _outputs(weight: Weight) -> int:
    """Returns the dimension of a weight that counts its layer's output channels."""
    kind = layer_kind(weight.module)
    return int(isinstance(weight.module, _ConvTransposeNd | nn.Embedding) or (kind is not None and kind.swapped))
