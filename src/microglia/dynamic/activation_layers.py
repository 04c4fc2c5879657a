"""Linear layers that take small entries of their input for zero, and the change "activations" by which files keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.errors import FileError
from microglia.core.layers import prunable_layers
from microglia.runtime.sparse_layers.thresholded import TYPES, thresholded
from microglia.storage.changes import Change, register_change

THRESHOLD = "threshold"
"""Name of the buffer of a threshold, beside ``weight`` and ``bias``."""


class ThresholdedLinear(nn.Linear):
    """A linear layer that takes entries of its input whose magnitude is at most a threshold for zero.

    The function is the same for any number of rows. NaN is above every threshold.

    Attributes:
        threshold: One number, in the type of the weight.
        sparsity: The fraction of entries that the threshold was made for.
        rows: Maximum number of rows for which the compiled kernel runs; 0 for never. Set by
            `microglia.dynamic.tune_activations`. The weight then lies input by input in memory, as the kernel reads it; its
            shape stays (outputs, inputs).
    """

    threshold: Tensor
    sparsity: float
    rows: int

    def forward(self, input: Tensor) -> Tensor:
        """Returns the layer's output for a thresholded input."""
        if self.rows and _takes(self, input):
            out: Tensor = torch.ops.microglia.thresholded_linear(input, self.weight.t(), self.bias, self.threshold)
            return out
        return functional.linear(thresholded(input, self.threshold), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Returns the sizes and the sparsity."""
        return f"{super().extra_repr()}, sparsity={self.sparsity:.3g}"


def _takes(layer: ThresholdedLinear, x: Tensor) -> bool:
    """Tells whether the compiled kernel runs: few rows on the CPU, without gradients, autocast or a compiler."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() > layer.rows * layer.in_features:
        return False
    weight = layer.weight
    same = x.dtype == weight.dtype == layer.threshold.dtype and x.dtype in TYPES and weight.stride(0) == 1
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return same and not learns and not torch.is_autocast_enabled("cpu")


def attach_threshold(layer: nn.Module, threshold: float | Tensor, sparsity: float) -> None:
    """Turns a plain linear layer into a thresholded one, in place, or gives a thresholded one another threshold.

    Args:
        layer: An `nn.Linear` that is no other subclass of it.
        threshold: Entries of the input of at most this magnitude count as zero.
        sparsity: The fraction of entries that it is made for.
    """
    assert type(layer) in {nn.Linear, ThresholdedLinear}
    assert isinstance(layer, nn.Linear)
    layer.__class__ = ThresholdedLinear
    assert isinstance(layer, ThresholdedLinear)
    layer.register_buffer(THRESHOLD, torch.as_tensor(threshold).to(layer.weight))
    layer.sparsity, layer.rows = sparsity, 0


def thresholded_layers(model: nn.Module) -> dict[str, ThresholdedLinear]:
    """Returns the thresholded layers of a model by the name of their weight."""
    found = {f"{path}.weight".removeprefix("."): module for path, module in model.named_modules()}
    return {name: module for name, module in found.items() if isinstance(module, ThresholdedLinear)}


def _sparsities(model: nn.Module) -> dict[str, float] | None:
    return {name: layer.sparsity for name, layer in thresholded_layers(model).items()} or None


def _decoded(written: Any, state: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the sparsities that a file holds.

    Raises:
        FileError: They are no numbers by layer, or a threshold is missing.
    """
    if not isinstance(written, dict) or not all(isinstance(s, int | float) and 0 <= s <= 1 for s in written.values()):
        raise FileError("The sparsities of activations are damaged: they are no fraction for each layer.")
    for name in written:
        held = state.get(f"{name.rpartition('weight')[0]}{THRESHOLD}")
        if not name.endswith("weight") or held is None or held.ndim:
            raise FileError(f"The sparsity of {name[:80]!r} is damaged: the file holds no threshold for it.")
    return written


def _replayed(model: nn.Module, sparsities: Mapping[str, float]) -> nn.Module:
    layers = {name: layer.module for name, layer in prunable_layers(model).items()} if sparsities else {}
    for name, sparsity in sparsities.items():
        if type(layers.get(name)) not in {nn.Linear, ThresholdedLinear}:
            raise FileError(f"The file has a threshold before {name!r}, which is no linear layer of {type(model).__name__}.")
        attach_threshold(layers[name], 0.0, sparsity)
    return model


register_change("activations", Change(of=_sparsities, encode=dict, decode=_decoded, replay=_replayed))
