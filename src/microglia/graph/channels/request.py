"""Checks the arguments of `prune_channels` before anything is traced."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, get_args

from microglia.core.budget import Budget
from microglia.core.errors import BudgetError, MicrogliaError
from microglia.core.registry import unknown_name
from microglia.graph.channels.groups import GroupReduction
from microglia.graph.channels.widths import WidthScope


def check_asked(budget: Any, *, scope: Any, reduction: Any, round_to: Any, dynamic: Any) -> tuple[int, tuple[int, ...]]:
    """Returns (``round_to``, ``dynamic``) as plain integers; the arguments are those of `prune_channels`.

    Raises:
        BudgetError: The budget is not a `Budget`.
        UnknownNameError: The scope or the reduction is unknown.
        MicrogliaError: ``round_to`` or a dimension is not a whole number in its range.
    """
    if not isinstance(budget, Budget):
        raise BudgetError(
            "The budget is a Budget, such as Budget(params=0.5) or Budget(density=0.5); "
            f"got {type(budget).__name__} {budget!r:.60}."
        )
    for kind, name, known in (("scope", scope, get_args(WidthScope)), ("reduction", reduction, get_args(GroupReduction))):
        if name not in known:
            raise unknown_name(f"{kind} of channels", name, known)
    rounding = _whole(round_to)
    if rounding is None or rounding < 1:
        raise MicrogliaError(f"round_to is a whole number, at least 1 (1: no rounding); got {round_to!r:.60}.")
    dims = [_whole(d) for d in dynamic] if isinstance(dynamic, Sequence) and not isinstance(dynamic, str) else [None]
    free = tuple(d for d in dims if d is not None and d >= 0)
    if len(free) < len(dims):
        raise MicrogliaError(f"dynamic names dimensions, each 0 or above, such as (0, 1); got {dynamic!r:.60}.")
    return rounding, free


def _whole(value: Any) -> int | None:
    """Returns a whole number of Python or NumPy as an int, or None."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
