"""Runs a convolution, or the part of it that an input needs, and decides this part.

On a CPU with compiled kernels one kernel gathers the part of the weight and convolves. Elsewhere the part is gathered and run
densely; oneDNN reorders it at every call, which costs about as much as gathering it. A whole convolution is packed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from microglia.dynamic.flow import Convolution
from microglia.dynamic.gate_plan import ACTIVATIONS
from microglia.dynamic.gates import Gate
from microglia.runtime import operators

mkldnn = torch.ops.mkldnn
CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
"""By the dimensions of space."""

AT_ONCE = 10_000
"""Minimum number of kernels for which both sides of a weight are gathered in one pass."""
FUSED: dict[str, tuple[str, list[float], str]] = {
    "identity": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
    "gelu": ("gelu", [], "none"),
    "tanh": ("tanh", [], ""),
}
"""Activation -> its name in oneDNN's operators."""

FEW = 8
"""Up to this number of input channels oneDNN is faster: kernels read 16 at once, and small weights reorder quickly."""
BLOCK, MANY_PIXELS = 16, 2000
"""Output channels that oneDNN computes together; pixels of an output from which on it is faster on whole blocks of them.

Measured with AVX2, on layers of ResNet-18.
"""
KERNELS = {"identity": 0, "relu": 1, "relu6": 2, "silu": 3}
"""Activation -> its number in Microglia's own kernels, if they support it."""


def run_part(x: Tensor, c: Convolution, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Returns some output channels of a convolution and its activation, from some input channels.

    Args:
        x: The channels ``columns`` of the input, or all of them if that is None.
        c: The convolution.
        rows: Output channels to compute, None for all.
        columns: Input channels given, None for all.
    """
    if has_kernel(x, c) and not _mostly_pixels(x, c, rows, columns):
        s = c.settings
        geometry = (list(c.weight.shape[2:]), s["stride"], padding_of(c), s["dilation"], KERNELS[c.activation])
        return torch.ops.microglia.part_conv2d(  # type: ignore[no-any-return]
            x, c.blocks, rows, columns, c.bias, c.outputs, *geometry
        )
    bias = c.bias if rows is None or c.bias is None else c.bias.index_select(0, rows)
    weight = _part_of(c.weight, rows, columns)
    if fusible(x, c):
        return _fused(x, weight, bias, c)
    s = c.settings
    out = CONVOLUTIONS[x.ndim - 2](x, weight, bias, s["stride"], s["padding"], s["dilation"], s["groups"])
    return ACTIVATIONS[c.activation](out)


def run_depthwise(x: Tensor, c: Convolution, rows: Tensor) -> Tensor:
    """Returns the output channels ``rows`` of a depthwise convolution and its activation, from the same input channels."""
    return run_part(x, replace(c, settings={**c.settings, "groups": len(rows)}), rows, None)


def prepacked(c: Convolution, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the whole convolution with its activation, its weight packed once for inputs like ``x``."""
    if not fusible(x, c):
        return lambda given: run_part(given, c, None, None)
    s = c.settings
    order = (padding_of(c), s["stride"], s["dilation"], s["groups"])
    packed = mkldnn._reorder_convolution_weight(c.weight, *order, list(x.shape))
    return lambda given: _fused(given, packed, c.bias, c)


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, c: Convolution) -> Tensor:
    s = c.settings
    out: Tensor = mkldnn._convolution_pointwise(
        x, weight, bias, padding_of(c), s["stride"], s["dilation"], s["groups"], *FUSED[c.activation]
    )
    return out


def has_kernel(x: Tensor, c: Convolution) -> bool:
    """Tells whether a compiled kernel computes parts of a convolution from such an input."""
    return c.groups == 1 and c.inputs > FEW and c.activation in KERNELS and _plain(x, c) and operators.level() != "torch"


def _mostly_pixels(x: Tensor, c: Convolution, rows: Tensor | None, columns: Tensor | None) -> bool:
    """Tells whether a part has so many pixels that oneDNN is faster, although it reorders the part's weight in this call.

    It is for whole blocks of outputs of a whole input: then nothing is computed in vain.
    """
    if columns is not None or rows is None or len(rows) % BLOCK or c.inputs % BLOCK or not fusible(x, c):
        return False
    strides = c.settings["stride"]
    return bool(x.shape[2] * x.shape[3] >= MANY_PIXELS * math.prod(strides if len(strides) == 2 else [strides[0]] * 2))


def fusible(x: Tensor, c: Convolution) -> bool:
    """Tells whether oneDNN's operators support a convolution and its activation for an input."""
    return _plain(x, c) and c.activation in FUSED and bool(torch.backends.mkldnn.enabled)


def _plain(x: Tensor, c: Convolution) -> bool:
    return is_image(x) and c.settings["padding"] != "same" and c.weight.dtype == torch.float32


def is_image(x: Tensor) -> bool:
    """Tells whether Microglia's own operators support a map: images in float32 on the CPU."""
    return x.ndim == 4 and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0


def choose_rows(gate: Gate, x: Tensor, columns: Tensor | None) -> Tensor | None:
    """Returns the output channels that a gate keeps for one input, ascending; None if no operator supports this gate.

    Args:
        gate: The gate.
        x: The channels ``columns`` of its input, or all of them if that is None, (1, channels, height, width).
        columns: Input channels given, None for all.
    """
    if gate.static or gate.keep is not None or not is_image(x) or gate.weight.dtype != torch.float32:
        return None
    settings = (gate.softmax, gate.pool == "max", gate.block)
    rows: Tensor = torch.ops.microglia.gate_rows(x, columns, gate.weight, gate.bias, *settings)
    return rows


def _part_of(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Returns some rows and columns of a weight; many are gathered in one pass by kernel index, which is faster."""
    if rows is not None and columns is not None and len(rows) * len(columns) > AT_ONCE:
        places = (rows[:, None] * weight.shape[1] + columns).flatten()
        return weight.flatten(2).flatten(0, 1).index_select(0, places).reshape(len(rows), len(columns), *weight.shape[2:])
    weight = weight if rows is None else weight.index_select(0, rows)
    return weight if columns is None else weight.index_select(1, columns)


def padding_of(c: Convolution) -> list[int]:
    """Returns the padding of each spatial dimension, if both sides are equal."""
    padding, rank = c.settings["padding"], c.weight.ndim - 2
    if padding == "valid":
        return [0] * rank
    return list(padding) if len(padding) == rank else list(padding) * rank


def silent(c: Convolution, x: Tensor, rows: Tensor) -> Tensor:
    """Returns the output of filters without any input: their bias after the activation, at every pixel.

    Args:
        c: The convolution.
        x: The input, with any channels.
        rows: The filters.
    """
    space = list(x.shape[2:])
    if c.settings["padding"] != "same":
        pairs = zip(space, padding_of(c), c.settings["dilation"], c.weight.shape[2:], c.settings["stride"], strict=True)
        space = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in pairs]
    shift = c.weight.new_zeros(len(rows)) if c.bias is None else ACTIVATIONS[c.activation](c.bias.index_select(0, rows))
    return shift.reshape(1, -1, *[1] * len(space)).expand(len(x), -1, *space).clone()


def settings_key(c: Convolution, space: Any) -> tuple[Any, ...]:
    """Returns a key that is equal for convolutions with equal time."""
    s = c.settings
    return (tuple(c.weight.shape), tuple(space), tuple(s["stride"]), str(s["padding"]), tuple(s["dilation"]), s["groups"])
