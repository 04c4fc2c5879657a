"""Claim: exact global selection is at least as fast as any exact alternative and needs at most twice the scores' memory.

Scores of 50 layers of unequal size go in, one boolean mask per layer comes out; ties are broken by position, except by topk,
which promises no order. Time: medians of rounds interleaved in one process. Memory: the highest resident size during one
call above that before it, as a multiple of the scores' own (Linux). Run with the millions of scores, or without for both sizes.
"""

from __future__ import annotations

import gc
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from microglia.core.selection import keep_best

LAYERS, DENSITY = 50, 0.2
Scores = dict[str, Tensor]


def make_scores(total: int) -> Scores:
    generator = torch.Generator().manual_seed(0)
    shares = torch.linspace(1, 15, LAYERS, dtype=torch.float64).square()
    sizes = (shares / shares.sum() * total).long()
    sizes[-1] += total - sizes.sum()
    return {f"layer{i}": torch.randn(n, generator=generator).abs_() for i, n in enumerate(sizes.tolist())}


def split_like(scores: Scores, mask: Tensor) -> Scores:
    return dict(zip(scores, torch.split(mask, [s.numel() for s in scores.values()]), strict=True))


def torch_topk(scores: Scores, keep: int) -> Scores:
    flat = torch.cat(list(scores.values()))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.topk(keep, sorted=False).indices] = True
    return split_like(scores, mask)


def torch_sort(scores: Scores, keep: int) -> Scores:
    order = torch.cat(list(scores.values())).sort(descending=True, stable=True).indices
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[:keep]] = True
    return split_like(scores, mask)


def by_threshold(scores: Scores, keep: int, value: np.float32) -> Scores:
    masks = {name: s.numpy() >= value for name, s in scores.items()}
    surplus = sum(int(np.count_nonzero(m)) for m in masks.values()) - keep
    for name in reversed(masks):  # ties: the last go
        if surplus:
            ties = np.flatnonzero(scores[name].numpy() == value)[-surplus:]
            masks[name][ties] = False
            surplus -= len(ties)
    return {name: torch.from_numpy(m) for name, m in masks.items()}


def numpy_partition(scores: Scores, keep: int) -> Scores:
    flat = np.concatenate([s.numpy() for s in scores.values()])
    flat.partition(len(flat) - keep)
    return by_threshold(scores, keep, flat[len(flat) - keep])


def numpy_sort(scores: Scores, keep: int) -> Scores:
    flat = np.concatenate([s.numpy() for s in scores.values()])
    flat.sort()
    return by_threshold(scores, keep, flat[len(flat) - keep])


Method = Callable[[Scores, int], Scores]
METHODS: dict[str, Method] = {
    "microglia keep_best": keep_best,
    "numpy.partition": numpy_partition,
    "numpy.sort": numpy_sort,
    "torch.topk": torch_topk,
    "torch.sort": torch_sort,
}


def resident(field: str) -> int:
    return int(re.findall(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


def peak_memory(method: Method, scores: Scores, keep: int) -> float:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    method(scores, keep)
    return (resident("VmHWM") - before) / sum(4 * s.numel() for s in scores.values())


def check(name: str, masks: Scores, expected: Scores, keep: int) -> None:
    if name == "torch.topk":
        assert sum(int(m.sum()) for m in masks.values()) == keep
    else:
        assert all(torch.equal(masks[n], expected[n]) for n in expected), name


def compare(total: int) -> float:
    scores, keep = make_scores(total), int(DENSITY * total)
    expected = keep_best(scores, keep)
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    memory = {name: peak_memory(method, scores, keep) for name, method in METHODS.items()}
    limit = 2 * total / 1e7  # seconds for each method
    while active := [name for name, t in times.items() if not t or (len(t) < 15 and sum(t) + t[-1] < limit)]:
        for name in active:
            start = time.perf_counter()
            masks = METHODS[name](scores, keep)
            times[name].append(time.perf_counter() - start)
            check(name, masks, expected, keep)
    median = {name: statistics.median(t) for name, t in times.items()}
    ours, *others = median.values()
    print(f"\n{total / 1e6:.0f} million scores, {len(scores)} layers, density {DENSITY}, {torch.get_num_threads()} threads")
    print(f"{'method':22}{'median ms':>10}{'least ms':>10}{'rounds':>8}{'time / ours':>13}{'extra memory':>14}")
    for name, value in median.items():
        taken = times[name]
        print(f"{name:22}{value * 1e3:10.1f}{min(taken) * 1e3:10.1f}{len(taken):8}{value / ours:13.2f}{memory[name]:13.2f}x")
    return ours / min(others)


if __name__ == "__main__":
    sizes = [int(float(a) * 1e6) for a in sys.argv[1:]] or [100_000_000, 25_000_000]
    ratios = [compare(size) for size in sizes]
    print(f"\nratio: {ratios[-1]:.3f}")
