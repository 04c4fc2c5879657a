"""Sparse layers as modules with plain tensors: they can be saved, copied and moved like other modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from microglia.core.errors import MicrogliaError
from microglia.runtime.dense.fusion import Site
from microglia.runtime.operators import ACTIVATIONS, level
from microglia.runtime.sparse_layers.layout import (
    STRIPE,
    Places,
    dense_of_blocks,
    dense_of_rows,
    one_group,
    to_blocks,
    to_rows,
    wants_pairs,
)

Pair = tuple[int, int]


class _Sparse(nn.Module):
    """Common base of the sparse layers: the places as buffers, the activation, and the residual.

    On the CPU, layers of blocks can overwrite their residual: if ``overwrites`` is true and the residual has the output's
    memory layout.

    Blocks run in the dtype of their values: float32, or bfloat16 after ``.to(torch.bfloat16)``. Input, residual and output have
    the same dtype. The sums and the bias stay in float32.
    """

    values: Tensor
    row_pointer: Tensor
    channel: Tensor
    tap: Tensor | None
    bias: Tensor | None
    kernel: Sequence[int] = ()
    decode = staticmethod(dense_of_blocks)

    def __init__(self, places: Places, bias: Tensor | None, inputs: int, outputs: int, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise MicrogliaError(f"A sparse layer fuses one of {', '.join(ACTIVATIONS)}, not {activation!r}.")
        for name in ("values", "row_pointer", "channel", "tap"):
            self.register_buffer(name, getattr(places, name))
        self.register_buffer("bias", bias.float() if bias is not None and places.values.dtype == torch.bfloat16 else bias)
        self.inputs, self.outputs, self.activation = inputs, outputs, activation
        self.code = ACTIVATIONS.index(activation)
        self.overwrites = False
        level()

    @property
    def places(self) -> Places:
        """The remaining weights and their positions."""
        return Places(self.values, self.row_pointer, self.channel, self.tap)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        bias = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if bias is not None and self.values.dtype == torch.bfloat16:
            self.bias = bias.to(self.values.device, torch.float32)
        self._lay_out()
        return self

    def _lay_out(self) -> None:
        """Reorders blocks for a new dtype."""
        paired = self.values.ndim == 4
        if self.values.ndim < 3 or paired == wants_pairs(self.values) or STRIPE not in self.values.shape[2:3]:
            return
        width = self.values.shape[1] * (2 if paired else 1)
        # Pairs hold zeros beside single inputs; float32 does not need them.
        places = to_blocks(self.dense(), 1 if paired and width == 2 else width)
        for name in Places._fields:
            setattr(self, name, getattr(places, name))

    def dense(self) -> Tensor:
        """Returns the weight with its zeros, (outputs, inputs, *kernel)."""
        return self.decode(self.places, self.outputs, self.inputs, self.kernel)

    def _may_overwrite(self, other: Tensor | None, layout: torch.memory_format) -> bool:
        return self.overwrites and other is not None and other.is_cpu and other.is_contiguous(memory_format=layout)

    def extra_repr(self) -> str:
        """Returns sizes and density, for the printed form."""
        return f"{self.inputs}, {self.outputs}, {self.values.shape[0]} x {tuple(self.values.shape[1:])}, {self.activation}"


class BlockConv2d(_Sparse):
    """A convolution in blocks of 16 outputs x 1, 2, 4 or 8 inputs, with fused activation and residual; channels last.

    On a GPU (``.to("cuda")``, also ``.half()`` or ``.bfloat16()``) blocks have 16 to 128 outputs and 1 to 64 inputs.

    Args:
        places: Its blocks, of `to_blocks`.
        bias: (outputs,) or None.
        inputs: Input channels, all groups together.
        outputs: Output channels.
        kernel: Height and width, the order also of the three following pairs.
        stride: Stride of the output's pixels.
        padding: Zeros on each side.
        dilation: Distance between the taps.
        activation: Applied last, one of none, relu, relu6, silu.
    """

    def __init__(
        self,
        places: Places,
        bias: Tensor | None,
        inputs: int,
        outputs: int,
        kernel: Pair,
        *,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        activation: str = "none",
    ) -> None:
        super().__init__(places, bias, inputs, outputs, activation)
        self.kernel = kernel
        self.geometry = (list(kernel), list(stride), list(padding), list(dilation))

    @classmethod
    def of(cls, site: Site, width: int, stripe: int = STRIPE, paired: bool | None = None) -> BlockConv2d:
        """Returns the sparse form of a fused layer, in blocks of ``stripe`` outputs x ``width`` inputs; see `to_blocks`."""
        return cls(to_blocks(one_group(site.weight, site.groups), width, stripe, paired), **_settings(site))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Returns activation(convolution(x) + bias + other), (batch, outputs, height, width) in channels last."""
        if self._may_overwrite(other, torch.channels_last):
            torch.ops.microglia.block_conv2d_(x, *self._operands(other))
            return other  # type: ignore[return-value]
        out: Tensor = torch.ops.microglia.block_conv2d(x, *self._operands(other))
        return out

    def _operands(self, other: Tensor | None) -> tuple[Any, ...]:
        return (*self.places, self.bias, other, self.outputs, *self.geometry, self.code)


class RowConv2d(BlockConv2d):
    """A convolution in which groups of 1 (unstructured), 2 or 4 outputs share weight positions; contiguous layout."""

    decode = staticmethod(dense_of_rows)

    @classmethod
    def of(cls, site: Site, width: int, stripe: int = STRIPE, paired: bool | None = None) -> RowConv2d:
        """Returns the sparse form of a fused layer, its outputs in groups of ``width``, without stripes."""
        return cls(to_rows(one_group(site.weight, site.groups), width), **_settings(site))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Returns activation(convolution(x) + bias + other), (batch, outputs, height, width), contiguous."""
        out: Tensor = torch.ops.microglia.row_conv2d(x, *self._operands(other))
        return out


class BlockLinear(_Sparse):
    """A linear layer in blocks of 16 outputs x 1, 2, 4 or 8 inputs, with fused activation and residual.

    On a GPU blocks have 16 to 128 outputs and 1 to 64 inputs, as in `BlockConv2d`.

    Args:
        places: Its blocks, of `to_blocks`.
        bias: (outputs,) or None.
        inputs: Features read.
        outputs: Features written.
        activation: Applied last, one of none, relu, relu6, silu.
    """

    def __init__(self, places: Places, bias: Tensor | None, inputs: int, outputs: int, *, activation: str = "none") -> None:
        super().__init__(places, bias, inputs, outputs, activation)

    @classmethod
    def of(cls, site: Site, width: int, stripe: int = STRIPE, paired: bool | None = None) -> BlockLinear:
        """Returns the sparse form of a fused layer, in blocks of ``stripe`` outputs x ``width`` inputs."""
        outputs, inputs = site.weight.shape
        activation = site.activation.name
        return cls(to_blocks(site.weight, width, stripe, paired), site.bias, inputs, outputs, activation=activation)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Returns activation(linear(x) + bias + other), (..., outputs)."""
        operands = (*self.places[:3], self.bias, other, self.outputs, self.code)
        if self._may_overwrite(other, torch.contiguous_format):
            torch.ops.microglia.block_linear_(x, *operands)
            return other  # type: ignore[return-value]
        out: Tensor = torch.ops.microglia.block_linear(x, *operands)
        return out


def _settings(site: Site) -> dict[str, Any]:
    kernel: Sequence[int] = site.weight.shape[2:]
    return {
        "bias": site.bias,
        "inputs": site.weight.shape[1] * site.groups,
        "outputs": site.weight.shape[0],
        "kernel": (kernel[0], kernel[1]),
        "stride": site.stride,
        "padding": site.padding,
        "dilation": site.dilation,
        "activation": site.activation.name,
    }
