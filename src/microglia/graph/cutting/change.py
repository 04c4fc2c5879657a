"""The change "shrunk": storage, replay and description of a smaller model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from microglia.graph.cutting.plan import PLAN, Plan, replay
from microglia.graph.cutting.removal import removal
from microglia.storage.changes import Change, register_change


def _result(plan: Plan, model: nn.Module, dense: Callable[[], nn.Module]) -> dict[str, Any]:
    """Returns the lost channels of each layer, for a run's result."""
    return {"removed": removal(dense(), model)}


register_change(
    "shrunk",
    Change(
        of=lambda model: getattr(model, PLAN, None),
        encode=lambda plan: plan.to_dict(),
        decode=lambda written, state: Plan.from_dict(written),
        replay=replay,
        alone=True,
        cuts=True,
        result=_result,
        was=lambda plan: plan.model,
        measured=lambda plan: {"shrunk_from": {"parameters": list(plan.parameters), "MACs": list(plan.macs)}},
    ),
)
