"""The way to run one fused layer in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from microglia.runtime.candidates import Candidate, Then, takes_blocks
from microglia.runtime.dense.fusion import Activation, Site
from microglia.runtime.int8.layers import Int8Layer, Scale, fuses

WAY = "int8 blocks"
"""Name of the way, in reports and in the cache of times."""
TOLERANCE = 0.1
"""Tolerated difference of one layer's outputs for random inputs, relative to the largest."""


class Planned(nn.Module):
    """The place of a layer that will run in 8 bits: its scales are known when the whole graph is."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site


@dataclass(frozen=True)
class Int8Candidate(Candidate):
    """A layer in 8 bits. It is timed from uint8 to uint8, as between two such layers; conversions show in the whole model.

    Attributes:
        site: The layer.
    """

    site: Site | None = None

    def trial(self, given: Sequence[Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Returns a call to time, and its output in float32, on scales of the tensors at hand."""
        assert self.site is not None
        first, *rest = (_scale(t) for t in given)
        x, *others = (scale.quantize(t) for scale, t in zip((first, *rest), given, strict=True))
        wide = int8_layer(self.site, first)(x, *given[1:])
        if not fuses(self.site):
            layer = int8_layer(self.site, first)
            return (lambda: layer(x, *given[1:])), wide
        target = _scale(wide)
        narrow = int8_layer(self.site, first, target, *rest)
        return (lambda: narrow(x, *others)), target.dequantize(narrow(x, *others))


def _scale(x: Tensor) -> Scale:
    low, high = x.aminmax()
    return Scale.of(float(low), float(high))


def int8_layer(site: Site, source: Scale, target: Scale | None = None, other: Scale | None = None) -> nn.Module:
    """Returns a layer in 8 bits (see `Int8Layer`); an activation that it does not fuse follows it, in float32."""
    if fuses(site):
        return Int8Layer(site, source, target, other)
    return Then(Int8Layer(replace(site, activation=Activation()), source), site.activation)


def int8_candidates(site: Site) -> Iterator[Candidate]:
    """Returns the way to run a layer in 8 bits, where there are kernels for it."""
    if takes_blocks(site) and site.weight.dtype == torch.float32:
        yield Int8Candidate(WAY, lambda: Planned(site), TOLERANCE, site)
