"""The observation of layer-wise pruning."""

from __future__ import annotations

from dataclasses import dataclass

from microglia.storage.observations import observations


@dataclass(frozen=True)
class LayerwiseRow:
    """One pruned layer.

    Attributes:
        layer: Name of its weight.
        rule: The rule that pruned it; ``magnitude`` where it read nothing.
        kept: Weights kept.
        total: All its weights.
        loss: Mean squared error of its outputs over the calibration rows, by SparseGPT's own model; None for other rules.
        dampening: Fraction of the Hessian's diagonal that was added; None without a Hessian.
        inputs: Columns of its weight; None where the rule needs no inputs.
        rows: Calibration rows; None where the rule needs none, or the layer read nothing.
    """

    layer: str
    rule: str
    kept: int
    total: int
    loss: float | None = None
    dampening: float | None = None
    inputs: int | None = None
    rows: int | None = None


@observations.add("layerwise")
@dataclass(frozen=True)
class LayerwiseReport:
    """The layers that were pruned, in order.

    Attributes:
        rule: The rule of the method.
        blocks: Path of the list of blocks.
        layers: One row for each layer.
    """

    rule: str
    blocks: str
    layers: list[LayerwiseRow]
