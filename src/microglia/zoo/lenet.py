"""LeNet-300-100 and LeNet-5 in the form of Caffe: the two small networks of Deep Compression and the lottery ticket."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from microglia.zoo.registry import Shape, initialize, register, require_size


class LeNet300100(nn.Module):
    """Input -> 300 -> 100 -> classes with ReLU between."""

    def __init__(self, classes: int, shape: Shape) -> None:
        super().__init__()
        channels, height, width = shape
        self.fc1 = nn.Linear(channels * height * width, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, classes) logits."""
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


class LeNet5(nn.Module):
    """conv 5x5, 20 - pool - conv 5x5, 50 - pool - 500 - classes, ReLU between."""

    def __init__(self, classes: int, shape: Shape) -> None:
        super().__init__()
        channels, *sides = shape
        padding = 0 if min(sides) >= 16 else 2  # without padding, 16 pixels are the minimum that leaves one after two pools
        shrink = 4 - 2 * padding
        height, width = (((side - shrink) // 2 - shrink) // 2 for side in sides)
        self.conv1 = nn.Conv2d(channels, 20, 5, padding=padding)
        self.conv2 = nn.Conv2d(20, 50, 5, padding=padding)
        self.fc1 = nn.Linear(50 * height * width, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, classes) logits."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits


@register("lenet-300-100")
def lenet_300_100(name: str, classes: int, shape: Shape) -> nn.Module:
    """Builds LeNet-300-100; 266,610 parameters on 1x28x28 with ten classes.

    Source: LeCun et al. 1998, "Gradient-based learning applied to document recognition".
    """
    return LeNet300100(classes, shape)


@register("lenet-5")
def lenet_5(name: str, classes: int, shape: Shape) -> nn.Module:
    """Builds LeNet-5 as Caffe ships it; 431,080 parameters on 1x28x28 with ten classes.

    The first linear layer has the size of the convolutions' output for ``shape``. Below 16 pixels a side the convolutions are
    padded by 2, so that 4 pixels suffice. Both convolutions are followed by ReLU, as in the pruning papers.

    Source: Caffe's MNIST example; Han et al. 2016, "Deep Compression", table 3 (430,500 weights).

    Raises:
        ModelError: The image is smaller than 4x4.
    """
    require_size(name, shape, 4, "two poolings by 2")
    return initialize(LeNet5(classes, shape))
