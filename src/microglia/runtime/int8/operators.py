"""The operators in 8 bits: a convolution of quads, pooling, rounding of activations; with references in pure PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from microglia.runtime.int8.layout import dense_of_quads
from microglia.runtime.sparse_layers.layout import Places

_library = torch.library.Library("microglia", "FRAGMENT")  # type: ignore[no-untyped-call]


def _convolution(x: Tensor, *rest: Any) -> Tensor:
    """Returns the exact sums, scaled as the kernels do: each product with its addition is rounded once, to float32."""
    values, row_pointer, channel, tap, start, scale, bias, residual, other, low, high, zero, wide, outputs, *geometry = rest
    kernel, stride, padding, dilation = geometry
    weight = dense_of_quads(Places(values, row_pointer, channel, tap), outputs, x.shape[1], kernel)
    padded = functional.pad(x.double(), (padding[1], padding[1], padding[0], padding[0]), value=zero)
    sums = functional.conv2d(padded, weight, None, stride, 0, dilation) + start[:outputs, None, None]
    value = (sums.float().double() * scale[:outputs, None, None].double() + bias[:outputs, None, None].double()).float()
    if residual is not None:
        value = (residual.double() * torch.tensor(other, dtype=torch.float32).double() + value.double()).float()
    value = value.clamp(low, high)
    result: Tensor = value if wide else value.round().to(torch.uint8)
    return result.contiguous(memory_format=torch.channels_last)


def _convolved(x: Tensor, *rest: Any) -> Tensor:
    wide, outputs, kernel, stride, padding, dilation = rest[12:]
    sides = zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    shape = [x.shape[0], outputs, *((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in sides)]
    return x.new_empty(shape, dtype=torch.float32 if wide else torch.uint8).to(memory_format=torch.channels_last)


def _quantize(x: Tensor, scale: float, zero: float) -> Tensor:
    value = x * torch.tensor(scale, dtype=torch.float32) + torch.tensor(zero, dtype=torch.float32)
    return _laid_out(value.nan_to_num(0.0, torch.inf, -torch.inf).clamp(0, 255).round().to(torch.uint8))


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()


def _pooled(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    return _laid_out(functional.max_pool2d(x.float(), kernel, stride, padding).to(torch.uint8))


def _pooled_shape(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    sides = [(size + 2 * p - k) // s + 1 for size, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True)]
    return x.new_empty([*x.shape[:2], *sides]).to(memory_format=torch.channels_last)


_OPERATORS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Tensor]]] = {  # name -> schema, reference, shape
    "int8_conv2d": (
        "(Tensor x, Tensor values, Tensor row_pointer, Tensor channel, Tensor? tap, Tensor start, Tensor scale, Tensor bias, "
        "Tensor? residual, float other, float low, float high, int zero, bool wide, int outputs, int[2] kernel, int[2] stride, "
        "int[2] padding, int[2] dilation) -> Tensor",
        _convolution,
        _convolved,
    ),
    "quantize": (
        "(Tensor x, float scale, float zero) -> Tensor",
        _quantize,
        lambda x, scale, zero: _laid_out(torch.empty_like(x, dtype=torch.uint8)),
    ),
    "int8_max_pool2d": (
        "(Tensor x, int[2] kernel, int[2] stride, int[2] padding) -> Tensor",
        _pooled,
        _pooled_shape,
    ),
}
for _name, (_schema, _reference, _shape) in _OPERATORS.items():
    _library.define(_name + _schema)  # type: ignore[no-untyped-call]
    _library.impl(_name, _reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"microglia::{_name}", _shape, lib=_library)
