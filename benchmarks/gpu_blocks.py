"""Claim: on an H100 vector blocks make a convolution at density 0.25 twice as fast as cuDNN's dense one, from batch 64 on.

The 3x3 and 1x1 layers of ResNet-50 in channels last, and the linear layers of ViT-B and of an 8-billion Llama, in float16 and
bfloat16; random masks with an exact count; blocks of 16, 32 and 64 outputs x 1 input and of 64 x 64, at four densities; 2:4
linear layers through cuSPARSELt. Neither side has a bias or an activation: fusing them is no part of the claim. Dense is
cuDNN with its own search, for 1x1 layers the faster of that and cuBLAS. Times of blocks hold everything from images in
channels last to images in channels last, turning the input among it. Each way is captured in a CUDA graph of several calls;
the graphs are replayed interleaved, median of the rounds. Buffers are the same in each call, so small layers find them in
the L2 cache, on both sides. Before a way is timed its result is compared with float32; a wrong one is no row and ends in
exit status 1. ``moved`` is the time that reading the input and writing the output once takes at the measured bandwidth:
no way of running the layer alone is faster.

Last line: geometric mean of blocks 64x1 at density 0.25 in float16 at batch 64 over dense, all convolutions; goal >= 2.0
for the 3x3 layers. Run: ``python benchmarks/gpu_blocks.py`` (torch and its triton are enough); ``--seconds`` is when no
further table is begun. First of all, the kernels on random problems: ``python benchmarks/bare.py
tests/unit/triton_matrix.py 60 0 cuda``. Without a CUDA GPU it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bare  # noqa: F401
from gpu_layers import DEVICE, WRONG, Call, Stage, dense, error_of, problems, pruned, sparse_ways, two_of_four
from microglia.core.running import first_line
from microglia.runtime.gpu.triton import tiles as tiles_module
from microglia.runtime.gpu.triton.launch import turned

CLAIM = "64x1 0.25"
TURN_SECONDS = 0.001
"""Least time of one turn of a graph."""


@dataclass
class Row:
    """One layer: microseconds of each way, what went wrong, and what it is measured against."""

    layer: str
    dense: float
    flops: float
    moved: float
    turn: float
    times: dict[str, float]
    tiles: dict[str, str]
    wrong: list[str]

    def ratio(self, case: str) -> float:
        """Returns how many times faster a case is than dense."""
        return self.dense / self.times[case] if case in self.times else math.nan


def graph(call: Call) -> tuple[Callable[[], None], int]:
    """Returns a function that replays a call several times, and how many; captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    count = max(1, min(50, math.ceil(TURN_SECONDS / max(1e-6, timed(call, 3)))))
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(count):
            call()
    return captured.replay, count


def timed(call: Callable[[], object], calls: int) -> float:
    """Returns the seconds of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls / 1e3


def interleaved(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Returns the microseconds of each call."""
    graphs = {name: graph(call) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds + 1):
        for name, (replay, count) in graphs.items():
            found[name].append(1e6 * timed(replay, 1) / count)
    return {name: statistics.median(times[1:]) for name, times in found.items()}  # the first round warms up


def measure(name: str, weight: Tensor, x: Tensor, rounds: int, bandwidth: float) -> Row:
    """Checks and times one layer in all ways."""
    calls, tiles, wrong = dense(weight, x), {}, []
    baselines = list(calls)
    for case, own, make in sparse_ways(weight, x):
        try:
            module, before = make(), set(tiles_module._chosen)
            error = error_of(module(x), own, x)
            if not error < WRONG[x.dtype]:
                raise ArithmeticError(f"the error is {error:.2g} of the result")
        except Exception as problem:
            wrong.append(f"{name} {case}: {first_line(problem)}")
            continue
        calls[case] = lambda module=module: module(x)
        new = [tile for key, tile in tiles_module._chosen.items() if key not in before]
        tiles[case] = "/".join(map(str, new[0][:4])) + (" turned" if new[0].turned else "") if new else ""
    if x.ndim == 4:
        calls["turn"] = lambda: turned(x)
    times = interleaved(calls, rounds)
    outputs = x.numel() // x.shape[1] * weight.shape[0]
    flops = 2 * outputs * math.prod(weight.shape[1:])
    moved = 1e6 * x.element_size() * (x.numel() + outputs) / bandwidth
    best = min(times.pop(way) for way in baselines)
    return Row(name, best, flops, moved, times.pop("turn", math.nan), times, tiles, wrong)


def mean(values: list[float]) -> float:
    good = [value for value in values if math.isfinite(value)]
    return math.exp(sum(map(math.log, good)) / len(good)) if good else math.nan


def show(title: str, rows: list[Row]) -> dict[str, float]:
    """Prints one table; returns the geometric means of its columns."""
    cases = list(dict.fromkeys(case for row in rows for case in row.times))
    widths = [max(len(case), 5) for case in cases]
    print(f"\n{title}")
    head = f"{'layer':30} {'dense us':>9} {'TFLOP/s':>8} {'moved us':>8} {'turn us':>8}"
    print(head, *(f"{case:>{width}}" for case, width in zip(cases, widths, strict=True)))
    for row in rows:
        numbers = f"{row.layer:30} {row.dense:9.1f} {row.flops / row.dense / 1e6:8.0f} {row.moved:8.1f} {row.turn:8.1f}"
        print(numbers, *(f"{row.ratio(case):{width}.2f}" for case, width in zip(cases, widths, strict=True)))
    means = {case: mean([row.ratio(case) for row in rows]) for case in cases}
    print(f"{'geometric mean':67}", *(f"{means[case]:{width}.2f}" for case, width in zip(cases, widths, strict=True)))
    if any(row.layer.startswith("3x3") for row in rows):
        large = [mean([row.ratio(case) for row in rows if row.layer.startswith("3x3")]) for case in cases]
        print(f"{'of the 3x3 layers':67}", *(f"{value:{width}.2f}" for value, width in zip(large, widths, strict=True)))
    for case in (CLAIM, "64x64 0.25"):
        print(f"tiles of {case}:", "; ".join(f"{row.layer}: {row.tiles.get(case, '')}" for row in rows))
    for line in itertools.chain.from_iterable(row.wrong for row in rows):
        print("WRONG", line)
    sys.stdout.flush()
    return means


def ceilings() -> tuple[float, float]:
    """Returns the measured bytes per second of a copy, and operations per second of a matrix product in float16."""
    source = torch.randn(2**28, device=DEVICE)
    target = torch.empty_like(source)
    side = torch.randn(8192, 8192, device=DEVICE, dtype=torch.float16)
    seconds = {}
    for name, call in {"copy": lambda: target.copy_(source), "product": lambda: side @ side}.items():
        timed(call, 3)
        seconds[name] = min(timed(call, 5) for _ in range(3))
    return 2 * source.numel() * 4 / seconds["copy"], 2 * 8192**3 / seconds["product"]


def accelerated(dtype: torch.dtype) -> dict[str, Any]:
    """Prints and returns what `accelerate` chooses for a small network on this GPU."""
    from microglia.runtime import accelerate

    model = Stage()
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.copy_(pruned(layer.weight, 64, 1, 0.25))
        model.head.weight.copy_(two_of_four(model.head.weight))
    x = torch.randn(64, 3, 14, 14)
    fast = accelerate(model.to(DEVICE, dtype).eval(), x.to(DEVICE, dtype), against=("eager", "eager-channels-last"), cache=None)
    report = fast.report()
    print(f"\naccelerate, 3x3 256 @14, batch 64, {dtype}: {report.chosen}, {report.speedup:.2f}x; ms of the whole")
    print({name: round(ms, 3) for name, ms in report.times.items()})
    for layer in report.layers:
        print(f"  {layer.name}: {layer.chosen};", {way: round(ms, 4) for way, ms in layer.times.items()})
    print(*(f"  {note}" for note in report.notes), sep="\n", flush=True)
    return report.to_dict()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=450, help="no further table is begun after so long")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_blocks times kernels of a GPU, and this machine has no CUDA GPU that torch can use.")
        return 2
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    start = time.monotonic()
    bandwidth, peak = ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s, float16 product "
          f"{peak / 1e12:.0f} TFLOP/s; every number of a case is its speed-up over dense")  # fmt: skip
    half, brain = torch.float16, torch.bfloat16
    order = [("conv", 64, half), ("linear", 0, half), ("conv", 256, half), ("conv", 64, brain), ("linear", 0, brain)]
    order += [("conv", 256, brain)]
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "bandwidth": bandwidth, "peak": peak, "tables": []}
    claim, wrong = math.nan, 0
    with torch.no_grad():
        for kind, batch, dtype in order:
            title = f"{kind}{f', batch {batch}' if batch else ''}, {str(dtype).removeprefix('torch.')}"
            if time.monotonic() - start > arguments.seconds:
                print(f"\n{title}: not begun after {arguments.seconds:.0f} s")
                continue
            rows = [measure(name, weight, x, arguments.rounds, bandwidth) for name, weight, x in problems(kind, batch, dtype)]
            means = show(f"{title} ({time.monotonic() - start:.0f} s)", rows)
            wrong += sum(len(row.wrong) for row in rows)
            found["tables"].append({"title": title, "rows": [vars(row) for row in rows], "means": means})
            claim = means.get(CLAIM, math.nan) if (kind, batch, dtype) == order[0] else claim
            torch.cuda.empty_cache()
        for dtype in (half, torch.float32):
            try:
                found[f"accelerate {dtype}"] = accelerated(dtype)
            except Exception as problem:
                wrong += 1
                print(f"WRONG accelerate in {dtype}: {first_line(problem)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1, default=str) + "\n")
    print(f"{wrong} wrong, {time.monotonic() - start:.0f} s\nratio: {claim:.3f}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
