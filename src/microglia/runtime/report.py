"""The choices of `accelerate`, and the times behind them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from microglia.core.errors import SelectorError
from microglia.core.layers import prunable_layers
from microglia.core.shown import html_table
from microglia.runtime.int8.agreement import Agreement

SHOWN = 6
"""Layers named in a sentence."""


def is_dense(name: str) -> bool:
    """Tells whether an execution of a layer or model is dense, that is, reads and multiplies by every weight."""
    return not name.startswith(("sparse", "block", "rows", "unstructured", "compact", "codes", "int8", "2:4"))


def left_dense(model: nn.Module, reached: Collection[str]) -> list[str]:
    """Returns a sentence about layers with zeros that no kernel supports, such as weights stored (in, out); or none.

    Args:
        model: A model with masks or zeros in its weights.
        reached: Names of the layers for which kernels were tried.
    """
    try:
        known = prunable_layers(model)
    except SelectorError:  # weights outside the layers of known kinds
        known = {}
    layers = [n for n, layer in known.items() if n.rpartition(".")[0] not in reached and not layer.weight.all()]
    if not layers:
        return []
    more = f" and {len(layers) - SHOWN} more" if len(layers) > SHOWN else ""
    return [f"Run dense, for kernels know 2-d convolutions and linear layers alone: {', '.join(layers[:SHOWN])}{more}."]


@dataclass(frozen=True)
class LayerChoice:
    """The choice for one layer.

    Attributes:
        name: Name of the layer in the model.
        kind: ``conv2d`` or ``linear``.
        shape: Shape of its weight.
        density: Fraction of the weight that is not zero.
        chosen: The chosen way to run it.
        times: Way -> milliseconds of this layer alone, measured interleaved.
        why: The reason in words.
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
    """The choice for each layer, and the times of the whole model.

    Attributes:
        layers: Choices in the order of the forward pass.
        times: Execution of the whole model -> milliseconds of one batch, measured interleaved.
        chosen: The execution that runs.
        best_dense: The fastest dense execution.
        level: Kernels: torch, generic, avx2, avx512, avx512vnni, avx512bf16 or amx; on a GPU triton and its version.
        threads: CPU threads of the timing.
        notes: Omitted executions, with the reasons.
        precision: ``float32``; or ``bf16`` or ``int8`` where layers in bfloat16 or in 8 bits were tried.
        rounding: Outputs of the chosen execution beside the model's, where layers of it run in 8 bits.
    """

    layers: tuple[LayerChoice, ...]
    times: dict[str, float]
    chosen: str
    best_dense: str
    level: str
    threads: int
    notes: tuple[str, ...] = ()
    precision: str = "float32"
    rounding: Agreement | None = None

    @property
    def speedup(self) -> float:
        """Ratio of the best dense execution's time to the chosen one's; never below 1 in the measurement itself."""
        return self.times[self.best_dense] / self.times[self.chosen]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, JSON-ready."""
        return {**asdict(self), "speedup": self.speedup}

    def __repr__(self) -> str:
        chosen = f"{self.chosen} {self.times[self.chosen]:.4g} ms, {self.speedup:.2f}x {self.best_dense}"
        return f"AccelerationReport({chosen}; {len(self.layers)} layers, {self.level}, {self.threads} thread(s))"

    def _repr_html_(self) -> str:
        heads = ("layer", "density", "runs as", "ms", "dense, ms", "why")
        rows = [(one.name, one.density, one.chosen, one.times[one.chosen], one.dense, one.why) for one in self.layers]
        times = sorted(self.times.items(), key=lambda pair: pair[1])
        whole = html_table("The whole model", ("execution", "ms"), times)
        return html_table(repr(self), heads, rows, self.remarks) + whole

    @property
    def remarks(self) -> tuple[str, ...]:
        """The notes, and how far the outputs are from the model's where that was compared."""
        return self.notes if self.rounding is None else (*self.notes, str(self.rounding))

    def __str__(self) -> str:
        """Returns tables for a reader: the layers, then the whole model."""
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
            console.print(layers, whole, *self.remarks, sep="\n")
        return capture.get()
