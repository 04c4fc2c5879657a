"""Claim: half of a model's channels leave, verified, in two to three times the time that `torch.export` alone takes.

Ten models with random weights, in evaluation mode, one thread. Each round measures, one after another, `torch.export` of the
model (strict=False, nothing else), `prune_channels` to half of every group with verification, and the same without. Seconds are
those of the processor, so that other work on the machine counts little; medians of the rounds. ``traces`` counts the traces of
one cut.

Run: ``python benchmarks/cut_time.py``; one model: ``--only deit3_small_patch16_224``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import microglia as mg
from microglia.graph.cutting import live
from microglia.zoo.external import import_torchvision
from models import randomize

MODELS = {
    "resnet50": ("torchvision", 64),
    "vgg16_bn": ("torchvision", 64),
    "mobilenet_v2": ("torchvision", 64),
    "densenet121": ("torchvision", 64),
    "efficientnet_b0": ("torchvision", 64),
    "convnext_tiny": ("torchvision", 64),
    "swin_t": ("torchvision", 64),
    "deit3_small_patch16_224": ("timm", 224),
    "beit_base_patch16_224": ("timm", 224),
    "gcvit_xxtiny": ("timm", 224),
}
"""Model -> its library and the size of its images."""


def build(name: str) -> nn.Module:
    """Returns a model with random weights and statistics, in evaluation mode."""
    torch.manual_seed(0)
    library = MODELS[name][0]
    if library == "torchvision":
        model = getattr(import_torchvision().models, name)(weights=None)
    else:
        import_torchvision()
        import timm

        model = timm.create_model(name, pretrained=False)
    randomize(model)
    return model.eval()


def seconds(run: Callable[[], object]) -> float:
    """Returns the processor's seconds of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(name: str, rounds: int) -> dict[str, float]:
    """Returns the median seconds of each step for one model, and the number of traces of one cut."""
    model, size = build(name), MODELS[name][1]
    x = torch.randn(1, 3, size, size)
    traced = []
    original = live.trace

    def counted(*args: object, **kwargs: object) -> object:
        traced.append(1)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    def cut(*, verified: bool = True) -> None:
        mg.prune_channels(model, x, mg.Budget(density=0.5), verified=verified)

    steps = {
        "export": lambda: torch.export.export(model, (x,), strict=False),
        "verified": cut,
        "unverified": lambda: cut(verified=False),
    }
    live.trace = counted  # type: ignore[assignment]
    cut()
    live.trace = original
    found: dict[str, list[float]] = {step: [] for step in steps}
    for _ in range(rounds):
        for step, run in steps.items():
            found[step].append(seconds(run))
    return {**{step: statistics.median(values) for step, values in found.items()}, "traces": len(traced)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = Table("model", "traces", "torch.export", "verified", "unverified", "verified / export")
    rows = {}
    for name in args.only:
        row = rows[name] = measure(name, args.rounds)
        row["ratio"] = row["verified"] / row["export"]
        shown = [f"{row[key]:.2f} s" for key in ("export", "verified", "unverified")]
        table.add_row(name, f"{row['traces']:.0f}", *shown, f"{row['ratio']:.2f}")
    Console(width=120).print(table)
    if args.out:
        args.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(f"ratio: {statistics.geometric_mean(row['ratio'] for row in rows.values()):.2f}")


if __name__ == "__main__":
    main()
