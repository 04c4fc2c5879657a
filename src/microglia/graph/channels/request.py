"""Checks the arguments of `prune_channels` before anything is traced."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from microglia.core.budget import Budget
from microglia.core.errors import BudgetError, MicrogliaError
from microglia.core.registry import unknown_name
from microglia.graph.channels.groups import GroupReduction
from microglia.graph.channels.latency_table import TIMED_BY
from microglia.graph.channels.widths import WidthScope
from microglia.runtime.dense.kinds import execution_names


@dataclass(frozen=True, kw_only=True)
class ChannelRequest:
    """The keywords of `microglia.prune_channels`, except those of the score.

    Attributes:
        budget: The budget: ``density`` of the channels, ``params``, ``flops``, ``ms`` per example batch on this machine, or
            several. It is met within 1 % (a time within 5 % below it), or as nearly as the rounding allows; the plan's notes
            report a deviation.
        reduction: How the values of a unit's weights, over all its members, become one. With a score of whole filters (see
            `microglia.scores.values_filters`): those of the filters that make the unit.
        scope: ``uniform``: the same fraction of every group; ``global``: by normalized score across groups.
        round_to: Widths are kept at multiples of this if the budget allows; 1 for none.
        exclude: Selectors of layers that keep both their inputs and outputs; coupled channels stay too. A selector may match
            any parameter: the bias of a layer, or its norm, keeps only the layer's outputs.
        within_groups: Whether to remove channels within each group of a grouped convolution or norm, rather than whole groups.
            Each group loses its own channels, equally many. With nested groups the innermost are used. If there are fewer than
            four groups, channels are always removed within them.
        keep_class: Whether to remove only channels that the user's own classes can lose. Otherwise a model with fixed sizes in
            its forward is returned as its traced graph.
        dynamic: Dimensions of the inputs that may change later if the result is a graph: by default the batch; (0, 2, 3) for
            images of any size, (0, 1) for token ids of any length. The plan's notes list those that stay fixed.
        executions: Ways to run the candidates of a budget in ``ms``; the fastest counts. For a model that another engine will
            run, that engine: ``("openvino",)``, ``("onnxruntime",)``.
        verified: Whether to compare every value with the masked model's; turn it off only in a search.
    """

    budget: Budget
    reduction: GroupReduction = "l2"
    scope: WidthScope = "uniform"
    round_to: int = 16
    exclude: Sequence[str] = ()
    within_groups: bool = False
    keep_class: bool = False
    dynamic: Sequence[int] = (0,)
    executions: Sequence[str] = TIMED_BY
    verified: bool = True

    def checked(self) -> ChannelRequest:
        """Returns the request with plain integers.

        Raises:
            BudgetError: The budget is not a `Budget`.
            UnknownNameError: The scope, the reduction or an execution is unknown.
            MicrogliaError: ``round_to`` or a dimension is not a whole number in its range.
        """
        budget: Any = self.budget
        if not isinstance(budget, Budget):
            raise BudgetError(
                "The budget is a Budget, such as Budget(params=0.5) or Budget(density=0.5); "
                f"got {type(budget).__name__} {budget!r:.60}."
            )
        if budget.bytes is not None:
            raise BudgetError(
                "bytes is a budget of packed files: take microglia.pack, or density, params, flops or ms for removed channels."
            )
        known = (("scope", self.scope, get_args(WidthScope)), ("reduction", self.reduction, get_args(GroupReduction)))
        for kind, name, names in known:
            if name not in names:
                raise unknown_name(f"{kind} of channels", name, names)
        dynamic: Any = self.dynamic
        rounding = _whole(self.round_to)
        if rounding is None or rounding < 1:
            raise MicrogliaError(f"round_to is a whole number, at least 1 (1: no rounding); got {self.round_to!r:.60}.")
        dims = [_whole(d) for d in dynamic] if isinstance(dynamic, Sequence) and not isinstance(dynamic, str) else [None]
        free = tuple(d for d in dims if d is not None and d >= 0)
        if len(free) < len(dims):
            raise MicrogliaError(f"dynamic names dimensions, each 0 or above, such as (0, 1); got {dynamic!r:.60}.")
        return replace(self, round_to=rounding, dynamic=free, executions=execution_names(self.executions))


def _whole(value: Any) -> int | None:
    """Returns a whole number of Python or NumPy as an int, or None."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
