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
"""Fraction of a dense weight; blocks that store more are not tried."""


def cuda_candidates(site: Site, notes: list[str]) -> Iterator[Candidate]:
    """Returns the ways to time for a layer; the first is PyTorch's own, the reference for the others.

    Dense is cuDNN and cuBLAS, with a convolution's weight in channels last. Blocks are the Triton kernels, with as many outputs
    and then as many inputs as the mask allows. 2:4 is cuSPARSELt's. The layer may be on any device, so that all ways but 2:4
    can be tried on the CPU in Triton's interpreter.

    Args:
        site: The layer.
        notes: A list to which the reason is added if a sparse linear layer is not tried as 2:4.
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
    """Returns the block sizes (outputs, inputs) to try for a weight of one group; none if it is nearly dense.

    A block with more outputs reads the image less often. A block with more inputs reads whole cache lines. Both may store up to
    `WASTE` times the weights of the finest blocks.
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
