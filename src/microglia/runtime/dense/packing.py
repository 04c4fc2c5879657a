"""The fastest dense execution on CPU without a compiler: weights packed for oneDNN once, neighbours fused.

Convolutions and linear layers become the operators that ``torch.compile`` with freezing emits.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.runtime.dense.fusion import Activation, Site, fuse

mkldnn = torch.ops.mkldnn

SPELLED = {"relu": "relu", "relu6": "hardtanh", "silu": "swish", "hardswish": "hardswish", "sigmoid": "sigmoid",
           "tanh": "tanh", "hardtanh": "hardtanh", "gelu": "gelu", "none": "none"}  # fmt: skip
"""Activation -> its name in oneDNN's operators."""
APPLIED = {"relu": torch.relu, "silu": nn.functional.silu, "hardswish": nn.functional.hardswish, "sigmoid": torch.sigmoid,
           "tanh": torch.tanh, "relu6": nn.functional.relu6}  # fmt: skip


def apply_activation(x: Tensor, activation: Activation) -> Tensor:
    """Returns the activation of a tensor, by PyTorch's own operators."""
    if activation.name == "none":
        return x
    if activation.name == "hardtanh":
        return x.clamp(*activation.scalars)
    if activation.name == "gelu":
        return nn.functional.gelu(x, approximate=activation.form)
    return APPLIED[activation.name](x)


def pack(model: nn.Module, example: Example) -> nn.Module:
    """Returns the model as a graph of packed operators, valid only for inputs of the example's shapes.

    Args:
        model: A folded model in evaluation mode on the CPU, such as `folded_twin` returns; the graph shares its weights.
        example: Example inputs.

    Raises:
        MicrogliaError: The model has no 2-d convolution or linear layer in float32 on the CPU.
    """
    packed = fuse(model, example, Packed)
    if not any(isinstance(module, Packed) for module in packed.modules()):
        raise MicrogliaError("there is no 2-d convolution or linear layer in float32 on the CPU to pack.")
    return packed


class Packed(nn.Module):
    """One fused layer in oneDNN with a packed weight: the best dense execution of a layer.

    Args:
        site: The layer and the operators fused with it.
        overwrites: Whether a convolution overwrites its residual.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, site: Site, overwrites: bool = False) -> None:
        super().__init__()
        self.register_buffer("weight", site.weight)
        self.register_buffer("bias", None if site.bias is None else site.bias.to(site.weight.dtype))
        self.site, self.overwrites = site, overwrites
        self._call = self._prepare()

    def _prepare(self) -> Any:
        site, a = self.site, self.site.activation
        spelled = ("none", [], "") if a.name == "none" else (SPELLED[a.name], _scalars(a), a.form)
        if site.kind == "linear":
            rows = int(torch.Size(site.input_shape[:-1]).numel())
            packed = mkldnn._reorder_linear_weight(self.weight, rows)
            if site.residual:  # oneDNN would apply the activation before the sum
                return lambda x, other: apply_activation(mkldnn._linear_pointwise.binary(x, other, packed, self.bias, "add"), a)
            return lambda x: mkldnn._linear_pointwise.default(x, packed, self.bias, *spelled)
        order = (site.padding, site.stride, site.dilation, site.groups)
        packed = mkldnn._reorder_convolution_weight(self.weight, *order, list(site.input_shape))
        if not site.residual:
            return lambda x: mkldnn._convolution_pointwise.default(x, packed, self.bias, *order, *spelled)
        rectified = "relu" if a.name == "relu" else None
        rest = Activation() if rectified else a
        how: tuple[Any, ...] = (packed, self.bias, *order, "add", 1.0, rectified, [], "")

        def sum_of(x: Tensor, other: Tensor) -> Tensor:
            if self.overwrites:
                return apply_activation(mkldnn._convolution_pointwise_.binary(other, x, *how), rest)
            return apply_activation(mkldnn._convolution_pointwise.binary(x, other, *how), rest)

        return sum_of

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Returns activation(layer(x) + other)."""
        out: Tensor = self._call(x) if other is None else self._call(x, other)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        """Returns a copy that packs its own weight: a packed tensor cannot be copied."""
        return Packed(copy.deepcopy(self.site, memo), self.overwrites)

    def __reduce__(self) -> tuple[type[Packed], tuple[Site, bool]]:
        """Returns the arguments to build the layer again in another process."""
        return Packed, (self.site, self.overwrites)


def _scalars(activation: Activation) -> list[float]:
    return [0.0, 6.0] if activation.name == "relu6" else list(activation.scalars)
