"""Claim: a packed ResNet-50 is read from a fraction of the bytes of its dense file; the table says how long each takes.

Weights are random; 20 % of each layer are kept and rounded to 4 bits, so that sizes are about those of Deep Compression. Each
side ends with a model that can be called: built, its weights in place. "safetensors alone" builds the model and loads the dense
file by its own library, without this one's plan and checks. The sides take turns, and the table has medians. All files are in
the cache of the operating system: the seconds are those of reading from memory, decoding and building. "per second" is the
speed of a disk below which the packed file is the faster one.

    python benchmarks/unpack.py [MODEL]     # a name of the zoo, or timm:NAME; default timm:resnet50
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import microglia as mg

ROUNDS = 5
USUAL = "timm:resnet50"


def interleaved(sides: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Returns the median seconds of each side over rounds in which all take turns, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    """Prints bytes and seconds of each side, and the ratio of the seconds."""
    name = sys.argv[1] if len(sys.argv) > 1 else USUAL
    classes, shape = (1000, (3, 224, 224)) if name.startswith("timm:") else (10, (3, 32, 32))
    torch.manual_seed(0)

    def built() -> nn.Module:
        return mg.tasks.build(name, classes=classes, shape=shape).eval()

    def plain(file: Path) -> nn.Module:
        model = built()
        model.load_state_dict(load_file(file))
        return model

    model = built()
    with tempfile.TemporaryDirectory() as folder:
        dense, alone, packed = Path(folder) / "dense", Path(folder) / "alone.safetensors", Path(folder) / "model.mgpack"
        mg.save(model, dense)
        save_file(model.state_dict(), alone)
        mg.methods.OneShot(model, density=0.2, scope="layer").finish()
        contents = mg.pack(model, packed, bits=4)
        files = {"safetensors alone": alone, "dense, microglia.load": dense / "model.safetensors", "packed": packed}
        times = interleaved(
            {
                "build without weights": built,
                "safetensors alone": lambda: plain(alone),
                "dense, microglia.load": lambda: mg.load(dense, trust=True),
                "packed": lambda: mg.unpack(packed, trust=True),
            }
        )
        sizes = {side: file.stat().st_size for side, file in files.items()}
    print(f"{name}: {contents.ratio:.1f}x smaller than its tensors without coding; {torch.get_num_threads()} threads")
    for side, seconds in times.items():
        print(f"{side:22}{sizes.get(side, 0):14,} bytes read {seconds:8.3f} s to a runnable model")
    more = times["packed"] - times["safetensors alone"]
    if more > 0:
        print(f"equal at {(sizes['safetensors alone'] - sizes['packed']) / more / 1e6:,.0f} MB per second")
    print(f"ratio: {times['packed'] / times['safetensors alone']:.2f}")


if __name__ == "__main__":
    main()
