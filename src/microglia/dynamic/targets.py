"""Targets of the gates: the filters of a layer that carry the mass of its response to one input.

Source: FTWT (Elkerdawy et al. 2022), "Fire Together Wire Together"; spec, section 7.3. No function here has a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from microglia.core.errors import BudgetError
from microglia.core.registry import unknown_name

Rule = Literal["prefix_le", "cover_ge", "uniform"]
RULES = ("prefix_le", "cover_ge", "uniform")
TOLERANCE = 1e-5
"""Tolerance of a prefix's mass above r, and mass below which a filter is inactive (both from the released code)."""


@torch.no_grad()
def mass(response: Tensor) -> Tensor:
    """Returns each filter's share of a layer's response, (batch, channels), float32; rows sum to 1, or to 0 in a dead layer.

    The response of a filter to an input is the largest absolute value in its feature map.

    Args:
        response: Feature maps before the mask, (batch, channels, *space), in float32 or wider for exact sums.
    """
    return share_of(peaks(response))


@torch.no_grad()
def peaks(response: Tensor) -> Tensor:
    """Returns the largest absolute value in each feature map, (batch, channels)."""
    return highest(response.abs())


def highest(maps: Tensor) -> Tensor:
    """Returns the largest value in each map, (batch, channels)."""
    if maps.ndim == 2:
        return maps
    if maps.ndim == 4 and not maps.is_contiguous():  # several times faster than amax with channels last, slower with them first
        return torch.nn.functional.max_pool2d(maps, maps.shape[2:]).flatten(1)
    return maps.amax(tuple(range(2, maps.ndim)))


@torch.no_grad()
def share_of(strongest: Tensor) -> Tensor:
    """Returns the share of each of a layer's peaks in their sum, (batch, channels), float32."""
    strongest = strongest.double()
    total = strongest.sum(1, keepdim=True)
    return torch.where(total > 0, strongest / total.clamp_min(torch.finfo(torch.float64).tiny), 0.0).float()


def filters_of(units: Tensor, outputs: int) -> Tensor:
    """Returns masks by filter, (batch, outputs), from masks by unit; a unit is one filter, or a block of neighbours."""
    block = outputs // units.shape[1]
    return units if block == 1 else units.repeat_interleave(block, dim=1)


@torch.no_grad()
def targets(share: Tensor, r: float, rule: Rule = "prefix_le", *, least: int = 1) -> Tensor:
    """Returns the filters to keep for each input, boolean, shaped like ``share``.

    - ``prefix_le``: the largest set of leading active filters whose mass does not exceed ``r``; with r = 1 all active ones. It
      is the rule of the published numbers, and keeps one filter fewer than ``cover_ge``.
    - ``cover_ge``: the smallest set of leading filters that has at least the mass ``r``.
    - ``uniform``: the ``ceil(r C)`` strongest active filters; the released code takes the removed fraction instead.

    Ties go to the lower index. Except with ``cover_ge``, a share of 1e-5 or less counts as no response.

    Args:
        share: Share of every filter, as `mass` returns it, (batch, channels).
        r: Fraction of the mass (of the filters with ``uniform``) to keep, in (0, 1].
        rule: One of the three.
        least: Minimum number of kept filters, also in a dead layer.

    Raises:
        BudgetError: r is not in (0, 1].
        UnknownNameError: The rule is unknown.
    """
    if not 0 < r <= 1:
        raise BudgetError(f"r is the fraction to keep, in (0, 1]; got {r}.")
    ordered, order = share.double().sort(dim=1, descending=True, stable=True)
    total = ordered.cumsum(1)
    if rule == "prefix_le":
        kept = (total <= r + TOLERANCE) & (ordered > TOLERANCE)  # in the code only at r = 1: not nested in r
    elif rule == "cover_ge":
        kept = (total - ordered < r - TOLERANCE) & (ordered > 0)
    elif rule == "uniform":
        places = torch.arange(share.shape[1], device=share.device)
        kept = (places < share.shape[1] - int((1 - r) * share.shape[1] + TOLERANCE)) & (ordered > TOLERANCE)
    else:
        raise unknown_name("rule of the targets", rule, RULES)
    kept[:, :least] = True
    return torch.zeros_like(kept).scatter_(1, order, kept)
