"""The layers, masks and ways to run them of `gpu_blocks.py`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

import bare  # noqa: F401
from microglia.runtime.dense.fusion import Site
from microglia.runtime.gpu.semi_structured import SemiStructuredLinear
from microglia.runtime.sparse_layers.layers import BlockConv2d, BlockLinear

CONVOLUTIONS = (  # inputs, outputs, kernel, side
    (64, 64, 3, 56), (128, 128, 3, 28), (256, 256, 3, 14), (512, 512, 3, 7),
    (64, 256, 1, 56), (256, 64, 1, 56), (512, 128, 1, 28), (128, 512, 1, 28),
    (1024, 256, 1, 14), (256, 1024, 1, 14), (2048, 512, 1, 7), (512, 2048, 1, 7),
)  # fmt: skip
LINEARS = (  # name, inputs, outputs, tokens
    ("ViT-B", 768, 2304, 64 * 197), ("ViT-B", 768, 3072, 64 * 197), ("ViT-B", 3072, 768, 64 * 197),
    ("Llama", 4096, 4096, 4096), ("Llama", 4096, 14336, 4096), ("Llama", 14336, 4096, 4096),
)  # fmt: skip
FORMS = ((16, 1), (32, 1), (64, 1), (64, 64))
DENSITIES = (1.0, 0.5, 0.25, 0.1)
WRONG = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Norm of the error over that of the float32 result."""
DEVICE = "cuda"
Call = Callable[[], Tensor]


def pruned(weight: Tensor, tall: int, wide: int, density: float) -> Tensor:
    """Returns the weight with a random mask of blocks that keeps exactly the count, one at least."""
    rows, columns = -(-weight.shape[0] // tall), -(-weight.shape[1] // wide)
    count = rows * columns * math.prod(weight.shape[2:])
    kept = weight.new_zeros(count)
    kept[torch.randperm(count, device=weight.device)[: max(1, round(density * count))]] = 1
    kept = kept.reshape(rows, columns, *weight.shape[2:]).repeat_interleave(tall, 0).repeat_interleave(wide, 1)
    return weight * kept[: weight.shape[0], : weight.shape[1]]


def two_of_four(weight: Tensor) -> Tensor:
    """Returns the weight with the two smallest of each four neighbouring inputs set to zero."""
    groups = weight.reshape(-1, 4)
    return groups.scatter(1, groups.abs().argsort(1)[:, :2], 0).reshape(weight.shape)


def site_of(weight: Tensor, x: Tensor) -> Site:
    if weight.ndim == 2:
        return Site("layer", "linear", weight, None, tuple(x.shape), (x.shape[0], weight.shape[0]))
    shape, padding = (x.shape[0], weight.shape[0], *x.shape[2:]), (weight.shape[2] // 2,) * 2
    return Site("layer", "conv2d", weight, None, tuple(x.shape), shape, padding=padding)


def dense(weight: Tensor, x: Tensor) -> dict[str, Call]:
    """Returns the dense ways to run a layer."""
    if weight.ndim == 2:
        return {"cuBLAS": lambda: functional.linear(x, weight)}
    last, padding = weight.contiguous(memory_format=torch.channels_last), weight.shape[2] // 2
    ways: dict[str, Call] = {"cuDNN": lambda: functional.conv2d(x, last, padding=padding)}
    if weight.shape[2] == 1:
        rows, matrix = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]), weight[:, :, 0, 0]
        ways["cuBLAS"] = lambda: functional.linear(rows, matrix)
    return ways


def error_of(out: Tensor, weight: Tensor, x: Tensor) -> float:
    """Returns the norm of the error over that of the result in float32."""
    wide, x = weight.float(), x.float()
    wanted = functional.linear(x, wide) if weight.ndim == 2 else functional.conv2d(x, wide, padding=weight.shape[2] // 2)
    return float((out.float() - wanted).norm() / wanted.norm())


def sparse_ways(weight: Tensor, x: Tensor) -> Iterator[tuple[str, Tensor, Callable[[], nn.Module]]]:
    """Yields the name of each case, its masked weight, and what makes its module."""
    kind = BlockLinear if weight.ndim == 2 else BlockConv2d
    for (tall, wide), density in itertools.product(FORMS, DENSITIES):
        own = pruned(weight, tall, wide, density)
        yield f"{tall}x{wide} {density:g}", own, lambda own=own, t=tall, w=wide: kind.of(site_of(own, x), w, t)
    if weight.ndim == 2:
        own = two_of_four(weight)
        yield "2:4", own, lambda: SemiStructuredLinear(site_of(own, x))


def problems(kind: str, batch: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields name, weight and input of each layer of a table."""
    made = {"device": DEVICE, "dtype": dtype}
    if kind == "linear":
        for name, inputs, outputs, tokens in LINEARS:
            weight = torch.randn(outputs, inputs, **made) / math.sqrt(inputs)
            yield f"{name} {inputs}>{outputs}, {tokens} tokens", weight, torch.randn(tokens, inputs, **made)
        return
    for inputs, outputs, kernel, side in CONVOLUTIONS:
        weight = torch.randn(outputs, inputs, kernel, kernel, **made) / math.sqrt(inputs * kernel**2)
        x = torch.randn(batch, inputs, side, side, **made).contiguous(memory_format=torch.channels_last)
        yield f"{kernel}x{kernel} {inputs}>{outputs} @{side}", weight, x


class Stage(nn.Module):
    """A stem, residual blocks and a head: what `accelerate` is given."""

    def __init__(self, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.head = nn.Linear(width, 1024)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, 1024)."""
        x = torch.relu(self.stem(x))
        for layer in self.layers:
            x = torch.relu(layer(x) + x)
        return self.head(x.mean((2, 3)))
