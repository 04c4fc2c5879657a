"""Budgets of packed files: a number of bytes, or the smallest file within a loss of accuracy; validation images decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

from torch import Tensor, nn

from microglia.compress import bits_for, encode, rounded
from microglia.compress.bit_budget import Choice, Rounding, allot, choices, second_order
from microglia.core.budget import Budget
from microglia.core.errors import BudgetError
from microglia.core.layers import Layer
from microglia.core.masks import mask, masks_of
from microglia.core.patterns import parse_pattern
from microglia.core.registry import unknown_name
from microglia.methods.config import MethodConfig
from microglia.methods.pruner import Pruner
from microglia.scores import Evidence
from microglia.tasks.task import Task

BitError = Literal["second-order", "weights"]
REFERENCE = 4
"""Bits of all layers where a density is chosen for a number of bytes."""
HALVINGS = 14
"""Steps of the search for that density, whose ratio they find to 0.1 %."""
LEAST = 1e-4
"""Smallest density of that search."""
SIZES = 12
"""File sizes that a round tries, from all layers at 1 bit to all at 8, at equal ratios."""
PERCENT = 100.0
Config = TypeVar("Config", bound=MethodConfig)


@dataclass(frozen=True)
class FileBudget:
    """A part of methods that pack their model.

    Attributes:
        bytes: Maximum bytes of the packed file. It chooses the bits of each layer and, where no density is given, the density.
        within: Maximum loss of the headline metric on validation images against the dense model, in points (per cent, or the
            metric's own unit). Rounds of pruning, training and sharing keep ever fewer weights; the smallest file within it is
            the result. A negative number asks for more than the dense model reaches.
        rounds: Maximum number of these rounds.
        factor: Density of a round over that of the round before.
        bit_error: Error by which the bits of layers are chosen: ``second-order`` (empirical Fisher) or ``weights``.
    """

    bytes: int | None = None
    within: float | None = None
    rounds: int = 8
    factor: float = 0.75
    bit_error: BitError = "second-order"

    def check_values(self) -> None:
        """Raises `BudgetError` for two goals at once, or a value out of range."""
        if self.bytes is not None:
            Budget(bytes=self.bytes)
            if self.within is not None:
                raise BudgetError(f"Give bytes or within, not both; got bytes={self.bytes} and within={self.within}.")
        if self.within is not None and not math.isfinite(self.within):
            raise BudgetError(f"within is a number of points, such as 0.5; got {self.within}.")
        if self.rounds < 1 or not 0 < self.factor < 1:
            raise BudgetError(f"rounds is at least 1 and factor in (0, 1); got {self.rounds} and {self.factor}.")
        if self.bit_error not in get_args(BitError):
            raise unknown_name("error of bits", self.bit_error, get_args(BitError))


def has_density(config: MethodConfig) -> bool:
    """Tells whether a config says how many weights remain."""
    return not (config.density is None and config.params is None and parse_pattern(config.pattern).fixed_density is None)


def density_for(model: nn.Module, config: Config, budget: int, evidence: Evidence) -> float:
    """Returns the highest density whose file, all layers at `REFERENCE` bits and before any training, has at most these bytes.

    Args:
        model: The dense model; it stays unchanged.
        config: Layers, pattern, scope and score.
        budget: Bytes of the file.
        evidence: The data for the score.

    Raises:
        BudgetError: Even the lowest density gives a larger file.
    """
    pruner = Pruner(deepcopy(model), replace(config, density=1.0), evidence=evidence)
    values = pruner.score(pruner.model, pruner.layers, evidence)
    bits = dict.fromkeys(pruner.layers, REFERENCE)

    def size(density: float) -> int:
        trial = deepcopy(model)
        mask(trial, pruner.select(values, max(1, round(density * pruner.weights)), {}))
        return len(encode(trial, bits=bits))

    if size(1.0) <= budget:
        return 1.0
    if (least := size(LEAST)) > budget:
        raise BudgetError(f"A file of {budget:,} bytes is too small for this model: almost without weights it has {least:,}.")
    low, high = LEAST, 1.0
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    return low


def chosen_bits(
    model: nn.Module, budget: int, layers: Mapping[str, Layer], evidence: Evidence, *, error: BitError, rounding: Rounding
) -> dict[str, int]:
    """Returns the bits of each layer of a pruned model for a file of at most these bytes after the shared values are trained.

    Raises:
        BudgetError: No file of these weights is as small.
    """
    known = evidence if error == "second-order" else None
    return bits_for(model, Budget(bytes=budget), evidence=known, rounding=rounding, layers=layers, trained=True)


def fewest_bits(
    model: nn.Module,
    layers: Mapping[str, Layer],
    evidence: Evidence,
    good: Callable[[nn.Module], bool],
    *,
    error: BitError,
    rounding: Rounding,
) -> dict[str, int] | None:
    """Returns the bits of each layer of the smallest file whose rounded model is good; None if none is.

    Args:
        model: The pruned model; it stays unchanged.
        layers: Layers that share their weights.
        evidence: Batches and loss for the second-order error.
        good: Tells whether a rounded model is accurate enough, on validation images.
        error: Error by which bits are chosen.
        rounding: How weights are rounded.
    """
    saliency: Mapping[str, Tensor] | None = second_order(model, layers, evidence) if error == "second-order" else None
    curves = choices(layers, masks_of(model), saliency=saliency, rounding=rounding)
    tried: list[dict[str, int]] = []
    for room in _sizes(curves):
        bits = allot(curves, room)
        if bits is None or bits in tried:
            continue
        tried.append(bits)
        if good(rounded(model, bits, rounding=rounding)):
            return bits
    return None


def _sizes(curves: Mapping[str, Sequence[Choice]]) -> list[int]:
    """Returns sizes at equal ratios, ascending; the last one has room for every layer's most bytes."""
    low = sum(min(row.bytes for row in rows) for rows in curves.values())
    high = sum(max(row.bytes for row in rows) for rows in curves.values())
    return [round(low * (high / low) ** (step / (SIZES - 1))) for step in range(SIZES)] if low else [high]


def points_lost(task: Task, dense: float, value: float) -> float:
    """Returns how much worse a value of the headline metric is than the dense model's, in points; negative if it is better."""
    metric = task.metrics[task.headline]
    lost = dense - value if metric.better == "higher" else value - dense
    return PERCENT * lost if metric.unit == "%" else lost
