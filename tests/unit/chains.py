"""Random chains of block convolutions, and what they should give in float64."""

import torch
from torch.nn import functional as F

from microglia.runtime import BlockChain, BlockConv2d, Link
from microglia.runtime.dense.fusion import Activation, Site

ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu, "relu6": F.relu6, "silu": F.silu}
KERNELS = ((1, 1), (3, 3), (1, 1), (3, 3), (5, 1), (2, 4), (1, 9))


def site(draw, x, outputs):
    """Draws a layer that reads images like ``x``, that has an output."""
    while True:
        kernel, stride = draw.one(KERNELS), draw.one(((1, 1), (1, 1), (1, 1), (2, 2), (1, 2)))
        padding = draw.one((tuple(size // 2 for size in kernel), tuple(size // 2 for size in kernel), (0, 0), (3, 1)))
        dilation = draw.one(((1, 1), (1, 1), (1, 1), (2, 3)))
        sizes = zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
        space = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in sizes]
        if min(space) > 0:
            break
    weight = draw.weight(outputs, x.shape[1], *kernel)
    bias, activation = draw.one((None, draw.tensor(outputs))), Activation(draw.one(tuple(ACTIVATIONS)))
    shapes = tuple(x.shape), (len(x), outputs, *space)
    return Site("c", "conv2d", weight, bias, *shapes, activation, False, stride, padding, dilation)


def step(layer, x, other):
    """Returns a layer's result in float64, and how large what was summed up in it is, errors of its input included."""
    values, size = x
    settings = (layer.stride, layer.padding, layer.dilation)
    w = layer.weight.double()
    bias = torch.zeros(len(w)).double() if layer.bias is None else layer.bias.double()
    rest, rest_size = (torch.zeros(()).double(),) * 2 if other is None else other
    exact = F.conv2d(values, w, bias, *settings) + rest
    return ACTIVATIONS[layer.activation.name](exact), F.conv2d(size, w.abs(), bias.abs(), *settings) + rest_size


def chain(draw):
    """Draws a chain; returns it with its images, the results that go out in float64, and their sizes."""
    batch, side = draw.one((1, 1, 2, 9)), draw.one(((7, 7), (14, 14), (1, 1), (5, 9), (28, 9), (1, 60)))
    images = [draw.laid_out(draw.tensor(batch, draw.one((3, 16, 17, 40)), *side)) for _ in range(draw.one((1, 1, 2)))]
    known = [(x.double(), x.double().abs()) for x in images]
    links, out = [], []
    count = draw.one((1, 2, 3, 5, 8))
    for index in range(count):
        source = draw.one(range(max(0, len(known) - 3), len(known)))
        layer = site(draw, known[source][0], draw.one((1, 15, 16, 17, 33, 48)))
        same = [k for k, (value, _) in enumerate(known) if value.shape == layer.output_shape]
        if not same and draw.one((True, False)):  # most shapes meet no other: take one that exists, kept by a 3x3
            keep = draw.one(range(len(known)))
            source, x = keep, known[keep][0]
            weight = draw.weight(x.shape[1], x.shape[1], 3, 3)
            layer = Site("c", "conv2d", weight, None, tuple(x.shape), tuple(x.shape), Activation("relu"), padding=(1, 1))
            same = [keep]
        other = draw.one((None, *same)) if same else None
        known.append(step(layer, known[source], None if other is None else known[other]))
        goes_out = index == count - 1 or draw.one((False, False, False, True))
        links.append(Link(BlockConv2d.of(layer, draw.one((1, 2, 4, 8))), source, other, goes_out))
        out += [known[-1]] if goes_out else []
    return BlockChain(links, len(images)), images, out


def wrong(draw):
    """Draws a chain; returns what is wrong with its results, None if nothing is."""
    module, images, expected = chain(draw)
    got = module(*images)
    if [tuple(y.shape) for y in got] != [tuple(y.shape) for y, _ in expected]:
        return "other shapes"
    off = [((y.double() - exact).abs() / (size + 1e-3)).max() for y, (exact, size) in zip(got, expected, strict=True)]
    worst = float(torch.stack(off).max())  # not a number where one of them is none
    return None if worst < 3e-6 else f"off by {worst:.1e} of the summed magnitudes: {module.program}"
