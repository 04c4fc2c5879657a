"""Wide residual networks: WRN-D-K with pre-activation blocks, any depth and widening factor."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from microglia.zoo.registry import ModelError, Shape, initialize, register


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice beside a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution that starts after the first activation.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None
        if (inputs, stride) != (outputs, 1):
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / stride, W / stride), sizes rounded up."""
        y = F.relu(self.bn1(x))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(y)
        y = F.relu(self.bn2(self.conv1(y)))
        residual: Tensor = self.conv2(self.dropout(y))
        return shortcut + residual


class WideResNet(nn.Module):
    """3x3 convolution, three stages, BN-ReLU, global average pooling, linear."""

    def __init__(self, blocks: int, factor: int, dropout: float, classes: int, channels: int) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            first = PreActivationBlock(inputs, outputs, stride, dropout)
            return nn.Sequential(first, *(PreActivationBlock(outputs, outputs, 1, dropout) for _ in range(blocks - 1)))

        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.layer1 = stage(16, 16 * factor, 1)
        self.layer2 = stage(16 * factor, 32 * factor, 2)
        self.layer3 = stage(32 * factor, 64 * factor, 2)
        self.bn = nn.BatchNorm2d(64 * factor)
        self.linear = nn.Linear(64 * factor, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, classes) logits."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: Tensor = self.linear(F.relu(self.bn(x)).mean((2, 3)))
        return logits


@register("wrn-16-2", "wrn-16-8", "wrn-16-10", "wrn-22-8", "wrn-28-10", open_form="wrn-D-K")
def wide_resnet(name: str, classes: int, shape: Shape, *, dropout: float = 0.0) -> nn.Module:
    """Builds a wide ResNet from its name, ``wrn-D-K``, for any image size; wrn-28-10 has 36,479,194 parameters.

    D = 6n + 4 is the depth (n blocks in each of three stages), K >= 1 widens the stages to 16K, 32K and 64K channels.

    Source: Zagoruyko and Komodakis 2016, "Wide Residual Networks", table 1.

    Args:
        name: A name such as ``"wrn-28-10"``; every valid pair of numbers works, listed or not.
        classes: Number of logits.
        shape: Input shape, (channels, height, width); only the channels matter.
        dropout: Probability of dropping between the two convolutions of a block, in [0, 1]; the paper tries 0.3.

    Raises:
        ModelError: The name is not of this form.
    """
    numbers = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    depth, factor = map(int, numbers.groups()) if numbers else (0, 0)
    if depth < 10 or depth % 6 != 4 or factor < 1:
        raise ModelError(f"{name!r} is no wide ResNet: wrn-D-K takes D = 10, 16, 22, 28, 34, 40, ... and K >= 1.")
    return initialize(WideResNet((depth - 4) // 6, factor, dropout, classes, shape[0]))
