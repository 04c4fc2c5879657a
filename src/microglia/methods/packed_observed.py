"""The observation of methods that pack their model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from microglia.storage.observations import Observation, observations


@dataclass(frozen=True)
class PackedLayer:
    """One shared layer in a packed file.

    Attributes:
        density: Kept fraction of its weights.
        values: Entries of its codebook, the zero included.
        code_bits: Bits of the codes for each kept weight.
        index_bits: Bits of the positions for each kept weight.
        bytes: Bytes of the layer.
    """

    density: float
    values: int
    code_bits: float
    index_bits: float
    bytes: int


@observations.add("packed")
@dataclass(frozen=True)
class Packed(Observation):
    """The packed file of a run.

    Attributes:
        bytes: Measured bytes of the file.
        dense: Bytes of the same tensors without coding.
        file: Name of the file in the run's directory; None without a directory.
        layers: Shared layers by name.
    """

    bytes: int
    dense: int
    file: str | None = None
    layers: dict[str, PackedLayer] = field(default_factory=dict)

    def kept(self, others: Mapping[str, Any]) -> str:
        """Returns the size of the packed file in words."""
        where = f" {self.file}" if self.file else ""
        return f"packed file{where}: {self.bytes:,} bytes, {self.dense / self.bytes:.1f}x smaller"
