"""What masks cost while training: a ResNet-56 training step with masks beside the dense step, interleaved in one process.

Goal: ratio <= 1.03.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn
from torch.nn import functional

import microglia as mg


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    began = time.perf_counter()
    loss = functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(arguments.batch, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(10, (arguments.batch,), generator=generator)
    models = {}
    for name in ("dense", "masked"):
        torch.manual_seed(0)
        models[name] = mg.tasks.build("resnet56").to(memory_format=torch.channels_last)
    mg.methods.OneShot(models["masked"], density=0.2)
    optimizers = {n: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4) for n, m in models.items()}

    times: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(arguments.rounds + 3):
        for name in sorted(models, reverse=bool(round_ % 2)):
            seconds = step(models[name], optimizers[name], inputs, targets)
            if round_ >= 3:
                times[name].append(seconds)
    print(f"ResNet-56 training step, batch {arguments.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(f"{name:>8}: median {1e3 * median:8.2f} ms   quartiles {1e3 * low:8.2f} .. {1e3 * high:8.2f}")
    pairs = [masked / dense for masked, dense in zip(times["masked"], times["dense"], strict=True)]
    print(f"ratio: {statistics.median(pairs):.4f}")


if __name__ == "__main__":
    main()
