"""The choice, by timing, of thresholded layers that run in the compiled kernel: where it is faster than a dense product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized

from microglia.core.layers import prunable_layers
from microglia.core.progress import progress_bar
from microglia.core.timing import time_interleaved
from microglia.dynamic.activation_layers import ThresholdedLinear, thresholded_layers
from microglia.runtime.operators import level
from microglia.runtime.sparse_layers.thresholded import ROWS, TYPES, thresholded

COUNTS = tuple(rows for rows in (1, 2, 4) if rows <= ROWS)
"""Numbers of rows that are timed: tokens of a batch in one step of generation."""


@dataclass(frozen=True)
class TunedLayers:
    """The times of thresholded layers of one shape and sparsity.

    Attributes:
        layers: Their names.
        shape: Shape of the weight, (outputs, inputs).
        sparsity: The sparsity, to two digits.
        dense: Number of rows -> milliseconds of the layer before it had a threshold.
        thresholded: Number of rows -> milliseconds of the threshold and a dense product.
        kernel: Number of rows -> milliseconds of the compiled kernel.
        rows: Maximum number of rows for which the kernel now runs; 0 where the threshold and a dense product are faster.
    """

    layers: tuple[str, ...]
    shape: tuple[int, ...]
    sparsity: float
    dense: dict[int, float]
    thresholded: dict[int, float]
    kernel: dict[int, float]
    rows: int


@torch.no_grad()
def tune_activations(model: nn.Module, *, rounds: int = 7, seed: int = 0) -> list[TunedLayers]:
    """Lets each thresholded layer run in the compiled kernel where that is faster on this machine, in place.

    The kernel reads only the part of the weight that the input needs, for up to four tokens on the CPU. The weight of such a
    layer then lies input by input; there is no second copy. Elsewhere, for more tokens and with gradients, the same function is
    a threshold and a dense product. Nothing of the choice is stored in files.

    Args:
        model: A model of `microglia.sparse_activations`, in float32 or bfloat16.
        rounds: Rounds of every timing.
        seed: Seeds the inputs that are timed.

    Returns:
        The times, one entry for each shape and sparsity; empty without compiled kernels or without layers that can use them.
    """
    if level() == "torch":
        return []
    # A weight that others hold too lies as they read it; a parametrized one is made anew in every call.
    left = {n for n, layer in prunable_layers(model).items() if len(layer.holders) > 1 or is_parametrized(layer.module)}
    alike: dict[tuple[Any, ...], dict[str, ThresholdedLinear]] = {}
    for name, layer in thresholded_layers(model).items():
        layer.rows = 0
        if name not in left and layer.weight.device.type == "cpu" and layer.weight.dtype in TYPES:
            key = tuple(layer.weight.shape), layer.weight.dtype, layer.bias is None, round(layer.sparsity, 2)
            alike.setdefault(key, {})[name] = layer
    found, generator = [], torch.Generator().manual_seed(seed)
    with progress_bar("activations: layers", len(alike)) as bar:
        for layers in alike.values():
            found.append(_tuned(layers, generator, rounds))
            bar.advance()
    return found


def _tuned(layers: dict[str, ThresholdedLinear], generator: torch.Generator, rounds: int) -> TunedLayers:
    """Times layers alike, and lets all of them run the faster way."""
    first, rows = next(iter(layers.values())), 0
    times: dict[str, dict[int, float]] = {"dense": {}, "thresholded": {}, "kernel": {}}
    plain, turned = first.weight.detach().contiguous(), first.weight.detach().t().contiguous()
    for count in COUNTS:
        x = _inputs(first, count, generator)
        ways: dict[str, Callable[[], object]] = {
            "dense": partial(functional.linear, x, plain, first.bias),
            "thresholded": partial(_product, x, plain, first.bias, first.threshold),
            "kernel": partial(torch.ops.microglia.thresholded_linear, x, turned, first.bias, first.threshold),
        }
        found = time_interleaved(ways, rounds=rounds, warmup=2, min_round_seconds=0.002)
        for name, timing in found.items():
            times[name][count] = timing.median
        if times["kernel"][count] >= times["thresholded"][count]:
            break
        rows = count
    for layer in layers.values():
        layer.rows = rows
        weight = layer.weight.detach()
        layer.weight.data = weight.t().contiguous().t() if rows else weight.contiguous()
    shape, sparsity = tuple(first.weight.shape), round(first.sparsity, 2)
    return TunedLayers(tuple(layers), shape, sparsity, **times, rows=rows)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    """Returns what a thresholded layer computes without the kernel."""
    return functional.linear(thresholded(x, threshold), weight, bias)


def _inputs(layer: ThresholdedLinear, rows: int, generator: torch.Generator) -> Tensor:
    """Returns inputs of which the layer's sparsity counts as zero, in places drawn anew for each row."""
    x = torch.randn(rows, layer.in_features, generator=generator)
    x = x.sign() * (x.abs() + 2 * layer.threshold.float() + 1e-3)
    small = torch.rand(x.shape, generator=generator).argsort(-1) < layer.sparsity * layer.in_features
    return x.masked_fill(small, 0).to(layer.weight)
