"""The observation of methods that pack their model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from microglia.compress.histograms import Distributions
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
        distributions: Its shared values, gaps and balance on EIE; None in results of earlier versions.
    """

    density: float
    values: int
    code_bits: float
    index_bits: float
    bytes: int
    distributions: Distributions | None = None


@dataclass(frozen=True)
class Round:
    """One round of the search for the smallest file.

    Attributes:
        density: Kept fraction of the prunable weights.
        bytes: Bytes of the packed file; None where no rounding was within the loss.
        value: Headline metric on validation images, after the training of the shared values if there was one.
        lost: Points lost against the dense model; negative if it is better.
        within: Whether this is within the loss that is asked for.
        bits: Bits of each layer.
    """

    density: float
    bytes: int | None
    value: float
    lost: float
    within: bool
    bits: dict[str, int] = field(default_factory=dict)


@observations.add("packed")
@dataclass(frozen=True)
class Packed(Observation):
    """The packed file of a run.

    Attributes:
        bytes: Measured bytes of the file.
        dense: Bytes of the same tensors without coding.
        file: Name of the file in the run's directory; None without a directory.
        layers: Shared layers by name.
        steps: Bytes of the model after each step: ``dense``, ``pruned``, ``shared`` and ``coded``; see
            `microglia.compress.Contents.steps`.
        rounds: Rounds of the search for the smallest file, if there was one.
    """

    bytes: int
    dense: int
    file: str | None = None
    layers: dict[str, PackedLayer] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    rounds: tuple[Round, ...] = ()

    def kept(self, others: Mapping[str, Any]) -> str:
        """Returns the size of the packed file in words."""
        where = f" {self.file}" if self.file else ""
        return f"packed file{where}: {self.bytes:,} bytes, {self.dense / self.bytes:.1f}x smaller"
