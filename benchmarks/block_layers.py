"""Claim: blocks of 16 outputs x 1 input make a convolution at density 0.3 three times as fast as the best dense one.

The 11 layers of ResNet-50 and MobileNet that most of their time goes to, batch 1 (``--set resnet56``: the three widths of
ResNet-56 at batch 32; ``--set vit``: the two linear layers of a ViT-B block, 197 tokens); random masks with an exact count.
Dense: oneDNN with a packed weight, the faster of both layouts of the input. Bias and ReLU are fused on both sides. All ways
of a layer are timed interleaved in one process, median of the rounds. Share of the ideal: speed-up x density.

Last line: geometric mean of the first form at density 0.3 with the first number of threads; goal >= 3.0 for 16x1 on the 11
layers (>= 8 at 0.1, >= 0.95 at 1.0). Run: ``python benchmarks/block_layers.py``; ``--threads 1 2``; ``--forms 4x1 1x1`` for
rows that share their places and for single weights, in NCHW; ``--forms channels`` for whole outputs, removed.

``--precision bf16``: blocks in bfloat16 over the best dense in bfloat16 (goal >= 2.5 for 16x2 at density 0.3) and, in one more
row, over the best dense in float32 (goal >= 4.8). On a processor without the instruction vdpbf16ps this times an emulation by
shifts, which says nothing about the goal: the title and the line before the last say so.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import records
from microglia.core.patterns import Block, Channel, Pattern, Unstructured
from microglia.core.timing import processor_name
from microglia.measure import time_interleaved
from microglia.runtime import BlockConv2d, BlockLinear, RowConv2d, level
from microglia.runtime.bfloat16 import lowered_site
from microglia.runtime.candidates import Compact
from microglia.runtime.dense.fusion import Activation, Site
from microglia.runtime.dense.packing import Packed
from microglia.runtime.operators import LEVELS
from records import geometric_mean

Layer = tuple[str, int, int, int, int]
SETS: dict[str, tuple[int, tuple[Layer, ...]]] = {  # batch; name, inputs, outputs, kernel (0 for linear), side (or tokens)
    "layers": (1, (
        ("ResNet-50 1x1 64>256 @56", 64, 256, 1, 56),
        ("ResNet-50 1x1 512>128 @28", 512, 128, 1, 28),
        ("ResNet-50 1x1 256>1024 @14", 256, 1024, 1, 14),
        ("ResNet-50 1x1 2048>512 @7", 2048, 512, 1, 7),
        ("ResNet-50 3x3 64 @56", 64, 64, 3, 56),
        ("ResNet-50 3x3 128 @28", 128, 128, 3, 28),
        ("ResNet-50 3x3 256 @14", 256, 256, 3, 14),
        ("ResNet-50 3x3 512 @7", 512, 512, 3, 7),
        ("MobileNet 1x1 512>512 @14", 512, 512, 1, 14),
        ("MobileNet 1x1 1024>1024 @7", 1024, 1024, 1, 7),
        ("MobileNet 1x1 64>128 @56", 64, 128, 1, 56),
    )),
    "resnet56": (32, (("3x3 16 @32", 16, 16, 3, 32), ("3x3 32 @16", 32, 32, 3, 16), ("3x3 64 @8", 64, 64, 3, 8))),
    "vit": (1, (("768>3072", 768, 3072, 0, 197), ("3072>768", 3072, 768, 0, 197))),
}  # fmt: skip
FORMS = ("16x1", "16x2", "16x4", "16x8", "4x1", "2x1", "1x1", "channels")


def pattern_of(form: str) -> Pattern:
    if form in ("1x1", "channels"):
        return Unstructured() if form == "1x1" else Channel()
    out, width = map(int, form.split("x"))
    return Block(out, width)


def pruned(weight: Tensor, form: str, density: float, generator: torch.Generator) -> Tensor:
    """Returns the weight with a random mask of the form that keeps exactly the count of units."""
    pattern = pattern_of(form)
    units = pattern.reduce(weight)
    order = torch.randperm(units.numel(), generator=generator)
    kept = torch.zeros(units.numel()).index_fill(0, order[: round(density * units.numel())], 1)
    return weight * pattern.expand(kept.reshape(units.shape), weight.shape)


def site_of(layer: Layer, batch: int, generator: torch.Generator) -> Site:
    name, inputs, outputs, kernel, side = layer
    if kernel == 0:
        weight = torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)
        shapes = (batch, side, inputs), (batch, side, outputs)
        return Site(name, "linear", weight, torch.zeros(outputs), *shapes, Activation("relu"))
    weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator) / math.sqrt(inputs * kernel**2)
    shapes = (batch, inputs, side, side), (batch, outputs, side, side)
    return Site(name, "conv2d", weight, torch.zeros(outputs), *shapes, Activation("relu"), padding=(kernel // 2,) * 2)


def sparse(site: Site, form: str) -> nn.Module:
    """Returns the sparse execution of a layer for masks of a form."""
    if form == "channels":
        return Compact(site) if bool((site.weight.flatten(1) == 0).all(1).any()) else Packed(site)
    out, width = map(int, form.split("x"))
    if out < 16:
        return RowConv2d.of(site, out)
    return (BlockLinear if site.kind == "linear" else BlockConv2d).of(site, width)


def dense_calls(site: Site, x: Tensor, name: str) -> dict[str, Callable[[], object]]:
    """Returns the packed dense layer on its input in both layouts."""
    packed, last = Packed(site), channels_last(x)
    return {f"{name}, NCHW": lambda: packed(x), f"{name}, NHWC": lambda: packed(last)}


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def times_of(layer: Layer, cases: list[tuple[str, float]], batch: int, rounds: int, precision: str) -> dict[str, float]:
    """Returns the milliseconds of the layer dense, in float32 and in the precision, and in each case."""
    half, generator = precision == "bf16", torch.Generator().manual_seed(0)
    site = site_of(layer, batch, generator)
    x = torch.randn(site.input_shape, generator=generator)
    calls = dense_calls(site, x, "float32" if half else "dense")
    if half:
        x, tolerance = x.bfloat16(), 2e-2
        calls |= dense_calls(lowered_site(site), x, "dense")
    else:
        tolerance = 1e-4
    for form, density in cases:
        own = replace(site, weight=pruned(site.weight, form, density, generator))
        own = lowered_site(own) if half else own
        module = sparse(own, form)
        given = x if isinstance(module, RowConv2d) else channels_last(x)
        torch.testing.assert_close(module(given), Packed(own)(given), rtol=tolerance, atol=tolerance)
        calls[f"{form} {density:g}"] = lambda module=module, given=given: module(given)
    with torch.no_grad():
        times = time_interleaved(calls, rounds=rounds, min_round_seconds=0.01)
    return {name: time.median for name, time in times.items()}


def measured(cases: list[tuple[str, float]], arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Prints one table; returns the times of each layer and the geometric mean of the speed-ups of each case."""
    batch, layers = SETS[arguments.set]
    names = [f"{form} {density:g}" for form, density in cases]
    half = arguments.precision == "bf16"
    how = f"{'bf16' if native() else 'bf16 EMULATED'}, " if half else ""
    title = (
        f"speed-up over the best dense, {how}batch {batch}, {torch.get_num_threads()} thread(s), {level()}, {processor_name()}"
    )
    table = Table("layer", "dense ms", "GFLOP/s", *names, title=title)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    advantages = []  # of the dense layer, over itself in float32
    rows = []
    for layer in layers:
        times = times_of(layer, cases, batch, arguments.rounds, arguments.precision)
        dense = min(time for name, time in times.items() if name.startswith("dense"))
        single = min((time for name, time in times.items() if name.startswith("float32")), default=dense)
        advantages.append(single / dense)
        name, inputs, outputs, kernel, side = layer
        pixels = side**2 if kernel else side
        work = 2 * batch * inputs * outputs * max(kernel, 1) ** 2 * pixels / dense / 1e6
        speedups = {case: dense / times[case] for case in names}
        for case, ratio in speedups.items():
            ratios[case].append(ratio)
        rows.append({"layer": name, "dense": dense, "gflops": work, "times": times, "speedups": speedups})
        table.add_row(name, f"{dense:.3f}", f"{work:.0f}", *(f"{ratio:.2f}" for ratio in speedups.values()))
    means, advantage = {name: geometric_mean(values) for name, values in ratios.items()}, geometric_mean(advantages)
    table.add_section()
    table.add_row("geometric mean", "", "", *(f"{mean:.2f}" for mean in means.values()))
    if half:
        table.add_row("over float32 dense", f"x {advantage:.2f}", "", *(f"{mean * advantage:.2f}" for mean in means.values()))
    shares = (mean * density for mean, (_, density) in zip(means.values(), cases, strict=True))
    table.add_row("share of the ideal", "", "", *(f"{100 * share:.0f} %" for share in shares))
    console.print(table)
    return {"batch": batch, "threads": torch.get_num_threads(), "rows": rows, "means": means, "dense_over_float32": advantage}


def native() -> bool:
    """Tells whether the kernels multiply in bfloat16 by an instruction."""
    return LEVELS.index(level()) >= LEVELS.index("avx512bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="layers")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--forms", nargs="+", choices=FORMS, help="default 16x1 16x8; 16x2 16x1 in bf16")
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.7, 0.5, 0.3, 0.1])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    half = arguments.precision == "bf16"
    arguments.forms = arguments.forms or (["16x2", "16x1"] if half else ["16x1", "16x8"])
    if half and (refused := [form for form in arguments.forms if not form.startswith("16x")]):
        parser.error(f"in bf16 there are only blocks of 16 outputs, not {', '.join(refused)}")
    cases = [(form, density) for form in arguments.forms for density in arguments.densities]
    found = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        found.append(measured(cases, arguments, Console(width=200)))
    records.write(arguments.json, "layers", set=arguments.set, precision=arguments.precision, cases=cases, runs=found)
    for threads, speedups in records.scaling(found).items():
        text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in speedups.items())
        print(f"{threads} threads over {found[0]['threads']}, geometric means: {text}")
    density = 0.3 if 0.3 in arguments.densities else arguments.densities[0]
    if half and not native():
        print(f"{processor_name()} runs the kernels of {level()}, without vdpbf16ps: blocks were emulated by shifts.")
    print(f"ratio: {found[0]['means'][f'{arguments.forms[0]} {density:g}']:.3f}")


if __name__ == "__main__":
    main()
