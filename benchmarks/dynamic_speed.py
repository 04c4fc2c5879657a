"""Claim: a gated model that computes half of its operations for an input is faster on it than the dense model at its best.

Batch 1, one thread. Dense in its fastest execution, masked (all channels computed, then masked) in its fastest, gathered (only
what the input needs is computed), and tuned (each layer the faster of both ways, by timing). The heads are those of FTWT, with
biases that keep random units: a share of each layer's, rounded up or down at random, so that the operations are what is asked
by the honest count. The time does not depend on what the weights are, and the cost of the heads is in it. A unit is a block of
16 filters where a layer has two of them (``--block 1``: single filters). Medians of interleaved rounds in one process. The
crossovers are those of the tuning. Last line: dense / the faster of gathered and tuned, ResNet-18 at 224x224 with half the
operations; goal >= 1.5. Where it loses, the table says so.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

import microglia as mg
from microglia.core.timing import time_interleaved
from microglia.dynamic import (
    Counter,
    Flow,
    GatePlan,
    Gathered,
    Passage,
    attach_gates,
    blocks_of,
    find_sites,
    gates_of,
    listening,
    tune,
)
from microglia.measure import executions

CASES = {
    "resnet56": ("resnet56", 32),
    "vgg16-bn": ("vgg16-bn", 32),
    "resnet18-64": ("torchvision:resnet18", 64),
    "resnet18-224": ("torchvision:resnet18", 224),
}
LEFT = (0.7, 0.5, 0.35)
GOAL = ("resnet18-224", 0.5)


class Subject:
    """One network, dense and with gates that keep a share of the units."""

    def __init__(self, name: str, block: int) -> None:
        source, side = CASES[name]
        torch.manual_seed(0)
        self.build = lambda: mg.tasks.build(source, classes=10, shape=(3, side, side)).eval()
        self.dense = self.build()
        self.x = torch.randn(1, 3, side, side)
        flow = Flow(self.dense, self.x)
        sites = find_sites(flow, self.dense).sites
        self.plan = GatePlan(sites, blocks=blocks_of(sites, block))
        self.counter = Counter(self.dense, flow, self.plan, self.x)

    def gated(self, share: float) -> nn.Module:
        """Returns the model with gates that keep this share of the units."""
        generator = torch.Generator().manual_seed(1)
        model = self.build()
        model.load_state_dict(self.dense.state_dict())
        attach_gates(model, self.plan, generator)
        with torch.no_grad():
            for gate in gates_of(model).values():
                units = len(gate.bias)
                order = torch.randperm(units, generator=generator)
                gate.weight.zero_()
                count = int(share * units + float(torch.rand((), generator=generator)))  # the share in the mean over layers
                gate.bias.fill_(-1)[order[: max(1, count)]] = 1
        return model

    def left(self, model: nn.Module) -> float:
        """Returns the fraction of the dense operations that the example takes, honestly counted."""
        masks: dict[str, torch.Tensor] = {}

        def hear(passage: Passage) -> None:
            masks[passage.gate.site.layer] = passage.mask

        with torch.no_grad(), listening(model, hear):
            model(self.x)
        return float(self.counter(masks).honest[0]) / self.counter.dense

    def at(self, flops: float) -> nn.Module:
        """Returns the gated model whose example takes this fraction of the dense operations, to the nearest share."""
        low, high = 0.0, 1.0
        for _ in range(8):
            middle = (low + high) / 2
            low, high = (middle, high) if self.left(self.gated(middle)) < flops else (low, middle)
        return self.gated((low + high) / 2)


def compare(name: str, rounds: int, block: int) -> dict[float, float]:
    """Prints one network's times; returns the ratio of dense to the faster of gathered and tuned at each budget."""
    subject = Subject(name, block)
    dense = executions(subject.dense, subject.x, ("eager", "eager-channels-last", "packed"))
    calls: dict[str, Any] = {f"dense {kind}": call for kind, call in dense.items()}
    shares: dict[float, float] = {}
    for flops in LEFT:
        model = subject.at(flops)
        shares[flops] = subject.left(model)
        masked = executions(model, subject.x, ("eager", "packed"))
        calls |= {f"{flops} masked {kind}": call for kind, call in masked.items()}
        gathered, tuned = Gathered(model, subject.x), Gathered(model, subject.x)
        crossovers = tune(tuned)
        calls[f"{flops} gathered"] = lambda fast=gathered: fast(subject.x)
        calls[f"{flops} tuned"] = lambda fast=tuned: fast(subject.x)
    times = {key: t.median for key, t in time_interleaved(calls, rounds=rounds).items()}
    best = min((k for k in times if k.startswith("dense")), key=times.__getitem__)
    print(f"\n{name}: {best}, {times[best]:.2f} ms; {subject.counter.dense:,} MACs, heads {subject.counter.heads:,}")
    print(f"{'MACs left':>9}  {'masked':>8}  {'gathered':>8}  {'tuned':>8}  {'dense / best':>12}  ideal")
    ratios = {}
    for flops in LEFT:
        own = min(v for k, v in times.items() if k.startswith(f"{flops} masked"))
        fast, fit = times[f"{flops} gathered"], times[f"{flops} tuned"]
        ratios[flops] = times[best] / min(fast, fit)
        line = f"{own:8.2f}  {fast:8.2f}  {fit:8.2f}  {ratios[flops]:12.2f}  {1 / shares[flops]:.2f}"
        print(f"{shares[flops]:9.3f}  {line}{'' if ratios[flops] > 1 else '   slower than dense'}")
    print("gathering is faster below this fraction of a layer's products:")
    for found in crossovers:
        shape, space = "x".join(map(str, found.shape)), "x".join(map(str, found.space))
        print(f"  {shape:>14} on {space:<8} {len(found.layers):3} layers  {found.limit:.2f}  (whole {found.whole:.3f} ms)")
    return ratios


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--block", type=int, default=16, help="filters that a gate keeps or skips together")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: compare(name, arguments.rounds, arguments.block) for name in arguments.models}
    name = GOAL[0] if GOAL[0] in found else next(iter(found))
    print(f"\nratio: {found[name][GOAL[1]]:.3f}")
