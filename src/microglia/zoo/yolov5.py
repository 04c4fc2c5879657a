"""YOLOv5 n, s, m, l and x: backbone and neck of C3 blocks, three maps of raw predictions.

Written from the published table of the architecture (v6.0 to v7.0). The names of modules are the numbers of that table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from microglia.zoo.registry import ModelError, Shape, register, require_size

STRIDES = (8, 16, 32)
"""Pixels of the input for each cell of the three maps."""
ANCHORS = (
    ((10.0, 13.0), (16.0, 30.0), (33.0, 23.0)),
    ((30.0, 61.0), (62.0, 45.0), (59.0, 119.0)),
    ((116.0, 90.0), (156.0, 198.0), (373.0, 326.0)),
)
"""(width, height) of the three anchors of each map, in pixels."""
SCALES = {"n": (0.33, 0.25), "s": (0.33, 0.50), "m": (0.67, 0.75), "l": (1.00, 1.00), "x": (1.33, 1.25)}
"""Size -> factors of depth and width."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU}
CONCATENATED = {12: 6, 16: 4, 19: 14, 22: 10}
"""Index of a concatenation -> index of the layer that joins the one before it."""
KEPT = (4, 6, 10, 14, 17, 20, 23)
"""Layers whose outputs are needed later."""
MAPS = (17, 20, 23)
"""Layers below the three heads."""
SMALLEST = 8
"""Widths are multiples of this."""


def autopad(kernel: int) -> int:
    """Returns the padding that keeps the size at stride 1."""
    return kernel // 2


class Unit(nn.Module):
    """Convolution without bias, batch norm, activation."""

    def __init__(
        self, inputs: int, outputs: int, activation: str, kernel: int = 1, stride: int = 1, *, padding: int | None = None
    ) -> None:
        super().__init__()
        around = autopad(kernel) if padding is None else padding
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, around, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.act = ACTIVATIONS[activation](inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 unit, perhaps beside a shortcut."""

    def __init__(self, width: int, activation: str, shortcut: bool) -> None:
        super().__init__()
        self.cv1 = Unit(width, width, activation)
        self.cv2 = Unit(width, width, activation, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, width, H, W) to the same shape."""
        y: Tensor = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y


class C3(nn.Module):
    """Two branches of half the width, bottlenecks in one of them, and a unit over both."""

    def __init__(self, inputs: int, outputs: int, activation: str, repeats: int, shortcut: bool) -> None:
        super().__init__()
        hidden = outputs // 2
        self.cv1 = Unit(inputs, hidden, activation)
        self.cv2 = Unit(inputs, hidden, activation)
        self.cv3 = Unit(2 * hidden, outputs, activation)
        self.m = nn.Sequential(*(Bottleneck(hidden, activation, shortcut) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H, W)."""
        y: Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))
        return y


class SPPF(nn.Module):
    """Three max-poolings in a row, concatenated with their input."""

    def __init__(self, inputs: int, outputs: int, activation: str) -> None:
        super().__init__()
        hidden = inputs // 2
        self.cv1 = Unit(inputs, hidden, activation)
        self.cv2 = Unit(4 * hidden, outputs, activation)
        self.m = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H, W)."""
        x = self.cv1(x)
        first = self.m(x)
        second = self.m(first)
        y: Tensor = self.cv2(torch.cat((x, first, second, self.m(second)), 1))
        return y


class Join(nn.Module):
    """Concatenation of two maps along channels."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Maps (N, a, H, W) and (N, b, H, W) to (N, a + b, H, W)."""
        return torch.cat((first, second), 1)


class YOLOv5(nn.Module):
    """The network; ``model`` has the layers 0 to 23 of the table, ``heads`` the last three convolutions.

    Args:
        depth: Factor of repeats.
        width: Factor of channels.
        classes: Number of classes.
        channels: Channels of the input.
        activation: ``silu`` or ``relu``.
        anchors: (width, height) in pixels, for each of the three maps.
    """

    anchors: Tensor

    def __init__(
        self,
        depth: float,
        width: float,
        classes: int,
        channels: int,
        activation: str,
        *,
        anchors: Sequence[Sequence[Sequence[float]]] = ANCHORS,
    ) -> None:
        super().__init__()
        self.classes = classes

        def wide(base: int) -> int:
            return math.ceil(base * width / SMALLEST) * SMALLEST

        self.model = layers(wide, lambda n: max(round(n * depth), 1), channels, activation)
        each = len(anchors[0]) * (classes + 5)
        self.heads = nn.ModuleList(nn.Conv2d(wide(base), each, 1) for base in (256, 512, 1024))
        stride = torch.tensor(STRIDES).float()
        self.register_buffer("anchors", torch.tensor(anchors, dtype=torch.float32) / stride[:, None, None])
        self._start_heads()

    @torch.no_grad()
    def _start_heads(self) -> None:
        """Starts the biases so that few cells hold an object, and classes are rare."""
        for head, stride in zip(self.heads, STRIDES, strict=True):
            if head.bias.is_meta:  # type: ignore[union-attr]
                return
            bias = head.bias.view(self.anchors.shape[1], -1)  # type: ignore[operator, union-attr, index]
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (self.classes - 0.99999))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps images (N, C, H, W) to three maps (N, anchors, H / stride, W / stride, 5 + classes) of raw logits.

        The last dimension has x, y, width, height, objectness, classes; see `microglia.tasks.yolo`.
        """
        kept: dict[int, Tensor] = {}
        for index, layer in enumerate(self.model):
            x = layer(x, kept[CONCATENATED[index]]) if index in CONCATENATED else layer(x)
            if index in KEPT:
                kept[index] = x
        first, second, third = (self._map(kept[place], head) for place, head in zip(MAPS, self.heads, strict=True))
        return first, second, third

    def _map(self, x: Tensor, head: nn.Module) -> Tensor:
        y: Tensor = head(x)
        batch, _, height, width = y.shape
        return y.view(batch, len(ANCHORS[0]), self.classes + 5, height, width).permute(0, 1, 3, 4, 2)


def layers(wide: Callable[[int], int], often: Callable[[int], int], channels: int, act: str) -> nn.ModuleList:
    """Returns the layers 0 to 23.

    Args:
        wide: Base channels -> channels.
        often: Base repeats -> repeats.
        channels: Channels of the input.
        act: Name of the activation.
    """
    w1, w2, w3, w4, w5 = (wide(base) for base in (64, 128, 256, 512, 1024))

    def c3(inputs: int, outputs: int, repeats: int, shortcut: bool = False) -> C3:
        return C3(inputs, outputs, act, often(repeats), shortcut)

    def up() -> nn.Module:
        return nn.Upsample(scale_factor=2, mode="nearest")

    return nn.ModuleList(
        (
            Unit(channels, w1, act, 6, 2, padding=2),
            Unit(w1, w2, act, 3, 2),
            c3(w2, w2, 3, True),
            Unit(w2, w3, act, 3, 2),
            c3(w3, w3, 6, True),
            Unit(w3, w4, act, 3, 2),
            c3(w4, w4, 9, True),
            Unit(w4, w5, act, 3, 2),
            c3(w5, w5, 3, True),
            SPPF(w5, w5, act),
            Unit(w5, w4, act),
            up(),
            Join(),
            c3(2 * w4, w4, 3),
            Unit(w4, w3, act),
            up(),
            Join(),
            c3(2 * w3, w3, 3),
            Unit(w3, w3, act, 3, 2),
            Join(),
            c3(2 * w3, w4, 3),
            Unit(w4, w4, act, 3, 2),
            Join(),
            c3(2 * w4, w5, 3),
        )
    )


@register(*(f"yolov5{size}" for size in SCALES), kind="detection")
def yolov5(name: str, classes: int, shape: Shape, *, activation: str = "silu", width: float | None = None) -> nn.Module:
    """Builds a YOLOv5; ``yolov5n`` has 1,872,157 parameters with 80 classes.

    The model maps (N, C, H, W) to three maps of raw logits: (N, 3, H / 8, W / 8, 5 + classes), and the same at 16 and 32.

    Args:
        name: ``yolov5n``, ``yolov5s``, ``yolov5m``, ``yolov5l`` or ``yolov5x``.
        classes: Number of classes.
        shape: Input shape, (channels, height, width); sides are multiples of 32.
        activation: ``silu`` as published, or ``relu``.
        width: Factor of channels instead of the name's own, for tests and small tasks.

    Raises:
        ModelError: The activation is unknown, or a side is no multiple of 32.
    """
    require_size(name, shape, STRIDES[-1], f"its last map has a stride of {STRIDES[-1]}")
    if any(side % STRIDES[-1] for side in shape[1:]):
        raise ModelError(
            f"The input {shape[1]}x{shape[2]} does not fit {name}: both sides are multiples of {STRIDES[-1]}, such as "
            f"{math.ceil(shape[1] / STRIDES[-1]) * STRIDES[-1]}x{math.ceil(shape[2] / STRIDES[-1]) * STRIDES[-1]}."
        )
    if activation not in ACTIVATIONS:
        raise ModelError(f"{name} takes for activation {' or '.join(ACTIVATIONS)}, not {activation!r}.")
    depth, usual = SCALES[name[-1]]
    if width is not None and not 0 < width <= 4:
        raise ModelError(f"{name} takes for width a factor in (0, 4], not {width!r}.")
    return YOLOv5(depth, usual if width is None else width, classes, shape[0], activation)
