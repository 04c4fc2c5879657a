"""Claim: with half of the inputs and half of the outputs of a layer gated off for an input, its kernel is 3 times as fast.

Dynamic gates decide anew for every input, so the list of what to compute is built in the call, of the gates' masks: it is in
the time. Dense: packed oneDNN. Gathered: the parts of the weight gathered, then PyTorch's own convolution, which is what
libraries do. Batch 1, random gates: single input channels, outputs in stripes of 16. Interleaved in one process, medians. Last
line: geometric mean over the layers at a half; goal >= 3 (the operations leave 4). Run: ``python benchmarks/gated_layers.py``
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

import records
from block_layers import Layer, site_of
from microglia.core.timing import processor_name
from microglia.measure import time_interleaved
from microglia.runtime import level
from microglia.runtime.dense.packing import Packed
from microglia.runtime.operators import ACTIVATIONS
from microglia.runtime.sparse_layers.layout import every_block

LAYERS: tuple[Layer, ...] = (
    ("3x3 256 @14", 256, 256, 3, 14),
    ("3x3 128 @28", 128, 128, 3, 28),
    ("1x1 256>1024 @14", 256, 1024, 1, 14),
    ("3x3 64 @8", 64, 64, 3, 8),
)


def times_of(layer: Layer, kept: float, rounds: int) -> dict[str, float]:
    """Returns the milliseconds of a layer dense, gathered and gated."""
    generator = torch.Generator().manual_seed(0)
    site = site_of(layer, 1, generator)
    outputs, inputs = site.weight.shape[:2]
    x = torch.randn(site.input_shape, generator=generator).contiguous(memory_format=torch.channels_last)
    gate = torch.zeros(inputs).index_fill(0, torch.randperm(inputs, generator=generator)[: round(kept * inputs)], 1)
    count = -(-outputs // 16)
    stripe = torch.zeros(count).index_fill(0, torch.randperm(count, generator=generator)[: round(kept * count)], 1)
    values = every_block(site.weight)
    geometry = (list(site.weight.shape[2:]), list(site.stride), list(site.padding), list(site.dilation))
    relu = ACTIVATIONS.index("relu")
    narrow = x.index_select(1, gate.nonzero()[:, 0])
    packed = Packed(site)

    decided, outputs_decided = gate > 0, stripe > 0

    def gated() -> torch.Tensor:
        channels, stripes = decided.view(torch.uint8), outputs_decided.view(torch.uint8)
        return torch.ops.microglia.gated_conv2d(x, values, channels, stripes, site.bias, outputs, *geometry, relu)

    def gathered() -> torch.Tensor:
        rows = stripe.repeat_interleave(16)[:outputs].nonzero()[:, 0]
        part = site.weight.index_select(0, rows).index_select(1, gate.nonzero()[:, 0])
        return functional.relu(functional.conv2d(narrow, part, site.bias.index_select(0, rows), padding=site.padding))

    masked = functional.conv2d(x * gate[:, None, None], site.weight, site.bias, padding=site.padding).relu()
    shown = stripe.repeat_interleave(16)[:outputs, None, None]
    torch.testing.assert_close(gated(), masked * shown, rtol=1e-4, atol=1e-4)
    calls: dict[str, Callable[[], object]] = {"dense": lambda: packed(x), "gathered": gathered, "gated": gated}
    with torch.no_grad():
        return {name: time.median for name, time in time_interleaved(calls, rounds=rounds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", nargs="+", type=float, default=[0.7, 0.5, 0.3])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    title = f"batch 1, 1 thread, {level()}, {processor_name()}"
    table = Table("layer", "kept of inputs and outputs", "ideal", "dense ms", "gathered", "gated", title=title)
    rows = []
    ratios: dict[float, list[float]] = {kept: [] for kept in arguments.kept}
    for layer in LAYERS:
        for kept in arguments.kept:
            times = times_of(layer, kept, arguments.rounds)
            ratios[kept].append(times["dense"] / times["gated"])
            rows.append({"layer": layer[0], "kept": kept, "times": times})
            speedups = (f"{times['dense'] / times[name]:.2f}x" for name in ("gathered", "gated"))
            table.add_row(layer[0], f"{kept:g}", f"{1 / kept**2:.1f}x", f"{times['dense']:.3f}", *speedups)
    Console(width=120).print(table)
    records.write(arguments.json, "gates", rows=rows)
    half = ratios.get(0.5, ratios[arguments.kept[0]])
    print(f"ratio: {math.exp(sum(map(math.log, half)) / len(half)):.3f}")


if __name__ == "__main__":
    main()
