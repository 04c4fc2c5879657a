"""Claim: searching with SMART costs at most a twentieth of a training step.

A training step with SMART (blocks of 16x8, every layer, in the middle of the search) beside the dense step and the step with
exact masks, interleaved in one process, medians: ResNet-50 at 64x64 with batch 32, and ResNet-56 on 32x32 with batch 128.
Last line: SMART / dense of ResNet-50; goal <= 1.05.

Numbers below float32's normal range are flushed to zero for all three: an untrained network that fits one batch soon has
gradients there, on which a processor is ten times slower, whatever the step.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn
from torch.nn import functional

import microglia as mg
from microglia.methods import Smart
from microglia.train.optim import FitConfig, make_optimizers

DENSITY = 0.3
CASES = {
    "resnet50-224": ("torchvision:resnet50", 224, 8, 1000),
    "resnet50": ("torchvision:resnet50", 64, 32, 1000),
    "resnet56": ("resnet56", 32, 128, 10),
}


def model_of(name: str) -> nn.Module:
    source, side, _, classes = CASES[name]
    torch.manual_seed(0)
    return mg.tasks.build(source, classes=classes, shape=(3, side, side)).to(memory_format=torch.channels_last)


class Training:
    """One model and its optimizers, a step at a time."""

    def __init__(self, name: str, kind: str, device: str) -> None:
        self.model, self.device = model_of(name).to(device).train(), device
        self.pruner = None
        further: list[torch.optim.Optimizer] = []
        rest = list(self.model.parameters())
        if kind == "smart":
            self.pruner = Smart(self.model, pattern="block:16x8", density=DENSITY, total_steps=1000, search=1.0)
            self.pruner.steps = 500  # where temperature separates the masks
            rest, further = self.pruner.weights_to_train(), self.pruner.optimizers()
        elif kind == "masked":
            mg.methods.OneShot(self.model, pattern="block:16x8", density=DENSITY)
        self.optimizers = make_optimizers(FitConfig(lr=0.01), [{"params": rest}], further)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Returns the seconds of one training step."""
        start = self.now()
        loss = functional.cross_entropy(self.model(inputs), targets)
        if self.pruner is not None:
            loss = loss + self.pruner.penalty()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if self.pruner is not None:
            self.pruner.step(self.optimizers[0])
        return self.now() - start

    def now(self) -> float:
        """Returns the time, on a GPU after all that was asked of it."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()


def compare(name: str, rounds: int, device: str) -> float:
    _, side, batch, classes = CASES[name]
    inputs = torch.randn(batch, 3, side, side).to(device, memory_format=torch.channels_last)
    targets = torch.randint(classes, (batch,), device=device)
    trainings = {kind: Training(name, kind, device) for kind in ("dense", "masked", "smart")}
    times: dict[str, list[float]] = {kind: [] for kind in trainings}
    for number in range(rounds + 1):
        for kind, training in trainings.items():
            taken = training.step(inputs, targets)
            if number:  # the first one warms up
                times[kind].append(taken)
    median = {kind: statistics.median(t) for kind, t in times.items()}
    print(f"\n{name}, {side}x{side}, batch {batch}, {rounds} rounds, {torch.get_num_threads()} threads")
    for kind, value in median.items():
        paired = statistics.median(a / b for a, b in zip(times[kind], times["dense"], strict=True))
        print(f"{kind:8}{value * 1e3:9.1f} ms {value / median['dense']:7.3f}x of dense (median of paired ratios {paired:.3f})")
    return statistics.median(a / b for a, b in zip(times["smart"], times["dense"], strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)  # before the first thread is made: threads inherit it
    ratios = {name: compare(name, arguments.rounds, arguments.device) for name in arguments.models}
    print(f"\nratio: {ratios.get('resnet50', next(iter(ratios.values()))):.3f}")
