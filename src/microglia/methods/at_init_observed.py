"""The observation of methods that prune before training."""

from __future__ import annotations

from dataclasses import dataclass

from microglia.storage.observations import observations


@dataclass(frozen=True)
class LayerPaths:
    """Weights of one layer.

    Attributes:
        total: Number of weights.
        kept: Weights that the mask keeps.
        effective: Kept weights on a path from input to output.
    """

    total: int
    kept: int
    effective: int


@observations.add("initialization")
@dataclass(frozen=True)
class Initialization:
    """A mask made before training.

    Attributes:
        total: Weights under the mask.
        kept: Weights that it keeps.
        effective: Kept weights on a path from input to output.
        emptied: Layers that keep nothing.
        layers: The same counts by layer.
    """

    total: int
    kept: int
    effective: int
    emptied: list[str]
    layers: dict[str, LayerPaths]

    @property
    def least(self) -> float:
        """Minimum density of a layer."""
        return min(layer.kept / layer.total for layer in self.layers.values())
