"""Random convolutions in 8 bits against exact sums of the whole weight; for `kernel_matrix.py`."""

import math

import torch
from torch.nn import functional as F

from microglia.runtime.int8.layout import dense_of_quads, to_quads, to_tiles
from microglia.runtime.sparse_layers.layout import one_group

ZEROS = (0, 0, 128, 37, 255)
PLANES = ((1, 1, 1, 7), (1, 3, 1, 9), (2, 3, 5, 5), (1, 3, 9, 23), (3, 4, 3, 8), (2, 2, 31, 7), (1, 1, 6, 6), (2, 5, 4, 4))


def whole(draw, low, high, shape):
    return torch.randint(low, high + 1, shape, generator=draw.generator)


def laid_out(draw, x):
    """Returns the same numbers in another layout: contiguous, channels last, or a slice of more."""
    how = draw.one(("contiguous", "channels last", "slice"))
    if how == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    return torch.cat([x, x], 1)[:, : x.shape[1]] if how == "slice" else x


def wrong(draw, site):
    """Draws numbers for a convolution of this geometry; returns what is wrong with the result, None if nothing is."""
    dense = one_group(site.weight, site.groups)
    largest = draw.one((127, 127, 64))
    weight = (whole(draw, -largest, largest, dense.shape) * (dense != 0)).to(torch.int8)
    weight[0, 0, 0, 0] = draw.one((-128, 0))
    places = draw.one((to_quads, to_tiles))(weight)
    if not torch.equal(dense_of_quads(places, *weight.shape[:2], weight.shape[2:]), weight.double()):
        return "it holds another weight"
    x = laid_out(
        draw, draw.one((whole(draw, 0, 255, site.input_shape), 255 * whole(draw, 0, 1, site.input_shape))).to(torch.uint8)
    )
    zero, wide = draw.one(ZEROS), draw.one((False, True))
    outputs = len(weight)
    signed, geometry = x.double() - zero, (site.stride, site.padding, site.dilation)
    sums = F.conv2d(signed, weight.double(), None, *geometry)
    if sums.abs().max() >= 2**31:
        return "the reference overflows"
    scale = (torch.rand(outputs, generator=draw.generator) + 0.1) * 150 / (float(sums.abs().max()) + 1)
    bias = draw.tensor(outputs) * 40 + 100
    bounds = (
        draw.one(((0.0, 255.0), (60.0, 255.0), (20.0, 199.5))) if not wide else draw.one(((-torch.inf, torch.inf), (0.0, 6.0)))
    )
    residual, other = None, 1.0
    if site.residual:
        residual = draw.tensor(*sums.shape) if wide else whole(draw, 0, 255, sums.shape).to(torch.uint8)
        residual, other = laid_out(draw, residual), draw.one((0.25, 0.7301, -1.3))
    padded = [F.pad(numbers, (0, -outputs % 16)) for numbers in (-zero * weight.flatten(1).int().sum(1), scale, bias)]
    start, rest = padded[0].int(), (residual, other, *bounds, zero, wide, outputs)
    given = [list(weight.shape[2:]), *map(list, geometry)]
    got = torch.ops.microglia.int8_conv2d(x, *places, start, *padded[1:], *rest, *given)
    rows = [numbers.double()[:, None, None] for numbers in (scale, bias)]
    expected = (sums.float().double() * rows[0] + rows[1]).float()
    if residual is not None:
        expected = (residual.double() * float(torch.tensor(other)) + expected.double()).float()
    expected = expected.clamp(*bounds)
    expected = expected if wide else expected.round().to(torch.uint8)
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        return f"{tuple(got.shape)} {got.dtype} instead of {tuple(expected.shape)} {expected.dtype}"
    return None if torch.equal(got, expected) else f"{int((got != expected).sum())} of {got.numel()} outputs differ"


def wrongly_pooled(draw):
    """Draws an image and windows; returns what is wrong with their maximum."""
    x = laid_out(draw, whole(draw, 0, 255, (draw.one((1, 3)), draw.one((1, 16, 40)), 9, 14)).to(torch.uint8))
    kernel, stride, padding = draw.one((([3, 3], [2, 2], [1, 1]), ([2, 2], [2, 2], [0, 0]), ([3, 2], [1, 3], [1, 0])))
    got = torch.ops.microglia.int8_max_pool2d(x, kernel, stride, padding)
    return None if torch.equal(got.float(), F.max_pool2d(x.float(), kernel, stride, padding)) else "another maximum"


def wrongly_quantized(draw):
    """Draws numbers of every kind, in a row and in an image; returns what is wrong with their rounding to 8 bits."""
    edges = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45, 0.5, 1.5, 2.5, 254.5, 255.5])
    shape = draw.one(PLANES)
    row = torch.cat([edges, draw.tensor(500 + draw.one(range(40))) * 90])
    mixed = row[torch.randperm(len(row), generator=draw.generator)].repeat(3)
    for x in (row, laid_out(draw, mixed[: math.prod(shape)].reshape(shape))):
        scale, zero = draw.one((1.0, 1.0, 0.7301, 1 / 3)), draw.one((0.0, 128.0))
        expected = x * torch.tensor(scale) + torch.tensor(zero)
        expected = expected.nan_to_num(0.0, torch.inf, -torch.inf).clamp(0, 255).round().to(torch.uint8)
        got = torch.ops.microglia.quantize(x, scale, zero)
        if not torch.equal(got, expected):
            return f"another rounding of {tuple(x.shape)}"
        if not got.is_contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format):
            return f"another layout of {tuple(x.shape)}"
    return None
