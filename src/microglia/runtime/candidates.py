"""The ways to run one fused layer, all with the same outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.runtime.dense.fusion import Activation, Site
from microglia.runtime.dense.packing import Packed, apply_activation
from microglia.runtime.operators import ACTIVATIONS, level
from microglia.runtime.sparse_layers.codes import CodeLinear, code_bits
from microglia.runtime.sparse_layers.layers import BlockConv2d, BlockLinear, RowConv2d
from microglia.runtime.sparse_layers.layout import STRIPE, TAPS, one_group, to_blocks, to_rows

WASTE = 1.15
"""A wider block is tried if it stores at most this many times the weights that blocks of one input store."""
SPARSEST = 0.5
"""Single weights in NCHW are tried up to this density."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer.

    Attributes:
        name: ``dense, eager`` (PyTorch's own operators), ``dense`` (packed oneDNN), ``compact`` (without zero rows and columns,
            then dense), ``block 16x1`` up to ``block 16x8``, ``rows 4x1`` or ``unstructured``. Linear layers of few values also
            have ``codes 4 bits`` or ``codes 8 bits``.
        make: Makes the layer's module.
        tolerance: Tolerated difference of its outputs, relative to the largest; None for the usual one of the dtype.
    """

    name: str
    make: Callable[[], nn.Module]
    tolerance: float | None = None

    def trial(self, given: Sequence[Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Returns a call to time, and its output.

        Args:
            given: The input, and the residual if there is one.
        """
        module = self.make()
        return (lambda: module(*given)), module(*given)


def candidates(site: Site) -> Iterator[Candidate]:
    """Returns the ways to time for a layer; the first is PyTorch's own, the reference for the others."""
    yield Candidate("dense, eager", lambda: Plain(site))
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        yield Candidate("dense", lambda: Packed(site))
        if kept(site) is not None:
            yield Candidate("compact", lambda: Compact(site))
    if (bits := code_bits(site)) is not None:
        yield Candidate(f"codes {bits} bits", lambda: CodeLinear(site, bits))
    if not takes_blocks(site):
        return
    bare, after = without_activation(site)
    weight = one_group(site.weight, site.groups)
    paired = weight.dtype == torch.bfloat16  # its narrowest blocks have two inputs
    narrowest, *others = (2, 8, 4) if paired else (1, 8, 4, 2)
    narrow = to_blocks(weight, narrowest).stored
    wider = next((width for width in others if to_blocks(weight, width).stored <= WASTE * narrow), None)
    block = BlockLinear if site.kind == "linear" else BlockConv2d
    for width in (narrowest,) if wider is None else (narrowest, wider):
        yield Candidate(f"block 16x{width}", lambda width=width: then(block.of(bare, width), after))  # type: ignore[misc]
    entries = int(weight.count_nonzero())
    if paired:
        return
    if site.kind == "conv2d" and entries <= SPARSEST * site.weight.numel():
        rows = 4 if to_rows(weight, 4).stored <= WASTE * entries else 1
        yield Candidate("rows 4x1" if rows == 4 else "unstructured", lambda: then(RowConv2d.of(bare, rows), after))


def takes_blocks(site: Site) -> bool:
    """Tells whether there are kernels for a layer in blocks; blocks that span several groups would hold mostly zeros."""
    within = site.weight.shape[0] >= STRIPE * site.groups or site.groups * STRIPE <= STRIPE
    return level() != "torch" and math.prod(site.weight.shape[2:]) <= TAPS and within


class Plain(nn.Module):
    """A layer by PyTorch's own operators: they have the least overhead, which dominates in small layers."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.register_buffer("weight", site.weight)
        self.register_buffer("bias", None if site.bias is None else site.bias.to(site.weight.dtype))
        self.site = site

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Returns activation(layer(x) + other)."""
        s = self.site
        if s.kind == "linear":
            out = functional.linear(x, self.weight, self.bias)
        else:
            out = functional.conv2d(x, self.weight, self.bias, s.stride, s.padding, s.dilation, s.groups)
        return apply_activation(out if other is None else out + other, s.activation)


class Then(nn.Module):
    """A layer followed by an activation that it does not fuse."""

    def __init__(self, layer: nn.Module, activation: Activation) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Returns activation(layer(x) + other)."""
        return apply_activation(self.layer(x, other), self.activation)


class Compact(nn.Module):
    """A convolution or linear layer without its zero outputs and inputs; the rest is dense.

    Args:
        site: A layer of one group; its weight is not entirely zero.
        dense: Makes the module of the remaining layer.
    """

    rows: Tensor | None
    columns: Tensor | None
    rest: Tensor

    def __init__(self, site: Site, dense: Callable[[Site], nn.Module] = Packed) -> None:
        super().__init__()
        found = kept(site)
        assert found is not None
        rows, columns = found
        every = (len(rows) == site.output_shape[_axis(site)], len(columns) == site.input_shape[_axis(site)])
        self.axis = _axis(site)
        self.register_buffer("rows", None if every[0] else rows)
        self.register_buffer("columns", None if every[1] else columns)
        bias = None if site.bias is None else site.bias[rows]
        small = replace(
            site,
            weight=site.weight[rows][:, columns].contiguous(),
            bias=bias,
            input_shape=_resized(site.input_shape, self.axis, len(columns)),
            output_shape=_resized(site.output_shape, self.axis, len(rows)),
            activation=Activation(),
            residual=False,
        )
        self.layer, self.activation = dense(small), site.activation
        rest = site.weight.new_zeros(site.weight.shape[0]) if site.bias is None else site.bias.to(site.weight.dtype, copy=True)
        self.register_buffer("rest", rest.reshape(-1, *[1] * (len(site.output_shape) - 1 - self.axis)))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Returns activation(layer(x) + other)."""
        out: Tensor = self.layer(x if self.columns is None else x.index_select(self.axis, self.columns))
        if self.rows is not None:
            shape = list(out.shape)
            shape[self.axis] = self.rest.shape[0]
            out = self.rest.expand(shape).clone(memory_format=_format(out)).index_copy_(self.axis, self.rows, out)
        return apply_activation(out if other is None else out.add_(other), self.activation)


def kept(site: Site) -> tuple[Tensor, Tensor] | None:
    """Returns the nonzero outputs and inputs; None if these are all or none, or for grouped convolutions."""
    if site.groups != 1:
        return None
    alive = site.weight.flatten(2) if site.weight.ndim > 2 else site.weight[..., None]
    rows, columns = alive.ne(0).any(-1).any(1).nonzero()[:, 0], alive.ne(0).any(-1).any(0).nonzero()[:, 0]
    whole = len(rows) == site.weight.shape[0] and len(columns) == site.weight.shape[1]
    return None if whole or not len(rows) or not len(columns) else (rows, columns)


def _axis(site: Site) -> int:
    return 1 if site.kind == "conv2d" else len(site.input_shape) - 1


def _resized(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _format(like: Tensor) -> torch.memory_format:
    return torch.channels_last if like.ndim == 4 else torch.contiguous_format


def without_activation(site: Site) -> tuple[Site, Activation]:
    """Returns the site with an activation that the kernels can fuse, and the activation that remains."""
    if site.activation.name in ACTIVATIONS:
        return site, Activation()
    return replace(site, activation=Activation()), site.activation


def then(layer: nn.Module, activation: Activation) -> nn.Module:
    """Returns a layer followed by an activation."""
    return layer if activation.name == "none" else Then(layer, activation)
