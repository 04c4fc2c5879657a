"""A layer in 8 bits as a module with plain tensors, and the rounding of tensors to 8 bits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia.runtime.int8.operators  # noqa: F401  # defines the operators
from microglia.core.errors import MicrogliaError
from microglia.runtime.dense.fusion import Site
from microglia.runtime.int8.layout import QUAD, dense_of_quads, largest, stored
from microglia.runtime.operators import level
from microglia.runtime.sparse_layers.layout import STRIPE, Places, one_group

TOP = 255
"""Largest value of a rounded activation; the smallest is 0."""
BOUNDS = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
"""Activation that a layer fuses -> the bounds of its outputs."""


class Scale(NamedTuple):
    """The meaning of a tensor in uint8: (value - zero) * unit.

    Attributes:
        unit: Distance between two neighbouring values.
        zero: The value that stands for 0, from 0 to 255.
    """

    unit: float
    zero: int

    @classmethod
    def of(cls, low: float, high: float) -> Scale:
        """Returns the scale on which a range, widened to hold 0, has 255 steps."""
        low, high = min(low, 0.0), max(high, 0.0)
        unit = (high - low) / TOP
        return cls(unit, round(-low / unit)) if unit > 0 else cls(1.0, 0)

    def quantize(self, x: Tensor) -> Tensor:
        """Returns a float32 tensor rounded to uint8; images in channels last."""
        out: Tensor = torch.ops.microglia.quantize(x, 1 / self.unit, float(self.zero))
        return out

    def dequantize(self, x: Tensor) -> Tensor:
        """Returns the values of a rounded tensor, in float32."""
        return x.float().sub_(self.zero).mul_(self.unit)


class Quantize(nn.Module):
    """Rounds a tensor to uint8."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Returns the rounded tensor."""
        return self.scale.quantize(x)


class Dequantize(Quantize):
    """Returns a rounded tensor to float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the values of the rounded tensor."""
        return self.scale.dequantize(x)


class Pool8(nn.Module):
    """The maximum over windows of a rounded image; its padding is never the maximum."""

    def __init__(self, kernel: list[int], stride: list[int], padding: list[int]) -> None:
        super().__init__()
        self.geometry = kernel, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Returns the pooled image, uint8 in channels last."""
        out: Tensor = torch.ops.microglia.int8_max_pool2d(x, *self.geometry)
        return out


class Int8Layer(nn.Module):
    """A convolution or linear layer in 8 bits, with fused activation and residual.

    Weights are rounded to int8 for each output, activations to uint8. Sums are exact. Each is scaled once in float32, then the
    residual is added, and the result is rounded once.

    Args:
        site: The layer; its activation is one of none, relu and relu6.
        source: Scale of its input.
        target: Scale of its output; None for an output in float32.
        other: Scale of the residual, where the output has one and there is a residual; with an output in float32 so is the
            residual.
    """

    values: Tensor
    row_pointer: Tensor
    channel: Tensor
    tap: Tensor | None
    start: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, site: Site, source: Scale, target: Scale | None = None, other: Scale | None = None) -> None:
        super().__init__()
        if site.activation.name not in BOUNDS:
            raise MicrogliaError(f"A layer in 8 bits fuses one of {', '.join(BOUNDS)}, not {site.activation.name!r}.")
        level()
        weight = one_group(site.weight, site.groups)
        weight = weight[..., None, None] if weight.ndim == 2 else weight
        rounded, units = _rounded(weight)
        pixels = math.prod(site.output_shape) // weight.shape[0]
        for name, tensor in zip(Places._fields, stored(rounded, pixels), strict=True):
            self.register_buffer(name, tensor)
        self.outputs, self.inputs = weight.shape[:2]
        self.linear, self.wide, self.zero = site.kind == "linear", target is None, source.zero
        self.geometry = [list(weight.shape[2:]), *(list(pair) for pair in (site.stride, site.padding, site.dilation))]
        unit, shift = (1.0, 0) if target is None else target
        sums = rounded.flatten(1).long().sum(1)
        bias = torch.zeros(self.outputs) if site.bias is None else site.bias
        bias = bias.double() / unit + shift - (0.0 if other is None else other.zero * other.unit / unit)
        self.register_buffer("start", _padded((-self.zero * sums).int()))
        self.register_buffer("scale", _padded((units.double() * source.unit / unit).float()))
        self.register_buffer("bias", _padded(bias.float()))
        self.other = 1.0 if other is None else other.unit / unit
        low, high = (bound / unit + shift for bound in BOUNDS[site.activation.name])
        self.bounds = (low, high) if self.wide else (max(0.0, low), min(float(TOP), high))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Returns activation(layer(x) + other), in uint8 or float32; images in channels last."""
        weights = self.values, self.row_pointer, self.channel, self.tap, self.start, self.scale, self.bias
        rest = self.other, *self.bounds, self.zero, self.wide, self.outputs, *self.geometry
        return (linear if self.linear else torch.ops.microglia.int8_conv2d)(x, *weights, other, *rest)  # type: ignore[no-any-return]

    def dense(self) -> Tensor:
        """Returns the rounded weight, (outputs, inputs, height, width), in float64."""
        places = Places(self.values, self.row_pointer, self.channel, self.tap)
        return dense_of_quads(places, self.outputs, self.inputs, self.geometry[0])

    def extra_repr(self) -> str:
        """Returns sizes and the stored weights, for the printed form."""
        return f"{self.inputs}, {self.outputs}, {len(self.channel)} x ({QUAD}, {STRIPE}), {'float32' if self.wide else 'uint8'}"


def linear(x: Tensor, *rest: Any) -> Tensor:
    """Returns ``int8_conv2d`` of (..., features), which are one row of pixels in the memory where they lie."""
    *weights, other = rest[:8]
    other = None if other is None else _image(other)
    out: Tensor = torch.ops.microglia.int8_conv2d(_image(x), *weights, other, *rest[8:])
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], out.shape[1])


def _image(x: Tensor) -> Tensor:
    return x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a weight in int8 and the unit of each output; zeros stay zeros."""
    units = weight.flatten(1).abs().amax(1).div(largest())
    units = torch.where(units > 0, units, 1.0)
    shape = [-1, *[1] * (weight.ndim - 1)]
    return (weight / units.reshape(shape)).round().to(torch.int8), units


def _padded(numbers: Tensor) -> Tensor:
    return functional.pad(numbers, (0, -len(numbers) % STRIPE))


def fuses(site: Site) -> bool:
    """Tells whether a layer in 8 bits can fuse the activation of a site."""
    return site.activation.name in BOUNDS
