"""Claim: a YOLOv5n with half of its operations runs 1.7 times as fast, each side by its best engine.

Channels are removed from a YOLOv5n (ReLU) at 320 pixels until half of the multiply-accumulates are left; the smaller network is
verified against the larger one, exported to ONNX, and finds the same boxes there. Dense and pruned networks are timed in one
process, interleaved, in every exact execution that is installed (medians). Beside them the same network with 16x8 blocks at
three densities, by `microglia.accelerate`. Weights are random: time does not depend on their values. Last line: best dense /
best pruned, at half of the operations; goal >= 1.7. Run: ``python benchmarks/detection_speed.py``
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import microglia as mg
from block_layers import pruned
from microglia.core.timing import processor_name
from microglia.measure import measure_latency
from microglia.runtime.dense.kinds import execution_names
from microglia.tasks.boxes import iou
from microglia.tasks.detections import USE, suppressed
from microglia.tasks.yolo import Grid, decoded
from microglia.zoo import build
from microglia.zoo.yolov5 import ANCHORS, STRIDES
from models import randomize

GRID = Grid(STRIDES, ANCHORS)


def network(arguments: argparse.Namespace) -> nn.Module:
    """Returns the dense network, with norms that are not trivial and heads that find boxes."""
    torch.manual_seed(0)
    model = build(arguments.model, classes=3, shape=(3, arguments.size, arguments.size), activation="relu")
    model = randomize(model).eval()
    with torch.no_grad():
        for head in model.heads:
            head.bias.view(3, 8)[:, 4:] += 3
    return model


def boxes(maps: object) -> torch.Tensor:
    """Returns the boxes of one image, as people use them."""
    return suppressed(*decoded(maps, GRID), USE)[0]  # type: ignore[arg-type]


def exported(model: nn.Module, image: torch.Tensor) -> str:
    """Returns what the ONNX file of a network finds, compared with the network itself."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        session = mg.export(model, Path(folder) / "model.onnx", image).open()
        mine, theirs = boxes(model(image)), boxes(session(image))
    same = len(mine) == len(theirs) and bool((iou(mine[:, :4], theirs[:, :4]).diagonal() > 0.99).all())
    return f"ONNX: {len(theirs)} boxes, {'equal to' if same else 'NOT EQUAL TO'} the network's {len(mine)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolov5n")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--round-to", type=int, default=16)
    parser.add_argument("--densities", nargs="*", type=float, default=[0.7, 0.5, 0.3])
    parser.add_argument("--executions", nargs="+", default=["all"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{processor_name()}, torch {torch.__version__}, {arguments.threads} threads")
    dense, image = network(arguments), torch.rand(1, 3, arguments.size, arguments.size)
    small = mg.prune_channels(dense, image, mg.Budget(flops=arguments.flops), round_to=arguments.round_to)
    plan = mg.graph.plan_of(small)
    print(f"channels: {plan.macs[1] / plan.macs[0]:.3f} of the operations, {plan.parameters[1]:,} of {plan.parameters[0]:,}")
    print(exported(small, image))
    names = execution_names(arguments.executions)
    report = measure_latency({"dense": dense, "pruned": small}, image, executions=names, rounds=arguments.rounds)
    table = Table("", *names, "best", title=f"{arguments.model} at {arguments.size}, one image, ms")
    for key, timings in report.timings.items():
        times = [f"{timings[name].median:.2f}" if name in timings else "-" for name in names]
        table.add_row(key, *times, report.best(key)[0])
    Console(width=150).print(table)
    ratio = report.speedup("pruned", "dense")
    for density in arguments.densities:
        print(f"blocks 16x8 at {density}: {blocks(arguments, density, image)}", flush=True)
    print(f"ratio: {ratio:.4f}")


def blocks(arguments: argparse.Namespace, density: float, image: torch.Tensor) -> str:
    """Returns the time of the accelerated network with blocks of zeros, and its ratio to the best dense execution."""
    model, generator = network(arguments), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d) and not name.startswith("heads") and name != "model.0.conv":
                layer.weight.copy_(pruned(layer.weight, "16x8", density, generator))
    found = mg.accelerate(model, image, against=arguments.executions, cache=None).report()
    times = found.times
    by = f"{times[found.chosen]:.2f} ms by {found.chosen}, best dense {times[found.best_dense]:.2f} by {found.best_dense}"
    return f"{by}, ratio {times[found.best_dense] / times[found.chosen]:.2f}"


if __name__ == "__main__":
    main()
