"""The change "gates": storage, replay and timing of a gated model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from microglia.dynamic.gate_plan import GatePlan
from microglia.dynamic.gates import attach_gates, gate_plan
from microglia.dynamic.gathered import Gathered
from microglia.dynamic.tuning import tune
from microglia.storage.changes import Change, register_change


def _executions(model: nn.Module, example: Tensor, batches: Callable[[], Sequence[Tensor]]) -> dict[str, Callable[[], object]]:
    """Returns the execution that computes only the chosen channels, on one batch after the other."""
    fast = Gathered(model, example)
    if example.device.type == "cpu":
        tune(fast)
    rounds = itertools.cycle(batches())
    return {"gathered": lambda: fast(next(rounds))}


register_change(
    "gates",
    Change(
        of=gate_plan,
        encode=GatePlan.to_dict,
        decode=GatePlan.from_dict,
        replay=attach_gates,
        chooses="gates",
        executions=_executions,
    ),
)
