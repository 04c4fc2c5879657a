"""The recurrent networks of SNIP: LSTM-s and -b, GRU-s and -b, which read an image row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from microglia.zoo.registry import Shape, register

_KINDS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU}
_UNITS = {"s": 128, "b": 256}


def _one_bias(layer: nn.RNNBase) -> nn.RNNBase:
    """Makes the second of torch's two biases a constant 0, so that every gate has a single bias, as in the paper.

    The second bias stays in the state under its own name, because torch's kernels read both.
    """
    zeros = torch.zeros_like(layer.get_parameter("bias_hh_l0"))
    del layer._parameters["bias_hh_l0"]
    layer.register_buffer("bias_hh_l0", zeros)
    layer._init_flat_weights()
    return layer


class Recurrent(nn.Module):
    """A linear layer on each row, one recurrent layer over the rows, a linear layer behind the last row."""

    def __init__(self, kind: str, inputs: int, units: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, units)
        self.rnn = _one_bias(_KINDS[kind](units, units, batch_first=True))
        self.linear = nn.Linear(units, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, classes) logits: a sequence of H rows, each of C W values."""
        rows = self.embed(x.transpose(1, 2).flatten(2))
        logits: Tensor = self.linear(self.rnn(rows)[0][:, -1])
        return logits


@register("lstm-s", "lstm-b", "gru-s", "gru-b")
def recurrent(name: str, classes: int, shape: Shape) -> nn.Module:
    """Builds LSTM-s, LSTM-b, GRU-s or GRU-b: rows of an image -> linear -> a recurrent layer of 128 (s) or 256 (b) -> classes.

    On 1x28x28 with ten classes: 136,586, 535,306, 103,690 and 403,978 parameters; every gate has one bias.

    Source: Lee et al. 2019, "SNIP", table 2, sequential MNIST.

    Args:
        name: One of the registered names.
        classes: Number of logits.
        shape: Input shape, (channels, height, width): ``height`` steps of ``channels * width`` values.
    """
    kind, _, size = name.partition("-")
    return Recurrent(kind, shape[0] * shape[2], _UNITS[size], classes)
