"""Claim: int8 blocks of 16 outputs x 4 inputs at density 0.3 run 2.8 times as fast as the best dense int8 engine.

Chains of ResNet-50's layers, batch 1, one thread: pairs of 1x1 convolutions (the widest and the narrowest of each stage) and
3x3 convolutions, each several times in a row with ReLU between, so that values stay in 8 bits as they do in a network and the
conversions at both ends count little. Weights and masks are random (exact count of blocks); times only. Beside ours: dense
int8 by OpenVINO with NNCF's post-training quantization and by ONNX Runtime, and dense float32 by oneDNN with packed weights
and by OpenVINO. All ways of a chain are timed interleaved in one process, medians, milliseconds for one layer (or pair).

The title names the level of our kernels: the claim is made for a processor with VNNI (level avx512vnni or avx512bf16). At the
level avx2 both sides multiply in 16 bits.

Last line: geometric mean of the best dense int8 over ours at density 0.3; goal >= 2.8 on VNNI. Run:
``python benchmarks/int8_blocks.py``; ``--end-to-end`` for ResNet-50 as `microglia.accelerate` makes it, beside the same engines
(goal >= 2.4 over dense int8, its last line is that ratio).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import microglia as mg
import records
from block_layers import pruned
from microglia.core.batch import Example
from microglia.core.running import first_line, folded_twin, undisturbed
from microglia.core.timing import processor_name
from microglia.export.onnx import to_onnx
from microglia.measure import executions, time_interleaved
from microglia.runtime import level
from microglia.runtime.accelerate import sites_of
from microglia.runtime.dense.packing import Packed
from microglia.runtime.int8.calibration import ranges_of
from microglia.runtime.int8.candidates import int8_candidates
from microglia.runtime.int8.lowering import lower_to_int8
from microglia.runtime.operators import LEVELS
from microglia.runtime.precisions import precision_of
from records import geometric_mean
from resnet50_end_to_end import masked

CHAINS = {  # name -> channels in turn, kernel, side
    "1x1 64>256>64 @56": ((64, 256), 1, 56),
    "1x1 512>128>512 @28": ((512, 128), 1, 28),
    "1x1 256>1024>256 @14": ((256, 1024), 1, 14),
    "1x1 512>2048>512 @7": ((512, 2048), 1, 7),
    "3x3 64 @56": ((64,), 3, 56),
    "3x3 128 @28": ((128,), 3, 28),
    "3x3 256 @14": ((256,), 3, 14),
    "3x3 512 @7": ((512,), 3, 7),
}
ENGINES = {"float32": ("packed", "openvino"), "int8": ("openvino-int8", "onnxruntime-int8")}
REPEATS = 4


def chain_of(channels: tuple[int, ...], kernel: int, density: float, seed: int) -> nn.Sequential:
    """Returns convolutions that go through the channels in turn, and back to the first, several times."""
    generator, layers = torch.Generator().manual_seed(seed), list[nn.Module]()
    for _ in range(REPEATS):
        for inputs, outputs in zip(channels, (*channels[1:], channels[0]), strict=True):
            layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
            weight = torch.randn(layer.weight.shape, generator=generator) * (2 / inputs / kernel**2) ** 0.5
            with torch.no_grad():
                layer.weight.copy_(weight if density == 1 else pruned(weight, "16x4", density, generator))
            layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def ours(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Returns the model with every layer in int8 blocks."""
    example, twin = Example.of(x), folded_twin(model)
    with undisturbed():
        ways = [way for site in sites_of(twin, example, precision_of("int8")) for way in int8_candidates(site)]
        plan = lower_to_int8(twin, example, ways, ranges_of(twin, [example], Packed))
    last = x.contiguous(memory_format=torch.channels_last)
    return lambda: plan(last)


def onnxruntime_int8(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Returns the model in ONNX Runtime in int8: static quantization, weights by channel, calibrated on the input alone."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Once(CalibrationDataReader):
        left = True

        def get_next(self) -> dict[str, Any] | None:
            given, self.left = ({name: x.numpy()} if self.left else None), False
            return given

    with tempfile.TemporaryDirectory() as folder:
        file, rounded = (Path(folder) / name for name in ("model.onnx", "int8.onnx"))
        to_onnx(model, Example.of(x), file, dynamic=())
        name = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).get_inputs()[0].name
        narrow = LEVELS.index(level()) < LEVELS.index("avx512vnni")  # else its products overflow 16 bits
        quantize_static(
            file, rounded, Once(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=narrow,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(rounded, options, providers=["CPUExecutionProvider"])
    given = {name: x.numpy()}
    return lambda: session.run(None, given)


def dense_calls(model: nn.Module, x: Tensor, notes: list[str]) -> dict[str, Callable[[], object]]:
    """Returns the dense model in every engine that is here; the notes say why another is not."""
    names = [name for several in ENGINES.values() for name in several if name != "onnxruntime-int8"]
    calls: dict[str, Callable[[], object]] = dict(executions(model, x, names, notes=notes))
    try:
        calls["onnxruntime-int8"] = onnxruntime_int8(model, x)
    except Exception as error:
        notes.append(f"onnxruntime-int8 was left out: {first_line(error)}")
    return calls


def best(times: dict[str, float], kind: str) -> float:
    return min(time for name, time in times.items() if name in ENGINES[kind])


def layers(arguments: argparse.Namespace, console: Console) -> float:
    """Prints the table of the chains; returns the ratio of the last line."""
    names = [f"{density:g}" for density in arguments.densities]
    heads = ("chain", "float32", "int8", "by", *(f"ours {name}" for name in names), *(f"x int8, {name}" for name in names))
    title = f"ms of one layer or pair, batch 1, {torch.get_num_threads()} thread(s), level {level()}, {processor_name()}"
    table, notes, rows = Table(*heads, title=title), list[str](), []
    for name in arguments.chains or CHAINS:
        channels, kernel, side = CHAINS[name]
        x = torch.rand(1, channels[0], side, side, generator=torch.Generator().manual_seed(0))
        calls = dense_calls(chain_of(channels, kernel, 1.0, 0), x, notes)
        calls |= {density: ours(chain_of(channels, kernel, float(density), 0), x) for density in names}
        with torch.no_grad():
            measured = time_interleaved(calls, rounds=arguments.rounds, min_round_seconds=0.01)
        times = {call: timing.median / REPEATS for call, timing in measured.items()}
        int8 = best(times, "int8")
        by = next(call for call, time in times.items() if time == int8)
        rows.append({"chain": name, "times": times, "speedups": {density: int8 / times[density] for density in names}})
        cells = [f"{times[density]:.3f}" for density in names] + [f"{int8 / times[density]:.2f}" for density in names]
        table.add_row(name, f"{best(times, 'float32'):.3f}", f"{int8:.3f}", by, *cells)
    means = {density: geometric_mean([row["speedups"][density] for row in rows]) for density in names}
    wide = {
        density: geometric_mean([best(row["times"], "float32") / row["times"][density] for row in rows]) for density in names
    }
    table.add_section()
    table.add_row("geometric mean", "", "", "", *[""] * len(names), *(f"{mean:.2f}" for mean in means.values()))
    table.add_row("over float32", "", "", "", *[""] * len(names), *(f"{mean:.2f}" for mean in wide.values()))
    console.print(table, *dict.fromkeys(notes), sep="\n")
    records.write(arguments.json, "int8", rows=rows, means=means, over_float32=wide)
    return means.get("0.3", next(iter(means.values())))


def network(arguments: argparse.Namespace, console: Console) -> float:
    """Prints the times of ResNet-50; returns the ratio of the last line."""
    generator = torch.Generator().manual_seed(0)
    x, calibration = (torch.randn(size, 3, 224, 224, generator=generator) for size in (1, 4))
    dense, notes = masked(1.0, "16x4"), list[str]()
    calls = dense_calls(dense, x, notes)
    reports = {}
    for density in arguments.densities:
        fast = mg.accelerate(
            masked(density, "16x4"), x, precision="int8", calibration=[calibration], against=("packed",), cache=None
        )
        calls[f"{density:g}"], reports[density] = (lambda fast=fast: fast(x)), fast.report()
    measured = time_interleaved(calls, rounds=arguments.rounds, max_seconds=240)
    times = {name: timing.median for name, timing in measured.items()}
    int8 = best(times, "int8")
    table = Table(
        "execution", "ms", "runs as", "x the best dense int8", title=f"ResNet-50, batch 1, level {level()}, {processor_name()}"
    )
    for name, time in times.items():
        how = next((report.chosen for density, report in reports.items() if name == f"{density:g}"), "dense")
        table.add_row(name, f"{time:.2f}", how, f"{int8 / time:.2f}")
    console.print(table, *notes, *(f"{d:g}: {r.rounding}" for d, r in reports.items()), sep="\n")
    records.write(arguments.json, "int8 network", times={name: asdict(timing) for name, timing in measured.items()})
    return int8 / times.get("0.3", times[f"{arguments.densities[0]:g}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--end-to-end", action="store_true", help="ResNet-50 as a whole instead of its layers")
    parser.add_argument("--chains", nargs="+", choices=CHAINS, metavar="NAME")
    parser.add_argument("--densities", nargs="+", type=float)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    arguments.densities = arguments.densities or ([0.3] if arguments.end_to_end else [1.0, 0.5, 0.3, 0.1])
    torch.set_num_threads(1)
    ratio = (network if arguments.end_to_end else layers)(arguments, Console(width=150))
    print(f"ratio: {ratio:.3f}")


if __name__ == "__main__":
    main()
