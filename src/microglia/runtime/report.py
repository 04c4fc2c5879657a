"""What `accelerate` chose, and the times it chose by."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from microglia.core.errors import SelectorError
from microglia.core.layers import prunable_layers

SHOWN = 6
"""Layers named in a sentence."""


def is_dense(name: str) -> bool:
    """Tells whether an execution of a layer or of a whole model multiplies by every weight."""
    return not name.startswith(("sparse", "block", "rows", "unstructured", "compact", "2:4"))


def left_dense(model: nn.Module, reached: Collection[str]) -> list[str]:
    """Returns a sentence that names the layers with zeros that no kernel knows, such as those laid out (in, out); or none.

    Args:
        model: Masked or with zeros in its weights.
        reached: Names of the layers that kernels were tried for.
    """
    try:
        known = prunable_layers(model)
    except SelectorError:  # weights that no layer of a known kind holds
        known = {}
    layers = [n for n, layer in known.items() if n.rpartition(".")[0] not in reached and not layer.weight.all()]
    if not layers:
        return []
    more = f" and {len(layers) - SHOWN} more" if len(layers) > SHOWN else ""
    return [f"Run dense, for kernels know 2-d convolutions and linear layers alone: {', '.join(layers[:SHOWN])}{more}."]


@dataclass(frozen=True)
class LayerChoice:
    """How one layer runs.

    Attributes:
        name: Of the layer in the model.
        kind: ``conv2d`` or ``linear``.
        shape: Of its weight.
        density: Fraction of the weight that is not zero.
        chosen: The way that it runs.
        times: Way -> milliseconds of this layer alone, measured interleaved.
        why: In words.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    density: float
    chosen: str
    times: dict[str, float]
    why: str

    @property
    def dense(self) -> float:
        """Milliseconds of the fastest dense way."""
        return min(time for name, time in self.times.items() if is_dense(name))


@dataclass(frozen=True)
class AccelerationReport:
    """What was chosen for each layer, and the times of the whole model.

    Attributes:
        layers: In the order of the forward pass.
        times: Execution of the whole -> milliseconds of one batch, measured interleaved.
        chosen: The execution that runs.
        best_dense: The fastest dense execution.
        level: Of the kernels: torch, generic, avx2, avx512 or avx512bf16; on a GPU triton and its version.
        threads: CPU threads that it was timed with.
        notes: What was left out, and why.
        precision: ``float32``, or ``bf16`` where layers in bfloat16 were tried.
    """

    layers: tuple[LayerChoice, ...]
    times: dict[str, float]
    chosen: str
    best_dense: str
    level: str
    threads: int
    notes: tuple[str, ...] = ()
    precision: str = "float32"

    @property
    def speedup(self) -> float:
        """Time of the best dense execution over that of the chosen one; never below 1 in the measurement itself."""
        return self.times[self.best_dense] / self.times[self.chosen]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, JSON-ready."""
        return {**asdict(self), "speedup": self.speedup}

    def __str__(self) -> str:
        """Returns tables for a reader: the layers, then the whole."""
        from rich.console import Console
        from rich.table import Table

        title = "Layers" if self.precision == "float32" else f"Layers, timed in {self.precision}"
        layers = Table("layer", "weight", "density", "runs as", "ms", "dense ms", "why", title=title)
        for layer in self.layers:
            ms = layer.times[layer.chosen]
            shape = " x ".join(map(str, layer.shape))
            numbers = (f"{layer.density:.3f}", layer.chosen, f"{ms:.3f}", f"{layer.dense:.3f}")
            layers.add_row(layer.name or "(the model)", shape, *numbers, layer.why)
        whole = Table("execution", "ms", "", title=f"The whole model, {self.threads} thread(s), kernels: {self.level}")
        for name, time in sorted(self.times.items(), key=lambda item: item[1]):
            mark = f"chosen, {self.speedup:.2f}x the best dense" if name == self.chosen else ""
            whole.add_row(name, f"{time:.3f}", mark)
        console = Console(width=140, highlight=False)
        with console.capture() as capture:
            console.print(layers, whole, *self.notes, sep="\n")
        return capture.get()
