"""BiSeNet-v2 for semantic segmentation: a detail and a semantic branch, joined by guided aggregation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microglia.zoo.registry import ModelError, Shape, initialize, register, require_size, require_whole

POOLS = ("mean", "average-resize")
"""Forms of the global mean of the context embedding."""
EXPANSION = 6
"""Channels of the depthwise convolutions of the semantic branch, over those of their input."""
BOOSTED = (4, 8, 16, 32)
"""Strides of the maps with a booster head: stem and the three semantic stages."""


class ConvUnit(nn.Sequential):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )


def norm_conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Returns a convolution without bias and a batch norm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def depthwise_pointwise(channels: int) -> nn.Sequential:
    """Returns a depthwise 3x3 convolution with batch norm and a pointwise one."""
    return nn.Sequential(norm_conv(channels, channels, groups=channels), nn.Conv2d(channels, channels, 1, bias=False))


class Stem(nn.Module):
    """Reduces the image to a quarter by a convolution and by max-pooling side by side."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.first = ConvUnit(inputs, width, stride=2)
        self.left = nn.Sequential(ConvUnit(width, width // 2, 1), ConvUnit(width // 2, width, stride=2))
        self.right = nn.MaxPool2d(3, 2, 1)
        self.fuse = ConvUnit(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, width, H / 4, W / 4), sizes rounded up."""
        x = self.first(x)
        fused: Tensor = self.fuse(torch.cat([self.left(x), self.right(x)], 1))
        return fused


class Gather(nn.Module):
    """Gather-and-expansion layer with a shortcut: 3x3 convolution, depthwise 3x3 to six times the channels, 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = EXPANSION * channels
        self.conv = ConvUnit(channels, channels)
        self.depthwise = nn.Sequential(norm_conv(channels, wide, groups=channels), nn.ReLU())
        self.project = norm_conv(wide, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        return F.relu(self.project(self.depthwise(self.conv(x))) + x)


class GatherDown(nn.Module):
    """Gather-and-expansion layer that halves the map: two depthwise convolutions, and two convolutions in the shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        wide = EXPANSION * inputs
        self.conv = ConvUnit(inputs, inputs)
        self.down = norm_conv(inputs, wide, stride=2, groups=inputs)
        self.depthwise = nn.Sequential(norm_conv(wide, wide, groups=wide), nn.ReLU())
        self.project = norm_conv(wide, outputs, 1)
        self.shortcut = nn.Sequential(norm_conv(inputs, inputs, stride=2, groups=inputs), norm_conv(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / 2, W / 2), sizes rounded up."""
        return F.relu(self.project(self.depthwise(self.down(self.conv(x)))) + self.shortcut(x))


class Context(nn.Module):
    """Context embedding: the global mean, added to every place.

    ``average-resize`` is the variant of the SMART paper: average pooling over the height, then over the width, and a resize of
    the 1x1 map to the size of the input. The kernels are the input's size, so the function is the same.
    """

    def __init__(self, channels: int, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.norm = nn.BatchNorm2d(channels)
        self.conv = ConvUnit(channels, channels, 1)
        self.last = ConvUnit(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        mean = x.mean((2, 3), keepdim=True) if self.pool == "mean" else _pooled(x)
        vector = self._vector(mean)
        if self.pool == "average-resize":
            vector = F.interpolate(vector, size=x.shape[2:], mode="nearest")
        out: Tensor = self.last(vector + x)
        return out

    def _vector(self, mean: Tensor) -> Tensor:
        if not self.norm.training or len(mean) > 1:  # recalibration trains norms alone
            out: Tensor = self.conv(self.norm(mean))
            return out
        convolution, norm, _ = self.conv  # a last batch of one image: one value in each channel has no variance
        return F.relu(_by_running_statistics(norm, convolution(_by_running_statistics(self.norm, mean))))


def _by_running_statistics(norm: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(norm, nn.BatchNorm2d)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def _pooled(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    return F.avg_pool2d(F.avg_pool2d(x, (height, 1)), (1, width))


class Semantic(nn.Module):
    """Three stages of gather-and-expansion layers and the context embedding; it returns the map of every stage."""

    def __init__(self, stem: int, pool: str) -> None:
        super().__init__()
        wide = (2 * stem, 4 * stem, 8 * stem)
        self.stage3 = nn.Sequential(GatherDown(stem, wide[0]), Gather(wide[0]))
        self.stage4 = nn.Sequential(GatherDown(wide[0], wide[1]), Gather(wide[1]))
        self.stage5 = nn.Sequential(GatherDown(wide[1], wide[2]), *(Gather(wide[2]) for _ in range(3)))
        self.context = Context(wide[2], pool)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Maps the stem's output to the three stages' outputs, and that of the context embedding."""
        third = self.stage3(x)
        fourth = self.stage4(third)
        fifth = self.stage5(fourth)
        return third, fourth, fifth, self.context(fifth)


class Aggregation(nn.Module):
    """Guided aggregation: each branch gates the other one at its own resolution, then both are added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.detail_keep = depthwise_pointwise(channels)
        self.detail_down = nn.Sequential(norm_conv(channels, channels, stride=2), nn.AvgPool2d(3, 2, 1))
        self.semantic_up = norm_conv(channels, channels)
        self.semantic_keep = depthwise_pointwise(channels)
        self.last = ConvUnit(channels, channels)

    def forward(self, detail: Tensor, semantic: Tensor) -> Tensor:
        """Maps both branches' maps, at an eighth and a 32nd of the image, to one at an eighth."""
        size = detail.shape[2:]
        gate = torch.sigmoid(F.interpolate(self.semantic_up(semantic), size=size, mode="nearest"))
        coarse = self.detail_down(detail) * torch.sigmoid(self.semantic_keep(semantic))
        joined = self.detail_keep(detail) * gate + F.interpolate(coarse, size=size, mode="nearest")
        out: Tensor = self.last(joined)
        return out


class SegmentHead(nn.Module):
    """Head that maps features to logits at the image's size; a booster head has one more convolution at twice the size."""

    def __init__(self, inputs: int, middle: int, classes: int, boosted: int = 0) -> None:
        super().__init__()
        self.conv = ConvUnit(inputs, middle)
        self.dropout = nn.Dropout(0.1)
        self.boost = ConvUnit(middle, boosted**2) if boosted else None
        self.classifier = nn.Conv2d(boosted**2 if boosted else middle, classes, 1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """Maps (N, inputs, h, w) to (N, classes, *size) logits."""
        x = self.dropout(self.conv(x))
        if self.boost is not None:
            x = self.boost(F.interpolate(x, scale_factor=2, mode="nearest"))
        return F.interpolate(self.classifier(x), size=size, mode="bilinear", align_corners=False)


class BiSeNetV2(nn.Module):
    """BiSeNet-v2; in training it also returns the logits of its booster heads.

    Attributes:
        auxiliary: Parts that only training uses; pruning, counts and cut models leave them out.
        heads: Parts that public recipes train at ten times the learning rate.
    """

    auxiliary = ("boosters",)
    heads = ("head", "boosters")

    def __init__(self, classes: int, inputs: int, width: int, pool: str, boosters: bool) -> None:
        super().__init__()
        stem, joined = width // 4, 2 * width
        self.detail = nn.Sequential(
            ConvUnit(inputs, width, stride=2), ConvUnit(width, width),
            ConvUnit(width, width, stride=2), ConvUnit(width, width), ConvUnit(width, width),
            ConvUnit(width, joined, stride=2), ConvUnit(joined, joined), ConvUnit(joined, joined),
        )  # fmt: skip
        self.stem = Stem(inputs, stem)
        self.semantic = Semantic(stem, pool)
        self.aggregation = Aggregation(joined)
        self.head = SegmentHead(joined, 8 * joined, classes)
        made = [SegmentHead(c, joined, classes, f) for c, f in zip((stem, 2 * stem, 4 * stem, joined), BOOSTED, strict=True)]
        self.boosters = nn.ModuleList(made if boosters else ())

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Maps (N, C, H, W) to (N, classes, H, W) logits; in training with boosters to a tuple, the main logits first."""
        size = x.shape[2:]
        stem = self.stem(x)
        third, fourth, fifth, semantic = self.semantic(stem)
        main: Tensor = self.head(self.aggregation(self.detail(x), semantic), size)
        if not self.training or not len(self.boosters):
            return main
        maps = (stem, third, fourth, fifth)
        return (main, *(head(one, size) for head, one in zip(self.boosters, maps, strict=True)))


@register("bisenetv2", kind="segmentation")
def bisenetv2(
    name: str, classes: int, shape: Shape, *, width: int = 64, pool: str = "mean", boosters: bool = True
) -> nn.Module:
    """Builds BiSeNet-v2; with 19 classes 5,231,487 parameters in training and 3,358,627 without the booster heads.

    The ReLU behind the last convolution of the aggregation, the batch norm in the context embedding and the ReLU of the
    expanding depthwise convolution are those of the public re-implementation; the paper has none there. The last batch norm of
    every gather-and-expansion layer starts at 0.

    Source: Yu et al. 2021, "BiSeNet V2: Bilateral Network with Guided Aggregation for Real-time Semantic Segmentation".

    Args:
        name: ``"bisenetv2"``.
        classes: Number of logits of every pixel.
        shape: Input shape, (channels, height, width), at least 32x32; any size works, multiples of 32 fit without rounding.
        width: Channels of the first convolution of the detail branch, a multiple of 8; 64 in the paper.
        pool: ``mean``, or ``average-resize``: the same function through two average poolings and a resize, as the SMART paper
            describes its network.
        boosters: Whether the four booster heads are built, which only training uses.

    Raises:
        ModelError: The image is too small, the width is no multiple of 8, or the pool is unknown.
    """
    require_size(name, shape, 32, "five halvings")
    require_whole(name, width=width)
    if width % 8:
        raise ModelError(f"{name} takes for width a multiple of 8, not {width}.")
    if pool not in POOLS:
        raise ModelError(f"{name} takes for pool {' or '.join(POOLS)}, not {pool!r}.")
    model = initialize(BiSeNetV2(classes, shape[0], width, pool, boosters))
    for module in model.modules():
        if isinstance(module, Gather | GatherDown):
            nn.init.zeros_(module.project[1].weight)  # type: ignore[arg-type]
    return model
