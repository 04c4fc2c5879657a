"""Densities of the layers of a sequence of blocks, from one dense pass: OWL (Yin et al. 2024), and one budget for all layers.

A rule sees the values abs(W) * rms(input) of every layer and says how many weights each keeps; the total is that of the budget.
A new rule registers itself in `densities`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from microglia.core.allocation import apportion
from microglia.core.errors import BudgetError
from microglia.core.registry import Registry
from microglia.core.selection import keep_best

OUTLIER = 5.0
"""OWL's M: a value this many times the mean of its block is an outlier."""
SPREAD = 0.08
"""OWL's lambda: the densities of blocks differ by at most twice this."""
LEAST = 0.1
"""Smallest share of the density that a layer keeps where one budget decides."""

Rule = Callable[[Sequence[Mapping[str, Tensor]], int], dict[str, int]]
"""(by block the values of each layer, weights to keep in all) -> weights that each layer keeps."""

densities: Registry[Rule] = Registry("rule of densities")
UNIFORM = "uniform"


@densities.add(UNIFORM)
def uniform(blocks: Sequence[Mapping[str, Tensor]], keep: int) -> dict[str, int]:
    """Every layer keeps the same density."""
    sizes = _sizes(blocks)
    return _shared(sizes, {name: float(size) for name, size in sizes.items()}, keep)


@densities.add("owl")
def owl(blocks: Sequence[Mapping[str, Tensor]], keep: int) -> dict[str, int]:
    """OWL: blocks with more outliers keep more, rho_b = rho + D_b - mean D, D scaled to [0, 2 lambda].

    The mean is weighted by the weights of the blocks, so that the budget is met.

    Raises:
        BudgetError: A block's density would leave (0, 1].
    """
    sizes = _sizes(blocks)
    held = torch.tensor([sum(v.numel() for v in block.values()) for block in blocks], dtype=torch.float64)
    shares = torch.tensor([_outliers(block) for block in blocks], dtype=torch.float64)
    span = shares.max() - shares.min()
    scaled = (shares - shares.min()) / span * 2 * SPREAD if span > 0 else torch.zeros_like(shares)
    density = keep / float(held.sum())
    wanted = density + scaled - (scaled * held).sum() / held.sum()
    if not bool(((wanted > 0) & (wanted <= 1)).all()):
        raise BudgetError(
            f"OWL spreads densities by up to {2 * SPREAD:g} around {density:.3g}, and a block's would be "
            f"{float(wanted.min()):.3g} to {float(wanted.max()):.3g}: take densities=uniform at this budget."
        )
    quotas = {n: float(rho) * sizes[n] for block, rho in zip(blocks, wanted, strict=True) for n in block}
    return _shared(sizes, quotas, keep)


@densities.add("budget")
def budget(blocks: Sequence[Mapping[str, Tensor]], keep: int) -> dict[str, int]:
    """One budget for all: the weights whose removal costs least of their own layer's output energy go, over all layers.

    A weight's cost is w^2 E[x^2] over the sum of these of its layer; a layer keeps at least `LEAST` of the density.
    """
    sizes = _sizes(blocks)
    costs = {n: v.double().square() / v.double().square().sum().clamp_min(1e-300) for block in blocks for n, v in block.items()}
    chosen = keep_best(costs, keep)
    least = {name: max(1, round(LEAST * keep / sum(sizes.values()) * size)) for name, size in sizes.items()}
    return _shared(sizes, {name: float(max(1, int(mask.sum()))) for name, mask in chosen.items()}, keep, least)


def _outliers(block: Mapping[str, Tensor]) -> float:
    """Returns the share of a block's values above `OUTLIER` times their mean."""
    total = sum(float(values.double().sum()) for values in block.values())
    count = sum(values.numel() for values in block.values())
    if not count:
        return 0.0
    return sum(int((values > OUTLIER * total / count).sum()) for values in block.values()) / count


def _sizes(blocks: Sequence[Mapping[str, Tensor]]) -> dict[str, int]:
    return {name: values.numel() for block in blocks for name, values in block.items()}


def _shared(
    sizes: Mapping[str, int], quotas: Mapping[str, float], keep: int, least: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Returns whole counts as near as possible to quotas, ``keep`` in all."""
    low = [1 if least is None else least[name] for name in sizes]
    counts = apportion([quotas[name] for name in sizes], keep, low, list(sizes.values()))
    return dict(zip(sizes, counts, strict=True))
