"""DenseNet-40 for CIFAR: every layer sees the outputs of all layers before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microglia.zoo.registry import Shape, initialize, register, require_size, require_whole


class DenseLayer(nn.Module):
    """BN-ReLU-conv3x3, joined to its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, inputs + growth, H, W)."""
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


class Transition(nn.Module):
    """BN-ReLU-conv1x1 and 2x2 average pooling, no compression."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H / 2, W / 2), sizes rounded down."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """Convolution, three dense blocks, BN-ReLU, global average pooling, linear."""

    def __init__(self, layers: int, growth: int, stem: int, classes: int, inputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, stem, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        channels = stem
        for block in range(3):
            if block:
                stages.append(Transition(channels))
            stages.append(nn.Sequential(*(DenseLayer(channels + i * growth, growth) for i in range(layers))))
            channels += layers * growth
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, classes) logits."""
        x = self.stages(self.conv(x))
        logits: Tensor = self.linear(F.relu(self.bn(x)).mean((2, 3)))
        return logits


@register("densenet40")
def densenet40(name: str, classes: int, shape: Shape, *, growth: int = 12, stem: int = 16) -> nn.Module:
    """Builds DenseNet-40, three blocks of twelve layers without bottleneck; 1,019,722 parameters as in the paper.

    Source: Huang et al. 2017, "Densely Connected Convolutional Networks", section 3, L = 40, k = 12.

    Args:
        name: ``"densenet40"``.
        classes: Number of logits.
        shape: Input shape, (channels, height, width).
        growth: Channels that each layer adds (k of the paper), at least 1.
        stem: Channels of the first convolution: 16 in the paper, 24 in Network Slimming and HRank.

    Raises:
        ModelError: The image is smaller than 4x4, or a number is not whole and above 0.
    """
    require_size(name, shape, 4, "two average poolings by 2")
    require_whole(name, growth=growth, stem=stem)
    return initialize(DenseNet(12, growth, stem, classes, shape[0]))
