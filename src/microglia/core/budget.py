"""Budgets: the fraction that is *kept*, and the number of weights that follows from it."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields

from microglia.core.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """The limit of what remains: kept fractions in (0, 1], a time or a size. If several are given, all must hold.

    Attributes:
        density: Kept fraction of the prunable weights.
        params: Kept fraction of all parameters of the model (biases, norms and excluded layers included): 1 / the
            compression ratio of ShrinkBench (Blalock et al. 2020).
        flops: Kept fraction of the multiply-accumulates; for the removal of channels, and for methods that choose units while
            they train.
        ms: Measured milliseconds that one batch of the example inputs may take on this machine; only for the removal of
            channels.
        bytes: Bytes of the packed file; only for `microglia.pack` and the method ``deep-compression``.

    Where channels are removed, ``density`` is the kept fraction of the prunable channels.
    """

    density: float | None = None
    params: float | None = None
    flops: float | None = None
    ms: float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if not given:
            raise BudgetError(
                "A budget needs at least one of density, params, flops (fractions kept, such as 0.2), ms or bytes."
            )
        for name, value in given.items():
            if name == "bytes":
                object.__setattr__(self, name, _whole(value))
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise BudgetError(f"{name} is a number, the fraction kept in (0, 1]; got {value!r}.")
            value = float(value)  # noqa: PLW2901 -- of NumPy, perhaps: plans and recipes write plain numbers
            object.__setattr__(self, name, value)
            if name == "ms":
                if not (value > 0 and math.isfinite(value)):
                    raise BudgetError(f"ms is a time in milliseconds, above 0; got {value}.")
            elif not 0 < value <= 1:
                raise BudgetError(f"{name} is the fraction kept, above 0 and at most 1; got {value}.{_hint(value)}")

    def kept_weights(self, prunable: int, total: int) -> int:
        """Returns how many of the prunable weights stay.

        Args:
            prunable: Weights that may be pruned, P.
            total: All parameters of the model, T.

        Raises:
            BudgetError: ``params`` is below the share of parameters that cannot be pruned: the fraction to keep, (T * params -
                (T - P)) / P of ShrinkBench, would not be positive. Or flops or ms are given for masks.
        """
        if self.flops is not None or self.ms is not None:
            raise BudgetError("flops and ms are budgets of removed channels: masks alone save neither. See prune_channels.")
        if self.bytes is not None:
            raise BudgetError("bytes is a budget of packed files: take microglia.pack or the method deep-compression.")
        counts = []
        if self.density is not None:
            counts.append(_round(self.density * prunable))
        if self.params is not None:
            counts.append(_round(self.params * total) - (total - prunable))
            if counts[-1] <= 0:
                raise BudgetError(
                    f"params={self.params} cannot be met: {total - prunable:,} of {total:,} parameters are outside the "
                    f"prunable weights, so params must be above {(total - prunable) / total:.4f}."
                )
        return min(counts)

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name):g}" for f in fields(self) if getattr(self, f.name) is not None)


def _whole(value: object) -> int:
    """Returns a number of bytes."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise BudgetError(f"bytes is a whole number, the bytes of the packed file; got {value!r}.")
    return int(value)


def _round(value: float) -> int:
    """Returns the nearest integer, halves up (the same on every platform and for every parity)."""
    return math.floor(value + 0.5)


def _hint(value: float) -> str:
    if value == 0:
        return " Nothing would be left."
    return f" Did you mean {value / 100:g}?" if 2 <= value <= 100 else ""
