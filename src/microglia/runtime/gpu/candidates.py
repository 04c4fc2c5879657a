"""The ways to run one fused layer on a GPU, all with the same outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from microglia.runtime.candidates import SPARSEST, WASTE, Candidate, Compact, Plain, kept, then, without_activation
from microglia.runtime.dense.fusion import Site
from microglia.runtime.gpu.semi_structured import SemiStructuredLinear, why_not
from microglia.runtime.operators import has_triton
from microglia.runtime.sparse_layers.layers import BlockConv2d, BlockLinear
from microglia.runtime.sparse_layers.layout import STRIPE, STRIPES, TAPS, WIDTHS, one_group, to_blocks

MOST_STORED = 0.9
"""Of a dense weight: where blocks store more, they are not worth trying."""


def cuda_candidates(site: Site, notes: list[str]) -> Iterator[Candidate]:
    """Returns the ways worth timing for a layer, PyTorch's own first: what the others are compared with.

    Dense is cuDNN and cuBLAS, a convolution's weight in channels last; blocks are the Triton kernels, as many outputs high
    and then as many inputs wide as the mask allows; 2:4 is cuSPARSELt's. It asks nothing of the layer's device, so that all
    but 2:4 can be tried on the CPU, in Triton's interpreter.

    Args:
        site: The layer.
        notes: A list to which is added why a sparse linear layer is not tried as 2:4.
    """
    yield Candidate("dense, eager", lambda: Plain(site))
    if site.kind == "conv2d":
        last = replace(site, weight=site.weight.contiguous(memory_format=torch.channels_last))
        yield Candidate("dense", lambda: Plain(last))
    if kept(site) is not None:
        yield Candidate("compact", lambda: Compact(site, Plain))
    if site.kind == "linear" and int(site.weight.count_nonzero()) <= SPARSEST * site.weight.numel():
        reason = why_not(site)
        if reason is None:
            yield Candidate("2:4", lambda: SemiStructuredLinear(site))
        else:
            notes.append(f"{site.name} as '2:4' was left out: {reason}")
    if not has_triton() or math.prod(site.weight.shape[2:]) > TAPS or site.weight.shape[0] < STRIPE * site.groups > STRIPE:
        return
    bare, after = without_activation(site)
    block = BlockLinear if site.kind == "linear" else BlockConv2d
    for stripe, width in block_forms(one_group(site.weight, site.groups)):
        yield Candidate(f"block {stripe}x{width}", partial(_made, block, bare, width, stripe, after))


def block_forms(weight: Tensor) -> list[tuple[int, int]]:
    """Returns the outputs and inputs of blocks worth trying for a weight of one group: none where it is nearly dense.

    A block of more outputs reads the image less often, one of more inputs reads it in whole lines; either may store
    `WASTE` times what the finest blocks store.
    """
    finest = to_blocks(weight, 1, STRIPE, paired=False).stored
    if finest == 0 or finest > MOST_STORED * weight.numel():
        return []

    def fits(width: int, stripe: int) -> bool:
        return to_blocks(weight, width, stripe, paired=False).stored <= WASTE * finest

    stripe = next(s for s in reversed(STRIPES) if s == STRIPE or fits(1, s))
    wide = next((w for w in reversed(WIDTHS) if w > 1 and fits(w, stripe)), None)
    return [(stripe, 1)] if wide is None else [(stripe, wide), (stripe, 1)]


def _made(block: type[BlockLinear | BlockConv2d], site: Site, width: int, stripe: int, after: object) -> nn.Module:
    return then(block.of(site, width, stripe, paired=False), after)  # type: ignore[arg-type]
