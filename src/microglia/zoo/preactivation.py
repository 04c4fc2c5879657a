"""ResNet-164 for CIFAR: pre-activation bottlenecks, the deep network of Network Slimming."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from microglia.zoo.registry import Shape, initialize, register, require_whole

EXPANSION = 4
"""Channels of a block's output for each channel of its 3x3 convolution."""


class Bottleneck(nn.Module):
    """BN-ReLU-conv three times, 1x1, 3x3 and 1x1, beside a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution of the block's input, as in the code of Network Slimming.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        same = (inputs, stride) == (outputs, 1)
        self.shortcut: nn.Module = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, 4 width, H / stride, W / stride), sizes rounded up."""
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        summed: Tensor = self.conv3(F.relu(self.bn3(y))) + self.shortcut(x)
        return summed


class PreActivationResNet(nn.Module):
    """3x3 convolution, three stages of bottlenecks, BN-ReLU, global average pooling, linear."""

    def __init__(self, blocks: int, width: int, classes: int, channels: int) -> None:
        super().__init__()

        def stage(inputs: int, own: int, stride: int) -> nn.Sequential:
            first = Bottleneck(inputs, own, stride)
            return nn.Sequential(first, *(Bottleneck(EXPANSION * own, own, 1) for _ in range(blocks - 1)))

        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(EXPANSION * width, 2 * width, 2)
        self.layer3 = stage(2 * EXPANSION * width, 4 * width, 2)
        self.bn = nn.BatchNorm2d(4 * EXPANSION * width)
        self.linear = nn.Linear(4 * EXPANSION * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, classes) logits."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: Tensor = self.linear(F.relu(self.bn(x)).mean((2, 3)))
        return logits


@register("resnet164")
def resnet164(name: str, classes: int, shape: Shape, *, blocks: int = 18, width: int = 16) -> nn.Module:
    """Builds the pre-activation ResNet-164, for any image size; 1,703,258 parameters on 3x32x32 with ten classes.

    The depth is 9 ``blocks`` + 2. Stages 2 and 3 halve the image.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", table 3; the shortcuts are those of the public code
    of Network Slimming (Liu et al. 2017), whose table rounds this count to 1.71 million.

    Args:
        name: ``"resnet164"``.
        classes: Number of logits.
        shape: Input shape, (channels, height, width); only the channels matter.
        blocks: Blocks in each of the three stages, at least 1.
        width: Channels of the 3x3 convolutions in the first stage, at least 1.

    Raises:
        ModelError: A number is not whole and above 0.
    """
    require_whole(name, blocks=blocks, width=width)
    return initialize(PreActivationResNet(blocks, width, classes, shape[0]))
