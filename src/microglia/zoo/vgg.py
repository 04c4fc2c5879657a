"""VGG-16 and VGG-19 with batch norm for CIFAR."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from microglia.zoo.registry import ModelError, Shape, initialize, register, require_size

_STAGES = {"vgg16-bn": (2, 2, 3, 3, 3), "vgg19-bn": (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Stages of conv-BN-ReLU with max-pooling between, average pooling to 1x1, classifier."""

    def __init__(self, features: nn.Sequential, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, classes) logits."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


@register("vgg16-bn", "vgg19-bn")
def vgg(name: str, classes: int, shape: Shape, *, hidden: bool | Literal["norm"] = False, conv_bias: bool = False) -> nn.Module:
    """Builds VGG-16 or VGG-19 with batch norm; 14,724,042 and 20,035,018 parameters on 3x32x32 with ten classes.

    Source: Simonyan and Zisserman 2015, configurations D and E, in the CIFAR form of Network Slimming (Liu et al. 2017)
    and SNIP: one linear layer 512 -> classes, no dropout.

    Args:
        name: ``"vgg16-bn"`` or ``"vgg19-bn"``.
        classes: Number of logits.
        shape: Input shape, (channels, height, width).
        hidden: True adds a linear layer 512 -> 512 with ReLU before the classifier (VGG-16: 14,986,698 parameters),
            ``"norm"`` puts batch norm after that layer.
        conv_bias: Convolutions with bias. With ``hidden="norm"`` this is the VGG-16 of HRank, 14,991,946 parameters.

    Raises:
        ModelError: The image is smaller than 16x16, or ``hidden`` has another value.
    """
    require_size(name, shape, 16, "four max-poolings by 2")
    if hidden not in (True, False, "norm"):
        raise ModelError(f"{name} takes hidden=True, False or 'norm', not {hidden!r}.")
    features: list[nn.Module] = []
    inputs = shape[0]
    for stage, (depth, outputs) in enumerate(zip(_STAGES[name], (64, 128, 256, 512, 512), strict=True)):
        if stage:
            features.append(nn.MaxPool2d(2))
        for _ in range(depth):
            features += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=conv_bias), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
    norm = [nn.BatchNorm1d(512)] if hidden == "norm" else []
    before = [nn.Linear(512, 512), *norm, nn.ReLU()] if hidden else []
    classifier = nn.Linear(512, classes)
    return initialize(VGG(nn.Sequential(*features), nn.Sequential(*before, classifier) if before else classifier))
