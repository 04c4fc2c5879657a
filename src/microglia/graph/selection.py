"""Channel selection: norms of pre-activation networks read some channels of a stream, and the stream stays whole.

In a pre-activation network many norms read one residual or concatenated stream. Without a selection a channel of the stream can
go only from all of them at once. A norm with a selection of its own gathers its channels first; so it, its scales and the layer
behind it lose channels of their own.

Source: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", section 3, and its public code
(spec: survey 8.0, policy iii). There the gathering follows the norm; before it the values are equal and fewer are normalized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from microglia.core.errors import FileError
from microglia.graph.dims.nodes import operator_name
from microglia.graph.dims.trace import Trace, trace
from microglia.storage.changes import Change, register_change

SELECTED = "selected"
"""Buffer of a norm: the channels of its input that it reads, int64 (channels,)."""


class SelectedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of chosen channels of an image; the names of its parameters are those of the plain norm."""

    selected: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, stream, H, W) to (N, channels, H, W)."""
        return super().forward(input.index_select(1, self.selected))


class SelectedBatchNorm1d(nn.BatchNorm1d):
    """Batch norm of chosen features; the names of its parameters are those of the plain norm."""

    selected: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, stream) or (N, stream, L) to the same with the chosen channels."""
        return super().forward(input.index_select(1, self.selected))


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: SelectedBatchNorm2d,
    nn.BatchNorm1d: SelectedBatchNorm1d,
}
"""Plain norm -> the same with a selection."""
_MAKERS = ("linear", "addmm", "conv1d", "conv2d", "conv3d")
"""Operators whose result, read by one norm alone, is no stream."""


def stream_norms(model: nn.Module, example_inputs: Any) -> list[str]:
    """Returns the paths of the batch norms that read a stream: a sum, a concatenation, or a value with other readers.

    A norm that alone reads the output of a convolution is none of them.

    Raises:
        TraceError: The model cannot be traced.
    """
    traced = trace(model, example_inputs)
    streams: dict[str, bool] = {}
    for node in traced.graph.nodes:
        if node.op == "call_function" and operator_name(node) == "batch_norm" and isinstance(node.args[1], fx.Node):
            path = traced.name_of.get(node.args[1].name, "").rpartition(".")[0]
            streams[path] = streams.get(path, True) and _is_stream(traced, node.args[0])
    modules = dict(model.named_modules())
    return [path for path, found in streams.items() if found and type(modules.get(path)) in FORMS]


def select_channels(model: nn.Module, example_inputs: Any) -> list[str]:
    """Gives every batch norm that reads a stream a selection, in place; at first it holds all channels.

    Example:
        >>> from microglia.zoo import build
        >>> select_channels(build("wrn-10-1"), torch.zeros(1, 3, 8, 8))[:2]
        ['layer1.0.bn1', 'layer2.0.bn1']

    Args:
        model: Any model that `torch.export` can trace; the names of its parameters stay.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.

    Returns:
        The paths of the norms; empty for a network without such norms.
    """
    paths = stream_norms(model, example_inputs)
    for path in paths:
        _give(model.get_submodule(path))
    return paths


def selected_norms(model: nn.Module) -> list[str] | None:
    """Returns the paths of the norms with a selection; None if there are none."""
    forms = tuple(FORMS.values())
    return [path for path, module in model.named_modules() if isinstance(module, forms)] or None


def _is_stream(traced: Trace, node: Any) -> bool:
    """Tells whether a value is a stream: follows operators with one input back to a sum, a concatenation or a maker."""
    while True:
        if sum(isinstance(user.meta.get("val"), Tensor | list | tuple) for user in node.users) > 1:
            return True
        if node.op == "placeholder" or operator_name(node) in _MAKERS:
            return False
        inputs = [source for source in node.all_input_nodes if source.name not in traced.name_of]
        if len(inputs) != 1:
            return len(inputs) > 1
        node = inputs[0]


def _give(norm: Any) -> None:
    norm.register_buffer(SELECTED, torch.arange(norm.num_features, device=norm.weight.device))
    norm.__class__ = FORMS[type(norm)]


def _decoded(written: Any, state: Mapping[str, Tensor]) -> list[str]:
    """Returns the paths that a file holds.

    Raises:
        FileError: They are no list of paths, or a norm has no channels in the file.
    """
    if not isinstance(written, list) or not all(isinstance(path, str) for path in written):
        raise FileError("The selections of norms are damaged: they are no list of names.")
    for path in written:
        if f"{path}.{SELECTED}" not in state:
            raise FileError(f"The selection of {path[:80]!r} is damaged: the file holds no channels for it.")
    return written


def _replayed(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    for path in paths:
        norm = model.get_submodule(path)
        if type(norm) not in FORMS:
            raise FileError(f"The file selects channels of {path!r}, which is no batch norm of this {type(model).__name__}.")
        _give(norm)
    return model


register_change(
    SELECTED,
    Change(of=selected_norms, encode=list, decode=_decoded, replay=_replayed, forms=True),
)
