"""MobileNet v1 and v2 with the strides of CIFAR, or with those of the papers."""

from __future__ import annotations

from torch import Tensor, nn

from microglia.zoo.registry import Shape, initialize, register

_V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
"""(outputs, stride) of each depthwise-separable block: table 1 of the paper, its last stride read as 1."""

_V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""(t, c, n, s) of each stage, table 2 of the paper: expansion, outputs, blocks, stride of the first block."""


def _convolution(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, activation: type[nn.Module] = nn.ReLU6
) -> nn.Sequential:
    """Returns conv-BN-activation with the padding that keeps the size at stride 1."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), activation())


def _widen(channels: int, factor: float) -> int:
    """Returns the nearest multiple of 8 to ``channels * factor`` that loses no more than a tenth, at least 8."""
    if factor <= 0:
        raise ValueError(f"width is above 0; got {factor}")
    wanted = channels * factor
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class InvertedResidual(nn.Module):
    """Expand 1x1, filter 3x3 depthwise, project 1x1."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [_convolution(inputs, hidden, 1)] if expansion != 1 else []
        project = _convolution(hidden, outputs, 1, activation=nn.Identity)
        self.conv = nn.Sequential(*expand, _convolution(hidden, hidden, 3, stride=stride, groups=hidden), project)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / stride, W / stride), sizes rounded up."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """Features, global average pooling, dropout, linear."""

    def __init__(self, features: nn.Sequential, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.features = features
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, classes) logits."""
        x = self.features(x)
        logits: Tensor = self.linear(self.dropout(x.mean((2, 3))))
        return logits


@register("mobilenet-v1")
def mobilenet_v1(
    name: str,
    classes: int,
    shape: Shape,
    *,
    width: float = 1.0,
    dropout: float = 0.0,
    imagenet_strides: bool = False,
) -> nn.Module:
    """Builds MobileNet v1 for any image size; 3,217,226 parameters with ten classes, 4,231,976 with a thousand.

    Source: Howard et al. 2017, "MobileNets", table 1.

    Args:
        name: ``"mobilenet-v1"``.
        classes: Number of logits.
        shape: Input shape, (channels, height, width); only the channels matter.
        width: Multiplier of every channel count (alpha of the paper), above 0.
        dropout: Probability of dropping before the classifier, in [0, 1].
        imagenet_strides: True halves the image in the first convolution too, as in the paper (by 32 in all); False does not (by
            16 in all), the usual form for CIFAR.
    """
    inputs = _widen(32, width)
    blocks: list[nn.Module] = [_convolution(shape[0], inputs, 3, stride=1 + imagenet_strides, activation=nn.ReLU)]
    for channels, stride in _V1:
        outputs = _widen(channels, width)
        depthwise = _convolution(inputs, inputs, 3, stride=stride, groups=inputs, activation=nn.ReLU)
        blocks.append(nn.Sequential(depthwise, _convolution(inputs, outputs, 1, activation=nn.ReLU)))
        inputs = outputs
    return initialize(MobileNet(nn.Sequential(*blocks), inputs, classes, dropout))


@register("mobilenet-v2")
def mobilenet_v2(
    name: str,
    classes: int,
    shape: Shape,
    *,
    width: float = 1.0,
    dropout: float = 0.0,
    imagenet_strides: bool = False,
) -> nn.Module:
    """Builds MobileNet v2 for any image size; 2,236,682 parameters with ten classes, 3,504,872 with a thousand.

    Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", table 2.

    Args:
        name: ``"mobilenet-v2"``.
        classes: Number of logits.
        shape: Input shape, (channels, height, width); only the channels matter.
        width: Multiplier of every channel count, above 0; the last convolution never gets fewer than 1280.
        dropout: Probability of dropping before the classifier, in [0, 1]; torchvision has 0.2.
        imagenet_strides: True halves the image in the first convolution and in the 24-channel stage, as in the paper (by 32 in
            all); False does neither (by 8 in all), the usual form for CIFAR.
    """
    inputs = _widen(32, width)
    blocks: list[nn.Module] = [_convolution(shape[0], inputs, 3, stride=1 + imagenet_strides)]
    for expansion, channels, count, first in _V2:
        outputs = _widen(channels, width)
        for index in range(count):
            stride = first if index == 0 and (imagenet_strides or channels != 24) else 1
            blocks.append(InvertedResidual(inputs, outputs, stride, expansion))
            inputs = outputs
    last = _widen(1280, max(1.0, width))
    return initialize(MobileNet(nn.Sequential(*blocks, _convolution(inputs, last, 1)), last, classes, dropout))
