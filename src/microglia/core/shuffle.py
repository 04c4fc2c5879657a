"""Shuffled masks: the same counts in every layer, at other positions. Only the densities survive."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from microglia.core.masks import MaskSet
from microglia.core.patterns import Pattern


def shuffled(masks: Mapping[str, Tensor], pattern: Pattern, seed: int) -> MaskSet:
    """Returns masks whose units are permuted uniformly within each layer (Frankle et al. 2021, "missing the mark").

    Units are only exchanged with units of their own size, so that the counts stay exact where a pattern has smaller edge units.
    A pattern with its own density (N:M) permutes within its rows. Each layer has its own generator, by its place among the
    sorted names, so that a layer's shuffle does not depend on the others.

    Args:
        masks: Masks by layer, whole units of the pattern.
        pattern: Pattern of the masks.
        seed: Root of the permutations.
    """
    result = {}
    for number, name in enumerate(sorted(masks)):
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        mask = masks[name]
        units = pattern.reduce(mask.float(), "max").cpu() > 0
        sizes = pattern.sizes(mask.shape).cpu()
        moved = (_within_rows if pattern.fixed_density is not None else _by_size)(units, sizes, generator)
        result[name] = pattern.expand(moved.to(mask.device), mask.shape)
    return MaskSet({name: result[name] for name in masks})


def _by_size(units: Tensor, sizes: Tensor, generator: torch.Generator) -> Tensor:
    flat, sizes = units.flatten(), sizes.flatten()
    moved = flat.clone()
    for size in sorted(set(sizes.tolist())):
        places = (sizes == size).nonzero().squeeze(1)
        moved[places] = flat[places[torch.randperm(len(places), generator=generator)]]
    return moved.view(units.shape)


def _within_rows(units: Tensor, sizes: Tensor, generator: torch.Generator) -> Tensor:
    places = torch.rand(units.shape, generator=generator).masked_fill_(sizes == 0, 2.0)  # padding, at the end, stays there
    return units.gather(1, places.argsort(1))
