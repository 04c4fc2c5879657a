"""Residual networks for CIFAR: ResNet-(6n+2) with parameter-free or projection shortcuts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from microglia.zoo.registry import Shape, initialize, register, require_whole

_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
_NAMES = [f"resnet{depth}{ending}" for ending in ("", "-projection") for depth in _DEPTHS]


class PadShortcut(nn.Module):
    """Shortcut without parameters ("option A"): keep every ``stride``-th pixel, fill the new channels with zeros.

    Half of the new channels go in front, as in the public checkpoints.
    """

    def __init__(self, added: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pad = (0, 0, 0, 0, added // 2, added - added // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C + added, H / stride, W / stride), sizes rounded up."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.pad)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if (inputs, stride) != (outputs, 1):
            self.shortcut = PadShortcut(outputs - inputs, stride)
            if projection:
                convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / stride, W / stride), sizes rounded up."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """3x3 convolution, three stages of blocks, global average pooling, linear."""

    def __init__(self, blocks: int, width: int, projection: bool, classes: int, channels: int) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            first = BasicBlock(inputs, outputs, stride, projection)
            return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, projection) for _ in range(blocks - 1)))

        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, classes) logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


@register(*_NAMES)
def resnet(name: str, classes: int, shape: Shape, *, width: int = 16) -> nn.Module:
    """Builds a CIFAR ResNet such as ``resnet20`` or ``resnet56-projection``, for any image size.

    The depth is 6n + 2 with n blocks in each of three stages of ``width``, 2 ``width`` and 4 ``width`` channels; stages
    2 and 3 halve the image. Depths 8 and 14 are not in the paper; they are for tutorials and tests. The plain names have
    parameter-free shortcuts and the parameter names of the public checkpoints; ``-projection`` puts a 1x1 convolution with
    batch norm where the shape changes. ``resnet32-projection`` with ``width=32`` is the ResNet-32 of the GraSP tables.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2, options A and B.

    Args:
        name: One of the registered names.
        classes: Number of logits.
        shape: Input shape, (channels, height, width); only the channels matter.
        width: Channels of the first stage, at least 1.

    Raises:
        ModelError: The width is not a whole number above 0.
    """
    require_whole(name, width=width)
    depth = int(name.removeprefix("resnet").removesuffix("-projection"))
    return initialize(ResNet((depth - 2) // 6, width, name.endswith("-projection"), classes, shape[0]))
