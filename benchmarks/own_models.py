"""Small networks written for the coverage benchmark: what the model libraries leave out."""
# ruff: noqa: D102

import torch
from torch import Tensor, nn
from torch.nn import functional


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


class PartialStage(nn.Module):
    """Cross-stage partial block of YOLOv8: half of the channels go through bottlenecks, and every step is concatenated."""

    def __init__(self, inputs: int, outputs: int, depth: int, shortcut: bool) -> None:
        super().__init__()
        width = outputs // 2
        self.first = convolution(inputs, outputs, 1)
        self.blocks = nn.ModuleList(nn.Sequential(convolution(width, width), convolution(width, width)) for _ in range(depth))
        self.last = convolution((2 + depth) * width, outputs, 1)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            new = block(parts[-1])
            parts.append(parts[-1] + new if self.shortcut else new)
        return self.last(torch.cat(parts, 1))


class PyramidPool(nn.Module):
    """Spatial pyramid pooling, fast: three poolings in a row, concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = convolution(width, width // 2, 1), convolution(2 * width, width, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """A YOLOv8 in small: chunk, split, concatenations, upsampling, and a head with a distribution over box edges."""

    def __init__(self, classes: int = 20, width: int = 16, bins: int = 8) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(convolution(3, w, 3, 2), convolution(w, 2 * w, 3, 2), PartialStage(2 * w, 2 * w, 1, True))
        self.middle = nn.Sequential(convolution(2 * w, 4 * w, 3, 2), PartialStage(4 * w, 4 * w, 2, True))
        self.deep = nn.Sequential(convolution(4 * w, 8 * w, 3, 2), PartialStage(8 * w, 8 * w, 1, True), PyramidPool(8 * w))
        self.up, self.down = PartialStage(12 * w, 4 * w, 1, False), convolution(4 * w, 4 * w, 3, 2)
        self.end = PartialStage(12 * w, 8 * w, 1, False)
        self.boxes = nn.ModuleList(nn.Sequential(convolution(c, 32), nn.Conv2d(32, 4 * bins, 1)) for c in (4 * w, 8 * w))
        self.labels = nn.ModuleList(nn.Sequential(convolution(c, 32), nn.Conv2d(32, classes, 1)) for c in (4 * w, 8 * w))
        self.classes, self.bins = classes, bins
        self.register_buffer("edges", torch.arange(bins, dtype=torch.get_default_dtype()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.middle(self.stem(x))
        deep = self.deep(middle)
        up = self.up(torch.cat([functional.interpolate(deep, scale_factor=2.0), middle], 1))
        levels = [up, self.end(torch.cat([self.down(up), deep], 1))]
        heads = zip(levels, self.boxes, self.labels, strict=True)
        flat = torch.cat([torch.cat([box(y), label(y)], 1).flatten(2) for y, box, label in heads], 2)
        boxes, labels = flat.split((4 * self.bins, self.classes), 1)
        chances = boxes.view(x.shape[0], 4, self.bins, -1).softmax(2)
        return (chances * self.edges.view(1, 1, -1, 1)).sum(2), labels.sigmoid()


class UNet(nn.Module):
    """Encoder and decoder with concatenated skips and transposed convolutions."""

    def __init__(self, classes: int = 21, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        sizes = [width * 2**i for i in range(depth + 1)]
        self.inner = nn.ModuleList(self.block(a, b) for a, b in zip([3, *sizes[:-1]], sizes, strict=True))
        pairs = list(zip(sizes[1:], sizes[:-1], strict=True))[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.outer = nn.ModuleList(self.block(2 * b, b) for _, b in pairs)
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(convolution(inputs, outputs), convolution(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for block in self.inner:
            x = block(functional.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for up, block, skip in zip(self.up, self.outer, skips[-2::-1], strict=True):
            x = block(torch.cat([skip, up(x)], 1))
        return self.head(x)


class ShuffleNet(nn.Module):
    """Grouped 1x1 convolutions and channel shuffles, with a group count that does not divide evenly into powers of two."""

    def __init__(self, classes: int = 1000, groups: int = 3, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        self.groups = groups
        self.stem = convolution(3, width, 3, 2)
        self.narrow = nn.ModuleList(convolution(width, width // 2, 1, groups=groups) for _ in range(depth))
        self.depthwise = nn.ModuleList(convolution(width // 2, width // 2, groups=width // 2) for _ in range(depth))
        self.widen = nn.ModuleList(convolution(width // 2, width, 1, groups=groups) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def shuffle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for narrow, depthwise, widen in zip(self.narrow, self.depthwise, self.widen, strict=True):
            x = x + widen(depthwise(self.shuffle(narrow(x))))
        return self.head(x.mean((2, 3)))


class Tagger(nn.Module):
    """Embedding, a recurrent net, and one label per word."""

    def __init__(self, kind: str = "LSTM", bidirectional: bool = True, layers: int = 2, labels: int = 17) -> None:
        super().__init__()
        self.words = nn.Embedding(200, 32)
        self.memory = getattr(nn, kind)(32, 48, layers, batch_first=True, bidirectional=bidirectional)
        self.hidden = nn.Linear(96 if bidirectional else 48, 64)
        self.labels = nn.Linear(64, labels)

    def forward(self, words: Tensor) -> Tensor:
        return self.labels(torch.relu(self.hidden(self.memory(self.words(words))[0])))


class SuperResolution(nn.Module):
    """Residual blocks and pixel shuffles (sub-pixel convolution)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(convolution(width, width), nn.Conv2d(width, width, 1)) for _ in range(2))
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(width))
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(self.up(x))


def video_net(classes: int = 10) -> nn.Sequential:
    """3-d convolutions with batch and group norms."""
    first = (nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d(2))
    second = (nn.Conv3d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.AdaptiveAvgPool3d(1))
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32, classes))


def audio_net(classes: int = 10) -> nn.Sequential:
    """1-d convolutions, one of them depthwise, with a gate."""
    first = (nn.Conv1d(1, 32, 9, 4), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 32, 5, groups=32), nn.BatchNorm1d(32))
    second = (nn.Conv1d(32, 64, 1), nn.GLU(1), nn.Conv1d(32, 48, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool1d(1))
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(48, classes))
