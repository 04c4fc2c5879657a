"""Wanda and SparseGPT on one layer: seconds and peak memory, beside a plain implementation of the published algorithm.

Usage: ``python benchmarks/layerwise.py [--sizes 4096x4096,4096x11008] [--tokens 8192] [--rounds 3]``. Both sides are timed
interleaved in one process; the peak memory of each is that of a process of its own. The plain side makes the same library
calls as the published code: X^T X whole, two Cholesky factors and an inverse between them, one column after another in blocks
of 128. The masks of both are compared. The last line is ``ratio: <plain / ours, SparseGPT>``, the least of all sizes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from microglia.core.layers import prunable_layers
from microglia.core.patterns import NM, Pattern, Unstructured
from microglia.methods.layerwise_rules import Wish, rules
from microglia.scores.second_moments import Moments

DENSITY, BLOCK = 0.5, 128
BATCH = 2048
"""Tokens of one calibration batch."""
LLAMA_7B = {(4096, 4096): 4 * 32, (11008, 4096): 2 * 32, (4096, 11008): 32}
"""(outputs, inputs) of the layers of a Llama of 7 billion weights -> how many there are."""


def plain_sparsegpt(weight: Tensor, batches: list[Tensor], pattern: Pattern, density: float = DENSITY) -> tuple[Tensor, Tensor]:
    """Returns (weight, mask) by the published algorithm, one column after another.

    The counts are exact, as ours: the published threshold removes one weight too many in each block.

    Args:
        weight: (outputs, inputs).
        batches: Calibration rows, (tokens, inputs) each.
        pattern: Unstructured, or N:M.
        density: Fraction to keep, for the unstructured pattern.
    """
    work, (out, columns) = weight.clone(), weight.shape
    hessian = torch.zeros(columns, columns, dtype=weight.dtype)
    for rows in batches:
        hessian += rows.T @ rows
    hessian *= 2 / sum(map(len, batches))
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    mask, kept = torch.ones_like(weight, dtype=torch.bool), 0
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, factor = work[:, start:stop].clone(), upper[start:stop, start:stop]
        chosen, errors = torch.ones_like(block, dtype=torch.bool), torch.zeros_like(block)
        if not isinstance(pattern, NM):
            cost = (block / factor.diagonal()).square().flatten()
            count = (2 * round(density * out * columns) * stop + columns) // (2 * columns) - kept
            chosen = torch.zeros(len(cost), dtype=torch.bool).scatter_(0, cost.topk(count).indices, True).view_as(block)
            kept += count
        for j in range(stop - start):
            if isinstance(pattern, NM) and j % pattern.m == 0:
                run = (block[:, j : j + pattern.m] / factor.diagonal()[j : j + pattern.m]).square()
                chosen[:, j : j + pattern.m] = torch.zeros_like(run, dtype=torch.bool).scatter_(
                    1, run.topk(pattern.n, dim=1).indices, True
                )
            errors[:, j] = torch.where(chosen[:, j], 0.0, block[:, j]) / factor[j, j]
            block[:, j:] -= errors[:, j, None] * factor[j, None, j:]
        work[:, start:stop], mask[:, start:stop] = block * chosen, chosen
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return work, mask


def plain_wanda(weight: Tensor, batches: list[Tensor], pattern: Pattern, density: float = DENSITY) -> tuple[Tensor, Tensor]:
    """Returns (weight, mask) of Wanda by one sort of each row."""
    squares = torch.zeros(weight.shape[1], dtype=weight.dtype)
    for rows in batches:
        squares += rows.square().sum(0)
    values = weight.abs() * squares.sqrt()
    runs = values.view(-1, pattern.m) if isinstance(pattern, NM) else values
    keep = pattern.n if isinstance(pattern, NM) else round(density * values.shape[1])
    order = runs.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    mask = torch.zeros_like(runs, dtype=torch.bool).scatter_(1, order, True).view_as(weight)
    return weight * mask, mask


def ours(rule: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns a rule of the library as a function like `plain_sparsegpt`."""

    def pruned(weight: Tensor, batches: list[Tensor], pattern: Pattern, density: float = DENSITY) -> tuple[Tensor, Tensor]:
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        module.weight = nn.Parameter(weight, requires_grad=False)
        (layer,) = prunable_layers(module).values()
        moments = Moments(layer, whole=rules[rule].needs == "whole")
        for rows in batches:
            moments.add(module, rows)
        wish = Wish(pattern, round(density * weight.numel()), mask_block=BLOCK)
        found = rules[rule].prune(weight, rules[rule].prepare(moments.mean(), wish), wish)
        return found.weight, found.mask

    return pruned


SIDES = {
    "wanda": {"plain": plain_wanda, "ours": ours("wanda")},
    "sparsegpt": {"plain": plain_sparsegpt, "ours": ours("sparsegpt")},
}


def inputs_of(out: int, columns: int, tokens: int) -> tuple[Tensor, list[Tensor]]:
    """Returns a weight and correlated calibration rows; a few inputs are large, as in language models."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, columns, generator=generator) * columns**-0.5
    scale = 1 + 20 * (torch.rand(columns, generator=generator) > 0.999)
    mixing = torch.randn(256, columns, generator=generator) * 256**-0.5
    sizes = [min(BATCH, tokens - at) for at in range(0, tokens, BATCH)]
    rows = [torch.randn(n, 256, generator=generator) @ mixing + torch.randn(n, columns, generator=generator) for n in sizes]
    return weight, [part * scale for part in rows]


def peak(rule: str, side: str, size: str, tokens: int) -> float:
    """Returns the peak memory of one side in a process of its own, in MB over that of its inputs."""
    command = [sys.executable, __file__, "--case", f"{rule}/{side}", "--sizes", size, "--tokens", str(tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _case(name: str, out: int, columns: int, tokens: int) -> None:
    rule, side = name.split("/")
    given = inputs_of(out, columns, tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of making the inputs
    before = _kilobytes("VmRSS")
    SIDES[rule][side](*given, Unstructured())
    print((_kilobytes("VmHWM") - before) / 1024)


def _kilobytes(name: str) -> int:
    """Returns an entry of this process's status, such as the peak of its memory (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def compared(out: int, columns: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Prints seconds, memory and agreement of masks for one layer; returns the median seconds by rule and side."""
    weight, batches = inputs_of(out, columns, tokens)
    found: dict[str, dict[str, float]] = {}
    for rule, sides in SIDES.items():
        times: dict[str, list[float]] = {side: [] for side in sides}
        masks = {}
        for _ in range(rounds):
            for side, function in sides.items():
                began = time.perf_counter()
                masks[side] = function(weight, batches, Unstructured())[1]
                times[side].append(time.perf_counter() - began)
        found[rule] = {side: median(values) for side, values in times.items()}
        different = float((masks["plain"] != masks["ours"]).float().mean())
        for side in sides:
            memory = peak(rule, side, f"{out}x{columns}", tokens)
            print(
                f"| {out} x {columns} | {rule} | {side} | {found[rule][side]:.2f} | {memory:,.0f} | {different:.1e} |",
                flush=True,
            )
    return found


def main() -> None:
    """Prints the table, an estimate for a model of 7 billion weights, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="4096x4096,4096x11008")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case")
    given = parser.parse_args()
    sizes = [(int(out), int(columns)) for out, columns in (size.split("x") for size in given.sizes.split(","))]
    torch.set_grad_enabled(False)
    if given.case:
        _case(given.case, *sizes[0], given.tokens)
        return
    print(f"{torch.get_num_threads()} threads, {given.tokens:,} tokens, density {DENSITY:g}, float32")
    print("| outputs x inputs | rule | side | seconds | peak MB over its inputs | share of the mask that differs |")
    print("| --- | --- | --- | --- | --- | --- |")
    found = {size: compared(*size, given.tokens, given.rounds) for size in sizes}
    for rule in SIDES:
        total = 0.0
        for (out, columns), count in LLAMA_7B.items():
            near = min(found, key=lambda size: abs(size[1] - columns))
            total += count * found[near][rule]["ours"] * out / near[0]
        print(f"All layers of a Llama of 7 B weights, moments anew for each, {rule}: about {total / 3600:.2f} hours.")
    print(f"ratio: {min(times['sparsegpt']['plain'] / times['sparsegpt']['ours'] for times in found.values()):.2f}")


if __name__ == "__main__":
    main()
