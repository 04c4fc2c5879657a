"""Random problems through every sparse operator against dense float64; a script, for a process has one level of kernels.

In bfloat16 inputs, residual and weights are rounded first: what is left to differ are sums in float32 and one rounding.

Prints one JSON object: the level, the number of problems, and those whose result was wrong.
"""

import json
import sys
from dataclasses import replace

import chains
import quads
import torch
from torch.nn import functional as F

import microglia.runtime.int8.operators  # noqa: F401  # defines the operators
from microglia.runtime import BlockConv2d, BlockLinear, RowConv2d, level
from microglia.runtime.dense.fusion import Activation, Site
from microglia.runtime.sparse_layers.layout import every_block, one_group, to_blocks

ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu, "relu6": F.relu6, "silu": F.silu}
OUTPUTS, INPUTS = (1, 15, 16, 17, 33, 64), (1, 3, 8, 16, 17, 40, 48)
KERNELS = ((1, 1), (3, 3), (1, 1), (3, 3), (5, 1), (7, 7), (2, 4))
SIDES = ((7, 7), (14, 14), (1, 1), (5, 9), (8, 8), (3, 30), (28, 9))
DENSITIES = (0.0, 0.05, 0.3, 0.3, 1.0)


class Draw:
    """One random problem after the other, all from one seed."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def one(self, choices):
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def tensor(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def weight(self, *shape):
        """Returns a weight, unstructured or in stripes of 16 or of 4 with some of them empty."""
        tall, density = self.one((1, 4, 16)), self.one(DENSITIES)
        kept = torch.rand(-(-shape[0] // tall), *shape[1:], generator=self.generator) < density
        return self.tensor(*shape) * kept.repeat_interleave(tall, 0)[: shape[0]]

    def laid_out(self, x):
        """Returns the same values in another layout: contiguous, channels last, a slice of more, or expanded."""
        how = self.one(("contiguous", "channels last", "slice", "transposed"))
        if how == "channels last":
            return x.contiguous(memory_format=torch.channels_last)
        if how == "slice":
            return torch.cat([x, x], 1)[:, : x.shape[1]]
        return x.transpose(2, 3).contiguous().transpose(2, 3) if how == "transposed" else x


def convolution(draw):
    """Draws a convolution that has an output; returns it with its input and residual."""
    while True:
        kernel, side, stride = draw.one(KERNELS), draw.one(SIDES), draw.one(((1, 1), (1, 1), (2, 2), (3, 1)))
        padding, dilation = (
            draw.one(((0, 0), (1, 1), (kernel[0] // 2, kernel[1] // 2), (3, 4))),
            draw.one(((1, 1), (1, 1), (2, 3))),
        )
        sides = zip(side, padding, dilation, kernel, stride, strict=True)
        space = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, p, d, k, t in sides]
        if min(space) > 0:
            break
    groups = draw.one((1, 1, 1, 2))
    outputs, inputs = (draw.one(sizes) * groups for sizes in (OUTPUTS, INPUTS))
    weight = draw.weight(outputs, inputs // groups, *kernel)
    bias = draw.one((None, draw.tensor(outputs)))
    batch = draw.one((1, 1, 3))
    x = draw.laid_out(draw.tensor(batch, inputs, *side))
    other = draw.one((None, draw.laid_out(draw.tensor(batch, outputs, *space))))
    activation = Activation(draw.one(tuple(ACTIVATIONS)))
    shapes = tuple(x.shape), (batch, outputs, *space)
    return (
        Site("c", "conv2d", weight, bias, *shapes, activation, other is not None, stride, padding, dilation, groups),
        x,
        other,
    )


HALF_UNIT = 2.0**-8
"""Half of the distance between two neighbours in bfloat16, against the smaller of them, at most."""


def wrong_bf16(module, site, x, other):
    """Returns what is wrong with a block layer's output in bfloat16, None if nothing is."""
    module = module.to(torch.bfloat16)
    if not torch.equal(module.dense(), one_group(site.weight, site.groups).bfloat16()):
        return "it holds another weight"
    got, (expected, size) = module(x, other), reference(replace(site, weight=site.weight.bfloat16()), x, other)
    if (got.shape, got.dtype) != (expected.shape, torch.bfloat16):
        return f"{tuple(got.shape)} {got.dtype} instead of {tuple(expected.shape)}"
    allowed = HALF_UNIT * expected.abs() + 4e-6 * (size + 1e-3)
    worst = float(((got.double() - expected).abs() / allowed).max())
    return None if worst <= 1 else f"off by {worst:.3f} times what one rounding allows"


def wrongly_rounded(draw):
    """Returns what is wrong with the rounding of numbers of every kind, which come in as the bias of nothing."""
    some = torch.randint(-(2**31), 2**31, (4000,), generator=draw.generator).int()
    halfway = some & -65536 | 0x8000
    edges = torch.tensor([0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4028e38, 1e-45, 1.17e-38]).view(torch.int32)
    bias = torch.cat([some, halfway, halfway + 1, halfway - 1, edges]).view(torch.float32)
    outputs = len(bias)
    layer = BlockLinear(to_blocks(torch.zeros(outputs, 2).bfloat16()), bias, 2, outputs)
    got, expected = layer(torch.ones(2).bfloat16()), bias.bfloat16()
    wrong = (got.view(torch.int16) != expected.view(torch.int16)) & ~(got.isnan() & expected.isnan())
    return {"rounding": f"{bias[wrong].tolist()[:5]} became {got[wrong].tolist()[:5]}"} if bool(wrong.any()) else {}


def reference(site, x, other):
    """Returns the result in float64, and the sum of the magnitudes that went into each entry."""
    bias = torch.zeros(site.weight.shape[0]).double() if site.bias is None else site.bias.double()
    rest = torch.zeros(()).double() if other is None else other.double()
    w = site.weight.double()
    if site.kind == "linear":
        exact, size = F.linear(x.double(), w, bias), F.linear(x.double().abs(), w.abs(), bias.abs())
    else:
        settings = (site.stride, site.padding, site.dilation, site.groups)
        exact = F.conv2d(x.double(), w, bias, *settings)
        size = F.conv2d(x.double().abs(), w.abs(), bias.abs(), *settings)
    return ACTIVATIONS[site.activation.name](exact + rest), size + rest.abs()


def wrong(module, site, x, other):
    """Returns what is wrong with a module's output, None if nothing is."""
    got, (expected, size) = module(x, other), reference(site, x, other)
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    worst = float(((got.double() - expected).abs() / (size + 1e-3)).max())
    return None if worst < 3e-6 else f"off by {worst:.1e} of the summed magnitudes"


def linear(draw):
    outputs, inputs, rows = draw.one(OUTPUTS), draw.one(INPUTS), draw.one(((1,), (7,), (2, 5), (3, 1, 11)))
    weight, bias = draw.weight(outputs, inputs), draw.one((None, draw.tensor(outputs)))
    x, other = draw.tensor(*rows, inputs), draw.one((None, draw.tensor(*rows, outputs)))
    x = draw.one((x, draw.tensor(*rows, 2 * inputs)[..., ::2]))
    activation = Activation(draw.one(tuple(ACTIVATIONS)))
    return Site("l", "linear", weight, bias, tuple(x.shape), (*rows, outputs), activation, other is not None), x, other


def gated(draw):
    """Draws a gated convolution; returns what is wrong with it."""
    site, x, _ = convolution(draw)
    while site.groups > 1:
        site, x, _ = convolution(draw)
    dense = site.weight
    outputs, inputs = dense.shape[:2]
    values = every_block(dense)
    channels = torch.rand(inputs, generator=draw.generator).lt(0.5).nonzero()[:, 0]
    stripes = torch.rand(len(values), generator=draw.generator).lt(0.6).nonzero()[:, 0]
    geometry = (list(dense.shape[2:]), list(site.stride), list(site.padding), list(site.dilation))
    code = tuple(ACTIVATIONS).index(site.activation.name)
    lists = [channels.int(), stripes.int()]
    if draw.one((True, False)):  # as masks
        sizes = zip(lists, (inputs, len(values)), strict=True)
        lists = [torch.zeros(size, dtype=torch.uint8).index_fill(0, given.long(), 1) for given, size in sizes]
    got = torch.ops.microglia.gated_conv2d(x, values, *lists, site.bias, outputs, *geometry, code)
    columns = torch.zeros(inputs).index_fill(0, channels, 1)
    rows = torch.zeros(len(values)).index_fill(0, stripes, 1).repeat_interleave(16)[:outputs]
    kept = Site("g", "conv2d", dense * columns[:, None, None], site.bias, site.input_shape, site.output_shape,
                site.activation, False, site.stride, site.padding, site.dilation)  # fmt: skip
    expected, size = reference(kept, x, None)
    worst = float(((got.double() - expected * rows[:, None, None]).abs() / (size + 1e-3)).max())
    return None if worst < 3e-6 else f"off by {worst:.1e}"


def part(draw):
    """Draws some outputs of a convolution from some of its input channels; returns what is wrong with them."""
    site, x, _ = convolution(draw)
    while site.groups > 1:
        site, x, _ = convolution(draw)
    rows, columns = (some(draw, size) for size in site.weight.shape[:2])
    geometry = (list(site.weight.shape[2:]), list(site.stride), list(site.padding), list(site.dilation))
    code = tuple(ACTIVATIONS).index(site.activation.name)
    given = x if columns is None else draw.laid_out(x[:, columns])
    values, outputs = every_block(site.weight), len(site.weight)
    got = torch.ops.microglia.part_conv2d(given, values, rows, columns, site.bias, outputs, *geometry, code)
    weight = site.weight if rows is None else site.weight[rows]
    bias = site.bias if rows is None or site.bias is None else site.bias[rows]
    weight = weight if columns is None else weight[:, columns]
    kept = Site("p", "conv2d", weight, bias, tuple(given.shape), tuple(got.shape), site.activation, False,
                site.stride, site.padding, site.dilation)  # fmt: skip
    expected, size = reference(kept, given, None)
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    worst = float(((got.double() - expected).abs() / (size + 1e-3)).max())
    return None if worst < 3e-6 else f"off by {worst:.1e}"


def gate(draw):
    """Draws the head of a gate; returns what is wrong with what it keeps, where that is not a matter of rounding."""
    outputs, inputs, side = draw.one(OUTPUTS), draw.one(INPUTS), draw.one(SIDES)
    weight, bias, columns = draw.tensor(outputs, inputs), draw.tensor(outputs), some(draw, inputs)
    x = draw.tensor(1, inputs, *side)
    given = draw.laid_out(x if columns is None else x[:, columns])
    softmax, maximum, block = draw.one((True, False)), draw.one((True, False)), draw.one((1, 2, 16))
    rows = torch.ops.microglia.gate_rows(given, columns, weight, bias, softmax, maximum, block)
    pooled = given.double().amax((2, 3)) if maximum else given.double().mean((2, 3))
    if columns is not None:
        pooled = pooled.new_zeros(1, inputs).index_copy(1, columns, pooled)
    logits = F.linear(pooled.softmax(1) if softmax else pooled, weight.double(), bias.double())[0]
    whole = torch.zeros(outputs * block, dtype=torch.bool).index_fill(0, rows, True)
    got = whole.view(outputs, block)[:, 0]
    sure = logits.abs() > 1e-4
    right = torch.equal(got[sure], logits[sure] > 0) and torch.equal(rows, got.repeat_interleave(block).nonzero()[:, 0])
    return None if right else f"keeps {rows.tolist()}, with logits {logits.tolist()}"


def sum_of_a_part(draw):
    """Draws a map and some channels to add to it; returns what is wrong with the sum."""
    channels, side, batch = draw.one(INPUTS), draw.one(SIDES), draw.one((1, 3))
    rows = torch.rand(channels, generator=draw.generator).lt(draw.one((0.0, 0.5, 1.0))).nonzero()[:, 0]
    x, part = draw.laid_out(draw.tensor(batch, channels, *side)), draw.laid_out(draw.tensor(batch, len(rows), *side))
    relu, right = draw.one((True, False)), x.index_add(1, rows, part)
    got = torch.ops.microglia.add_rows(x, part, rows, relu)
    return None if torch.equal(got, right.relu() if relu else right) else "another sum"


def some(draw, count):
    """Returns a rising list of some of so many channels, one at least, or None for all of them; also whole blocks of 16."""
    if count % 16 == 0 and draw.one((True, False)):
        blocks = some(draw, count // 16) if count > 16 else torch.zeros(1, dtype=torch.int64)
        return None if blocks is None else (blocks[:, None] * 16 + torch.arange(16)).flatten()
    drawn = torch.rand(count, generator=draw.generator)
    return draw.one((None, *((drawn < max(share, float(drawn.min()) + 1e-6)).nonzero()[:, 0] for share in (0.1, 0.5, 0.9))))


def large(draw):
    """Returns what is wrong with layers whose weights fill the caches, which takes other roads through the kernels."""
    found = {}
    for outputs, inputs, kernel, side, density in ((256, 256, 3, 14, 0.6), (512, 1024, 1, 7, 1.0), (96, 384, 3, 5, 1.0)):
        tall = draw.tensor(-(-outputs // 16), inputs, kernel, kernel).abs() < density * 1.5
        weight = draw.tensor(outputs, inputs, kernel, kernel) * tall.repeat_interleave(16, 0)[:outputs]
        x, padding = draw.tensor(2, inputs, side, side), (kernel // 2, kernel // 2)
        site = Site("c", "conv2d", weight, draw.tensor(outputs), tuple(x.shape), (2, outputs, side, side), padding=padding)
        for name, module in {"block": BlockConv2d.of(site, 1), "rows": RowConv2d.of(site, 4)}.items():
            if problem := wrong(module, site, x, None):
                found[f"large {name} {outputs} {inputs} {kernel}"] = problem
        if problem := wrong_bf16(BlockConv2d.of(site, 1), site, x.bfloat16(), None):
            found[f"large block in bf16 {outputs} {inputs} {kernel}"] = problem
        if problem := quads.wrong(draw, site):
            found[f"large block in 8 bits {outputs} {inputs} {kernel}"] = problem
    x, weight = draw.tensor(300, 1024), draw.tensor(2048, 1024)  # 131,072 blocks
    site = Site("l", "linear", weight, None, tuple(x.shape), (300, 2048))
    if problem := wrong(BlockLinear.of(site, 1), site, x, None):
        found["large linear"] = problem
    if problem := wrong_bf16(BlockLinear.of(site, 1), site, x.bfloat16(), None):
        found["large linear in bf16"] = problem
    return found


def main(count, threads):
    torch.set_num_threads(threads)
    draw = Draw(count)
    failures = large(draw) | wrongly_rounded(draw)
    for index in range(count):
        site, x, other = convolution(draw)
        for width in (1, 2, 4, 8):
            if problem := wrong(BlockConv2d.of(site, width), site, x, other):
                failures[f"block 16x{width} {index}: {site.weight.shape} {site}"[:400]] = problem
        for rows in (1, 2, 4):
            if problem := wrong(RowConv2d.of(site, rows), site, x, other):
                failures[f"rows {rows}x1 {index}: {site.weight.shape} {site}"[:400]] = problem
        narrow = [None if given is None else draw.laid_out(given.bfloat16()) for given in (x, other)]
        for width in (1, 2, 4, 8):
            if problem := wrong_bf16(BlockConv2d.of(site, width), site, *narrow):
                failures[f"block 16x{width} in bf16 {index}: {site.weight.shape} {site}"[:400]] = problem
        site, x, other = linear(draw)
        if problem := wrong(BlockLinear.of(site, draw.one((1, 2, 4, 8))), site, x, other):
            failures[f"linear {index}: {site}"[:400]] = problem
        narrow = [
            None if given is None else torch.cat([given, given], -1).bfloat16()[..., : given.shape[-1]] for given in (x, other)
        ]
        if problem := wrong_bf16(BlockLinear.of(site, draw.one((1, 2, 4, 8))), site, *narrow):
            failures[f"linear in bf16 {index}: {site}"[:400]] = problem
        if problem := gated(draw):
            failures[f"gated {index}"] = problem
        if problem := part(draw):
            failures[f"part {index}"] = problem
        if problem := gate(draw):
            failures[f"gate {index}"] = problem
        if problem := sum_of_a_part(draw):
            failures[f"sum {index}"] = problem
        if problem := chains.wrong(draw):
            failures[f"chain {index}"] = problem
        site = convolution(draw)[0]
        if problem := quads.wrong(draw, site):
            failures[f"8 bits {index}: {site.weight.shape} {site}"[:400]] = problem
        if problem := quads.wrongly_pooled(draw):
            failures[f"pooling in 8 bits {index}"] = problem
        if problem := quads.wrongly_quantized(draw):
            failures[f"rounding to 8 bits {index}"] = problem
    print(json.dumps({"level": level(), "problems": 21 * count, "failures": failures}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
