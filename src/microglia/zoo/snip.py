"""The networks of SNIP's tables: AlexNet-s and -b, VGG-C, -D and -like for CIFAR."""

from __future__ import annotations

from torch import nn

from microglia.zoo.registry import Shape, initialize, register, require_size

_ALEXNET = ((96, 11), (256, 5), (384, 3), (384, 3), (256, 3))
"""(outputs, kernel) of each convolution; all have stride 2."""
_VGG = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""(outputs, convolutions) of each stage."""


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU()]


def _classifier(inputs: int, hidden: tuple[int, ...], classes: int) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Flatten()]
    for outputs in hidden:
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
        inputs = outputs
    return [*layers, nn.Linear(inputs, classes)]


@register("alexnet-s", "alexnet-b")
def alexnet(name: str, classes: int, shape: Shape) -> nn.Module:
    """Builds AlexNet-s or -b; 5,070,218 and 8,490,378 weights and biases on 3x32x32 with ten classes, norms apart.

    Five convolutions of stride 2, two hidden layers of 1024 (s) or 2048 (b) units, batch norm and ReLU behind each.
    (N, C, H, W) -> (N, classes) logits. The convolutions are padded by half their kernel on both sides; TensorFlow, where the
    paper's code runs, pads the far side by one pixel more.

    Source: Lee et al. 2019, "SNIP", table 1, and its public code.
    """
    layers: list[nn.Module] = []
    inputs, height, width = shape
    for outputs, kernel in _ALEXNET:
        layers += _convolution(inputs, outputs, kernel, stride=2)
        inputs, height, width = outputs, (height + 1) // 2, (width + 1) // 2
    hidden = 1024 if name.endswith("-s") else 2048
    return initialize(nn.Sequential(*layers, *_classifier(inputs * height * width, (hidden, hidden), classes)))


@register("vgg-c", "vgg-d", "vgg-like")
def vgg(name: str, classes: int, shape: Shape) -> nn.Module:
    """Builds VGG-C, VGG-D or VGG-like with batch norm; 10.5, 15.2 and 15.0 million parameters on 3x32x32 with ten classes.

    The convolutions of VGG-16; C has 1x1 for the third of a stage. Behind them are two hidden layers of 512 units (C, D) or one
    (like). No dropout. (N, C, H, W) -> (N, classes) logits.

    Source: Lee et al. 2019, "SNIP", table 1, and its public code.

    Raises:
        ModelError: The image is smaller than 32x32.
    """
    require_size(name, shape, 32, "five max-poolings by 2")
    layers: list[nn.Module] = []
    inputs, height, width = shape
    for outputs, count in _VGG:
        for index in range(count):
            layers += _convolution(inputs, outputs, 1 if name == "vgg-c" and index == 2 else 3)
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
        height, width = height // 2, width // 2
    hidden = (512,) if name == "vgg-like" else (512, 512)
    return initialize(nn.Sequential(*layers, *_classifier(inputs * height * width, hidden, classes)))
