"""Claim: a ResNet-50 with 16x1 blocks at density 0.3 runs 2.6 times as fast as the best dense engine.

Batch 1, 224x224, float32; random weights with non-trivial norms, random masks with an exact count on every convolution but the
first (``--pattern``); `microglia.accelerate` as a user calls it. Beside it the same network dense, in PyTorch eager,
compiled with freezing, packed oneDNN, ONNX Runtime and OpenVINO: time does not depend on zeros there, which ``--zeros``
shows; and dense in bfloat16, which rounds and is only compared. All interleaved in one process, medians. Last line: best
dense / ours at density 0.3 with one thread; goal >= 2.6, and >= 5 at 0.1. Run: ``python benchmarks/resnet50_end_to_end.py``
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import microglia as mg
import records
from block_layers import pruned
from microglia.core.running import Example, folded_twin
from microglia.core.timing import processor_name
from microglia.measure import executions, time_interleaved
from microglia.runtime.bfloat16 import dense_lowered
from microglia.runtime.dense.execution import bind
from microglia.runtime.dense.kinds import TORCH
from models import randomize, torchvision

HALF = ("packed", "compiled")
"""Dense executions in bfloat16."""


def masked(density: float, form: str) -> nn.Module:
    """Returns the network with random weights, the masked ones zero."""
    torch.manual_seed(0)
    model = randomize(torchvision.models.resnet50(weights=None)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d) and name != "conv1":
                layer.weight.copy_(pruned(layer.weight, form, density, generator))
    return model


def compare(threads: int, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Prints one table; returns the times and density -> best dense / ours."""
    torch.set_num_threads(threads)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    dense = masked(1.0, arguments.pattern)
    notes: list[str] = []
    calls: dict[str, Callable[[], object]] = dict(executions(dense, x, "all", notes=notes))
    if arguments.zeros:
        zeros = executions(masked(0.1, arguments.pattern), x, [name for name in calls if name not in TORCH], notes=notes)
        calls.update({f"{name}, 90 % zeros": call for name, call in zeros.items()})
    base, example = list(calls), Example.of(x)
    lowered = dense_lowered(folded_twin(dense), example, HALF, notes)
    calls.update({name: bind(runner, example) for name, runner in lowered.items()})
    for density in arguments.densities:
        fast = mg.accelerate(masked(density, arguments.pattern), x, against=("packed",), cache=None)
        calls[f"accelerated, density {density:g}"] = lambda fast=fast: fast(x)
        if arguments.layers:
            print(fast.report())
    times = time_interleaved(calls, rounds=arguments.rounds, max_seconds=240)
    best = min(base, key=lambda name: times[name].median)
    title = f"ResNet-50, batch 1, {arguments.pattern}, {threads} thread(s), {processor_name()}, torch {torch.__version__}"
    table = Table("execution", "ms", "quartiles", f"over {best}", title=title)
    for name, time in times.items():
        quartiles = f"{time.low:.1f} .. {time.high:.1f}"
        table.add_row(name, f"{time.median:.2f}", quartiles, f"{times[best].median / time.median:.2f}")
    console.print(table, *notes)
    ratios = {f"{d:g}": times[best].median / times[f"accelerated, density {d:g}"].median for d in arguments.densities}
    return {"threads": threads, "best": best, "times": {name: asdict(t) for name, t in times.items()}, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.7, 0.5, 0.3, 0.1])
    parser.add_argument("--pattern", default="16x1", help="16x1, 16x8, 4x1 or 1x1")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--zeros", action="store_true", help="the other engines with 90 %% zeros, too")
    parser.add_argument("--layers", action="store_true", help="print what was chosen for each layer")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    runs = [compare(threads, arguments, Console(width=120)) for threads in arguments.threads]
    records.write(arguments.json, "network", name="ResNet-50", pattern=arguments.pattern, runs=runs)
    print(f"ratio: {runs[0]['ratios'].get('0.3', next(iter(runs[0]['ratios'].values()))):.3f}")


if __name__ == "__main__":
    main()
