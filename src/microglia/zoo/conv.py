"""Conv-2, Conv-4 and Conv-6: the scaled-down VGGs of the lottery ticket hypothesis."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from microglia.zoo.registry import Shape, initialize, register, require_size


@register("conv-2", "conv-4", "conv-6")
def conv(name: str, classes: int, shape: Shape) -> nn.Module:
    """Builds Conv-2, -4 or -6; Conv-6 has 2,262,602 parameters on 3x32x32 with ten classes.

    Pairs of padded 3x3 convolutions of 64, 128 and 256 channels, each pair followed by 2x2 max-pooling, then
    256 - 256 - classes with ReLU between. No normalization. (N, C, H, W) -> (N, classes) logits.

    Source: Frankle and Carbin 2019, "The Lottery Ticket Hypothesis", figure 2.

    Raises:
        ModelError: The image is smaller than 2^pairs pixels a side.
    """
    pairs = int(name[-1]) // 2
    require_size(name, shape, 2**pairs, f"{pairs} max-pooling{'s' * (pairs > 1)} by 2")
    features: list[nn.Module] = []
    inputs, height, width = shape
    for outputs in (64, 128, 256)[:pairs]:
        features += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        features += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        inputs, height, width = outputs, height // 2, width // 2
    hidden = [nn.Linear(inputs * height * width, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    parts = {"features": nn.Sequential(*features), "flatten": nn.Flatten()}
    classifier = nn.Sequential(*hidden, nn.Linear(256, classes))
    model = nn.Sequential(OrderedDict(parts, classifier=classifier))
    return initialize(model)
