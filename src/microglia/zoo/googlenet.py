"""GoogLeNet for CIFAR: nine inception blocks with batch norm, the form of HRank's tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from microglia.zoo.registry import Shape, initialize, register, require_size

_BLOCKS = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
"""Stage -> its blocks: outputs of 1x1; reduced and output of 3x3; reduced and output of 5x5; outputs behind the pooling."""


def _widen(channels: int, width: float) -> int:
    """Returns the nearest whole number to ``channels * width``, at least 1."""
    if not width > 0:
        raise ValueError(f"width is above 0; got {width}")
    return max(1, round(channels * width))


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU())


class Inception(nn.Module):
    """Four branches side by side, joined: 1x1; 3x3; two 3x3 in place of 5x5; 3x3 max-pooling with 1x1."""

    def __init__(self, inputs: int, sizes: Sequence[int]) -> None:
        super().__init__()
        one, three_in, three, five_in, five, pooled = sizes
        self.one = _convolution(inputs, one, 1)
        self.three = nn.Sequential(_convolution(inputs, three_in, 1), _convolution(three_in, three, 3))
        deep = (_convolution(inputs, five_in, 1), _convolution(five_in, five, 3), _convolution(five, five, 3))
        self.five = nn.Sequential(*deep)
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _convolution(inputs, pooled, 1))
        self.outputs = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H, W)."""
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], 1)


class GoogLeNet(nn.Module):
    """Convolution, inception blocks with two max-poolings between, global average pooling, linear."""

    def __init__(self, classes: int, channels: int, width: float) -> None:
        super().__init__()
        inputs = _widen(192, width)
        features: list[nn.Module] = [_convolution(channels, inputs, 3)]
        for stage, blocks in enumerate(_BLOCKS):
            if stage:
                features.append(nn.MaxPool2d(3, stride=2, padding=1))
            for sizes in blocks:
                block = Inception(inputs, [_widen(size, width) for size in sizes])
                features.append(block)
                inputs = block.outputs
        self.features = nn.Sequential(*features)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, classes) logits."""
        logits: Tensor = self.linear(self.features(x).mean((2, 3)))
        return logits


@register("googlenet")
def googlenet(name: str, classes: int, shape: Shape, *, width: float = 1.0) -> nn.Module:
    """Builds GoogLeNet for CIFAR; 6,166,250 parameters on 3x32x32 with ten classes, 1.52 billion MACs.

    Source: Szegedy et al. 2015, "Going Deeper with Convolutions", table 1, in the CIFAR form of HRank's public code: one 3x3
    convolution in front, batch norm, two 3x3 convolutions in place of 5x5, no auxiliary classifiers.

    Args:
        name: ``"googlenet"``.
        classes: Number of logits.
        shape: Input shape, (channels, height, width).
        width: Multiplier of every channel count, above 0.

    Raises:
        ModelError: The image is smaller than 4x4, or the width is not above 0.
    """
    require_size(name, shape, 4, "two max-poolings by 2")
    return initialize(GoogLeNet(classes, shape[0], width))
