"""Recovery for int8: where rounding costs more than the limit, a model that was trained for it takes the model's place.

A recovery counts only if it helps: the limit is held against the score in float32 of the model that was given. Training that
lowers the score in float32 hides nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from microglia.core.errors import ExportError
from microglia.export.int8 import Int8, Int8Report


@dataclass(frozen=True)
class Rounding:
    """How a model is rounded, perhaps after a recovery.

    Attributes:
        wish: How to calibrate and compare; its limit is that of the model to round.
        limit: The limit for the model that was given.
        before: Score in float32 and in int8 of the model that was given; None without a recovery.
    """

    wish: Int8
    limit: float
    before: tuple[float, float] | None = None

    def told(self, report: Int8Report) -> Int8Report:
        """Returns the report of the rounded model, held against the model that was given."""
        return replace(report, recovered_from=self.before, max_drop=self.limit)


def recovered(
    model: nn.Module, int8: Int8 | Iterable[Any] | None, rounded: Callable[[nn.Module, Int8], Int8Report]
) -> tuple[nn.Module, Rounding | None]:
    """Returns the model to export and how to round it: the given one where no recovery is asked for, needed or of use.

    Args:
        model: Model to export; it is left as it is.
        int8: The wish, with evaluation data if it has ``recover``; None for no rounding.
        rounded: Returns the report of a model in int8; nothing is written for good.

    Raises:
        ExportError: The wish has no evaluation data.
    """
    if int8 is None:
        return model, None
    wish = Int8.of(int8)
    plain = model, Rounding(wish, wish.max_drop)
    if wish.recover is None:
        return plain
    if wish.evaluation is None:
        raise ExportError(
            "A recovery for int8 needs evaluation data, which tell whether the loss is above the limit; give them."
        )
    free = replace(wish, max_drop=math.inf, recover=None)
    before = rounded(model, free).scores
    assert before is not None
    if before[0] - before[1] <= wish.max_drop:
        return plain
    trained = wish.recover(copy.deepcopy(model))
    after = rounded(trained, free).scores
    assert after is not None
    left = wish.max_drop - (before[0] - after[0])  # what rounding may still cost
    if before[0] - after[1] <= wish.max_drop:  # held, also where the trained model is better in int8 than in float32
        left = max(left, after[0] - after[1])
    elif after[1] <= before[1] or left < 0:
        return plain
    return trained, Rounding(replace(wish, max_drop=left), wish.max_drop, before)
