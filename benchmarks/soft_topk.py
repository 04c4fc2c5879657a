"""Claim: the differentiable top-k, forward and backward, costs less than half of sorting the scores once.

Scores are normal, k is 0.3 n. Ours starts cold, or warm from the threshold of scores that have moved a little, as in training.
Beside it what cannot be differentiated (`torch.topk`, `torch.sort`) and an unrolled bisection of 60 rounds. Medians of
interleaved rounds in one process, forward and backward together. Memory: the most that torch's allocator held at once during
one call, as its profiler records it, as a multiple of the scores' own; the resident size would not show what malloc has kept
from the calls before. Run with the millions of scores, or without for 0.2, 2 and 20.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from microglia.core.soft_topk import soft_topk

SHARE = 0.3
TEMPERATURES = (1.0, 1e-2, 1e-4)
RATIO_AT = (2_000_000, 1e-2)
UNROLLED_UP_TO = 2_000_000
ROUNDS = 9

Run = Callable[[], object]


def unrolled(scores: Tensor, keep: float, temperature: float) -> Tensor:
    """Every round of the bisection is part of the graph: what an implementation without the closed form costs.

    Its gradient reaches the ends of the bracket alone, so that it is wrong as well.
    """
    low, high = scores.min() - 60 * temperature, scores.max() + 60 * temperature
    for _ in range(60):
        middle = (low + high) / 2
        more = torch.sigmoid((scores - middle) / temperature).sum() > keep
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return torch.sigmoid((scores - (low + high) / 2) / temperature)


def runs(n: int, temperature: float) -> dict[str, Run]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(n, generator=generator)
    arrived = torch.randn(n, generator=generator)
    keep = SHARE * n
    before = soft_topk(scores - 1e-4 * torch.randn(n, generator=generator), keep, temperature).threshold

    def ours(start: Tensor | None) -> Tensor:
        own = scores.detach().requires_grad_()
        mask = soft_topk(own, keep, temperature, start=start).mask
        return torch.autograd.grad(mask, own, arrived)[0]

    def theirs() -> Tensor:
        own = scores.detach().requires_grad_()
        return torch.autograd.grad(unrolled(own, keep, temperature), own, arrived)[0]

    found: dict[str, Run] = {
        "microglia, cold": lambda: ours(None),
        "microglia, warm": lambda: ours(before),
        "torch.sort": lambda: torch.sort(scores),
        "torch.topk": lambda: torch.topk(scores, int(keep)),
    }
    return found | ({"bisection, unrolled": theirs} if n <= UNROLLED_UP_TO else {})


def peak_memory(run: Run, n: int) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0) / (4 * n)


def compare(n: int, temperature: float) -> dict[str, float]:
    candidates = runs(n, temperature)
    for run in candidates.values():
        run()
    memory = {name: peak_memory(run, n) for name, run in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS if n <= UNROLLED_UP_TO else 3):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(t) for name, t in times.items()}
    print(f"\n{n / 1e6:g} million scores, temperature {temperature:g}, {torch.get_num_threads()} threads")
    print(f"{'':22}{'median ms':>10}{'least ms':>10}{'/ torch.sort':>14}{'extra memory':>14}")
    for name, value in median.items():
        relative = value / median["torch.sort"]
        print(f"{name:22}{value * 1e3:10.1f}{min(times[name]) * 1e3:10.1f}{relative:14.2f}{memory[name]:13.2f}x")
    return median


if __name__ == "__main__":
    sizes = [int(float(a) * 1e6) for a in sys.argv[1:]] or [200_000, 2_000_000, 20_000_000]
    found = {(n, t): compare(n, t) for n in sizes for t in TEMPERATURES}
    shown = found.get(RATIO_AT) or list(found.values())[-1]
    print(f"\nratio: {shown['microglia, cold'] / shown['torch.sort']:.3f}")
