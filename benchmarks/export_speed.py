"""Claim: half of the channels and int8 together run a ResNet-50 ten times as fast as the best dense float32 engine.

Three networks with random weights (time does not depend on their values), one image of 224 x 224, one thread: dense, and with
half of every channel group removed; each in float32 by PyTorch's own executions, ONNX Runtime and OpenVINO, and in int8 by
NNCF and OpenVINO. All of one network run interleaved in one process; medians. Int8 pays most on a processor with VNNI (or
AMX), which multiplies bytes in one instruction: the script prints what this one has. Last line: the best dense float32 of all
engines / half of the channels in int8, ResNet-50; goal >= 10 with VNNI. Run: ``python benchmarks/export_speed.py``
"""

from __future__ import annotations

import argparse
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import microglia as mg
from microglia.core.timing import Timing, processor_name, time_interleaved
from microglia.measure import executions
from models import randomize, timm, torchvision

MODELS = ("resnet50", "vit_small_patch16_224", "mobilenet_v2")
COMPILED = ("resnet50",)
"""Models that torch.compile is timed on, too: it takes a minute for each and needs a C++ compiler."""
ENGINES = ("onnxruntime", "openvino", "openvino-int8")
FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8")
"""Flags of a processor that decide what int8 gains, as Linux names them."""

Times = dict[str, dict[str, Timing]]
"""Version of the network -> execution -> time."""


def build(name: str) -> nn.Module:
    """Builds a model of torchvision, or else of timm, with norms that are not the identity."""
    torch.manual_seed(0)
    known = name in torchvision.models.list_models()
    model = torchvision.models.get_model(name, weights=None) if known else timm.create_model(name, pretrained=False)
    return randomize(model).eval()


def compare(name: str, arguments: argparse.Namespace, console: Console) -> Times:
    """Times both versions of a network in every engine, interleaved, and prints the table."""
    x = torch.randn(1, 3, arguments.size, arguments.size, generator=torch.Generator().manual_seed(0))
    dense, start = build(name), time.perf_counter()
    versions = {"dense": dense, "half of the channels": mg.prune_channels(dense, x, mg.Budget(density=0.5), round_to=16)}
    kinds = ("eager", "eager-channels-last", "packed", *(("compiled",) if name in arguments.compiled else ()), *ENGINES)
    calls, notes = {}, []
    for form, model in versions.items():
        for kind, call in executions(model, x, kinds, notes=notes).items():
            calls[f"{form}/{kind}"] = call
    prepared = time.perf_counter() - start
    measured = time_interleaved(calls, rounds=arguments.rounds, max_seconds=arguments.seconds)
    times: Times = {form: {} for form in versions}
    for key, timing in measured.items():
        form, _, kind = key.partition("/")
        times[form][kind] = timing
    show(name, times, kinds, console)
    for note in dict.fromkeys(notes):
        console.print(f"  {note}", highlight=False)
    console.print(f"  prepared in {prepared:.0f} s\n", highlight=False)
    return times


def best_float(times: dict[str, Timing]) -> tuple[str, float]:
    """Returns the fastest execution in float32, and its milliseconds."""
    exact = {kind: timing.median for kind, timing in times.items() if kind != "openvino-int8"}
    best = min(exact, key=exact.__getitem__)
    return best, exact[best]


def show(name: str, times: Times, kinds: tuple[str, ...], console: Console) -> None:
    """Prints milliseconds of each version by execution, and how many times faster than the best dense float32."""
    best, base = best_float(times["dense"])
    table = Table("", *kinds, "best float32", "faster", "int8 faster", title=f"{name}, batch 1, ms (dense float32: {best})")
    for form, own in times.items():
        cells = [f"{own[kind].median:.2f}" if kind in own else "-" for kind in kinds]
        rounded = own.get("openvino-int8")
        fastest, median = best_float(own)
        ratios = (f"{base / median:.2f}x", "-" if rounded is None else f"{base / rounded.median:.2f}x")
        table.add_row(form, *cells, fastest, *ratios)
    console.print(table)


def flags() -> str:
    """Returns which of the flags that matter this processor has, and a sentence where int8 cannot be at its best."""
    file = Path("/proc/cpuinfo")
    line = next((row for row in file.read_text().splitlines() if row.startswith("flags")), "") if file.is_file() else ""
    have = [flag for flag in FLAGS if flag in line.split()]
    said = f"processor flags: {', '.join(have) or 'none of ' + ', '.join(FLAGS)}"
    if any(flag.endswith(("vnni", "amx_int8")) for flag in have):
        return said
    return f"{said}; no VNNI: int8 needs three instructions where such a processor needs one, and the goal of 10 is not for it"


def packages() -> str:
    """Returns the versions of PyTorch and of the engines that are installed."""
    found = []
    for package in ("torch", "onnxruntime", "openvino", "nncf"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of torchvision or timm")
    parser.add_argument("--compiled", nargs="*", default=list(COMPILED), help="models to time with torch.compile, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=30.0, help="no further round starts after this time, for each model")
    parser.add_argument("--size", type=int, default=224, help="of the images")
    parser.add_argument("--quick", action="store_true", help="MobileNet-v2 alone, three rounds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.rounds = ["mobilenet_v2"], 3
    torch.set_num_threads(arguments.threads)
    console = Console(width=160)
    print(f"{processor_name()}, {arguments.threads} thread(s), {packages()}\n{flags()}\n", flush=True)
    ratios = {}
    for name in arguments.models:
        times = compare(name, arguments, console)
        if "openvino-int8" in times["half of the channels"]:
            ratios[name] = best_float(times["dense"])[1] / times["half of the channels"]["openvino-int8"].median
    print(f"ratio: {ratios.get('resnet50', next(iter(ratios.values()), float('nan'))):.4f}")


if __name__ == "__main__":
    main()
