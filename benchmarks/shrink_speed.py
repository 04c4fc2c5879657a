"""Claim: half of the channels makes a model as much faster as it makes it smaller.

Half of every channel group is removed, with widths rounded to multiples of 16 and without. Dense and shrunk models are timed
interleaved in one process, each in every execution asked for, and compared by the best of each (medians). The speed-up stands
beside the FLOPs ratio (multiply-accumulates before / after); their quotient says how much of the saving arrives. Weights are
random: time does not depend on their values.

``--ms`` adds, at the first batch size, a model by a budget in milliseconds: the best dense time over the FLOPs ratio, which is
the time that the operations promise. The search times candidate widths in the same executions (``compiled`` makes it slow). The
result is timed again beside the others, and its quotient is that of the FLOPs ratio *asked for*: at 1 the promise is kept.

Last line: the quotient of ResNet-50 at batch 1, widths to 16; goal >= 0.95. Run: ``python benchmarks/shrink_speed.py``
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import microglia as mg
from microglia.measure import measure_latency
from models import timm, torchvision

MODELS = ("resnet50", "mobilenet_v2", "convnext_tiny", "vit_small_patch16_224")
EXECUTIONS = ("eager", "eager-channels-last", "packed", "compiled", "onnxruntime", "openvino")
ROUNDINGS = (16, 1)

Sides = dict[str, nn.Module]
Ratios = dict[str, float]


def build(name: str) -> nn.Module:
    """Builds a model of torchvision, or else of timm, in evaluation mode."""
    torch.manual_seed(0)
    known = name in torchvision.models.list_models()
    model = torchvision.models.get_model(name, weights=None) if known else timm.create_model(name, pretrained=False)
    return model.eval()


def shrunk(dense: nn.Module, size: int) -> tuple[Sides, Ratios]:
    """Returns the model with half of its channels, by rounding, and the FLOPs ratio of each."""
    models, ratios = {}, {}
    for round_to in ROUNDINGS:
        start = time.perf_counter()
        small = mg.prune_channels(dense, torch.randn(1, 3, size, size), mg.Budget(density=0.5), round_to=round_to)
        plan = mg.graph.plan_of(small)
        name = f"half, to {round_to}" if round_to > 1 else "half, exact"
        models[name], ratios[name] = small, plan.macs[0] / plan.macs[1]
        print(
            f"  {name}: {plan.kind}, {time.perf_counter() - start:.1f} s, {100 * plan.parameters[1] / plan.parameters[0]:.1f} %"
        )
    return models, ratios


def by_time(dense: nn.Module, arguments: argparse.Namespace, promised: float) -> nn.Module:
    """Returns the model whose best time is that of the dense one over the promised speed-up."""
    x = torch.randn(arguments.batches[0], 3, arguments.size, arguments.size)
    usual = measure_latency({"dense": dense}, x, executions=arguments.executions).best("dense")[1].median
    small = mg.prune_channels(dense, x, mg.Budget(ms=usual / promised), round_to=16, executions=arguments.executions)
    plan = mg.graph.plan_of(small)
    print(f"  by time: asked {usual / promised:.2f} ms; MACs {plan.macs[0] / plan.macs[1]:.2f} times fewer")
    return small


def compare(
    name: str, models: dict[str, nn.Module], ratios: dict[str, float], batch: int, arguments: argparse.Namespace
) -> Table:
    """Times dense and shrunk models on one batch size; returns the table, and notes the quotients on the arguments."""
    report = measure_latency(
        models,
        torch.randn(batch, 3, arguments.size, arguments.size),
        executions=arguments.executions,
        rounds=arguments.rounds,
        max_seconds=arguments.seconds,
    )
    title = f"{name}, batch {batch} at {arguments.size}, ms (median of up to {arguments.rounds} interleaved rounds)"
    table = Table(title=title)
    for column in ("", *arguments.executions, "best", "speed-up", "FLOPs ratio", "speed-up / FLOPs ratio"):
        table.add_column(column, justify="right")
    for key, timings in report.timings.items():
        times = [f"{timings[kind].median:.2f}" if kind in timings else "-" for kind in arguments.executions]
        own = ["", "", ""]
        if key != "dense":
            speedup = report.speedup(key, "dense")
            arguments.quotients[name, batch, key] = speedup / ratios[key]
            own = [f"{speedup:.2f}", f"{ratios[key]:.2f}", f"{speedup / ratios[key]:.2f}"]
        table.add_row(key, *times, report.best(key)[0], *own)
    for note in report.notes:
        print(f"  {note}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of torchvision or timm")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--executions", nargs="+", default=list(EXECUTIONS), choices=EXECUTIONS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60.0, help="no further round starts after this time, for each table")
    parser.add_argument("--ms", action="store_true", help="add a model by a budget in milliseconds")
    parser.add_argument("--size", type=int, default=224, help="of the images")
    arguments = parser.parse_args()
    arguments.quotients = {}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in arguments.models:
        print(name, flush=True)
        dense = build(name)
        small, ratios = shrunk(dense, arguments.size)
        if arguments.ms:
            promised = ratios["half, to 16"]
            small["by time"], ratios["by time"] = by_time(dense, arguments, promised), promised
        for batch in arguments.batches:
            Console(width=170).print(compare(name, {"dense": dense, **small}, ratios, batch, arguments))
    wanted = [q for (name, batch, key), q in arguments.quotients.items() if name == "resnet50" and batch == 1 and "16" in key]
    found = wanted or list(arguments.quotients.values())
    print(f"ratio: {found[0]:.4f}")


if __name__ == "__main__":
    main()
