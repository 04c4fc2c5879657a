"""Claim: half of the channels and int8 together run a ResNet-50 ten times as fast as the best dense float32 engine.

Three networks with random weights (time does not depend on their values), one image of 224 x 224, one thread: dense, and with
half of every channel group removed; each in float32 by PyTorch's own executions, ONNX Runtime and OpenVINO, and in int8 by
NNCF and OpenVINO. All of one network run interleaved in one process; medians. Int8 pays most on a processor with VNNI (or
AMX), which multiplies bytes in one instruction: the script prints what this one has. Last line: the best dense float32 of all
engines / half of the channels in int8, ResNet-50; goal >= 10 with VNNI. Run: ``python benchmarks/export_speed.py``, or one
network at a time, ``--only vit-s``: each is kept in ``--state``, and the output shows all that were measured on this machine.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import microglia as mg
from microglia.core.timing import processor_name, time_interleaved
from microglia.measure import executions
from microglia.storage.files import write_atomic
from models import randomize, timm, torchvision

MODELS = {"resnet50": "resnet50", "vit-s": "vit_small_patch16_224", "mobilenet-v2": "mobilenet_v2"}
"""Short name -> name in torchvision or timm."""
COMPILED = ("resnet50",)
"""Models that torch.compile is timed on, too: it takes a minute for each and needs a C++ compiler."""
ENGINES = ("onnxruntime", "openvino", "openvino-int8")
FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8")
"""Flags of a processor that decide what int8 gains, as Linux names them."""

HALF = "half of the channels"
Times = dict[str, dict[str, float]]
"""Version of the network -> execution -> milliseconds."""


def build(name: str) -> nn.Module:
    """Builds a model of torchvision, or else of timm, with norms that are not the identity."""
    torch.manual_seed(0)
    known = name in torchvision.models.list_models()
    model = torchvision.models.get_model(name, weights=None) if known else timm.create_model(name, pretrained=False)
    return randomize(model).eval()


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the times of both versions of a network in every engine, interleaved, the notes, and the seconds to prepare."""
    x = torch.randn(1, 3, arguments.size, arguments.size, generator=torch.Generator().manual_seed(0))
    dense, start = build(name), time.perf_counter()
    versions = {"dense": dense, HALF: mg.prune_channels(dense, x, mg.Budget(density=0.5), round_to=16)}
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
        times[form][kind] = timing.median
    return {"times": times, "notes": list(dict.fromkeys(notes)), "seconds": prepared}


def best_float(times: dict[str, float]) -> tuple[str, float]:
    """Returns the fastest execution in float32, and its milliseconds."""
    exact = {kind: ms for kind, ms in times.items() if kind != "openvino-int8"}
    best = min(exact, key=exact.__getitem__)
    return best, exact[best]


def show(name: str, found: dict[str, Any], console: Console) -> None:
    """Prints milliseconds of each version by execution, and how many times faster than the best dense float32."""
    times: Times = found["times"]
    kinds = tuple(dict.fromkeys(kind for own in times.values() for kind in own))
    best, base = best_float(times["dense"])
    table = Table("", *kinds, "best float32", "faster", "int8 faster", title=f"{name}, batch 1, ms (dense float32: {best})")
    for form, own in times.items():
        cells = [f"{own[kind]:.2f}" if kind in own else "-" for kind in kinds]
        rounded = own.get("openvino-int8")
        fastest, median = best_float(own)
        ratios = (f"{base / median:.2f}x", "-" if rounded is None else f"{base / rounded:.2f}x")
        table.add_row(form, *cells, fastest, *ratios)
    console.print(table)
    for note in found["notes"]:
        console.print(f"  {note}", highlight=False)
    console.print(f"  prepared in {found['seconds']:.0f} s\n", highlight=False)


def summary(found: dict[str, dict[str, Any]]) -> Table:
    """Returns the four times of each network: dense and half, in the best float32 and in int8."""
    table = Table("ms", "dense", HALF, "int8", f"{HALF}, int8", "dense / both", title="Best float32 of all engines, and int8")
    for name, own in found.items():
        (_, dense), (_, half) = best_float(own["times"]["dense"]), best_float(own["times"][HALF])
        rounded = [own["times"][form].get("openvino-int8", float("nan")) for form in ("dense", HALF)]
        table.add_row(name, *(f"{ms:.2f}" for ms in (dense, half, *rounded)), f"{dense / rounded[1]:.2f}x")
    return table


def kept(file: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns what was measured: machine and settings -> network -> times."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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
    parser.add_argument(
        "--models", "--only", nargs="+", default=list(MODELS), metavar="NAME",
        help=f"{', '.join(MODELS)}, or names of torchvision or timm",
    )  # fmt: skip
    parser.add_argument("--state", type=Path, default=Path("runs/export_speed.json"), help="where each network is kept")
    parser.add_argument("--again", action="store_true", help="measure networks again that are in the state")
    parser.add_argument("--compiled", nargs="*", default=list(COMPILED), help="models to time with torch.compile, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=30.0, help="no further round starts after this time, for each network")
    parser.add_argument("--size", type=int, default=224, help="of the images")
    parser.add_argument("--quick", action="store_true", help="MobileNet-v2 alone, three rounds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.rounds = ["mobilenet-v2"], 3
    torch.set_num_threads(arguments.threads)
    console = Console(width=160)
    where = f"{processor_name()}, {arguments.threads} thread(s), {packages()}"
    print(f"{where}\n{flags()}\n", flush=True)
    settings = f"{where}; {arguments.size} pixels, {arguments.rounds} rounds, {arguments.seconds:g} s"
    state = kept(arguments.state)
    found = state.setdefault(settings, {})
    for given in arguments.models:
        name = MODELS.get(given, given)
        if name not in found or arguments.again:
            found[name] = compare(name, arguments)
            write_atomic(arguments.state, json.dumps(state, indent=1))
    for name, own in found.items():
        show(name, own, console)
    console.print(summary(found))
    ratios = {
        name: best_float(own["times"]["dense"])[1] / own["times"][HALF]["openvino-int8"]
        for name, own in found.items()
        if "openvino-int8" in own["times"][HALF]
    }
    print(f"ratio: {ratios.get('resnet50', next(iter(ratios.values()), float('nan'))):.4f}")


if __name__ == "__main__":
    main()
