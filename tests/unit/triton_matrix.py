"""Random problems through the Triton kernels, in Triton's interpreter, against dense float64; a script of its own process.

Takes a number of problems, a seed, and ``cuda`` to run them on a GPU instead. Prints one JSON object: how many there were,
and those whose result was wrong.
"""

import json
import os
import sys
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "0" if "cuda" in sys.argv else "1"  # read when a kernel is first imported

import torch
from kernel_matrix import Draw, convolution, linear, reference

from microglia.runtime.gpu.triton import block_conv2d, block_linear
from microglia.runtime.gpu.triton.tiles import Tile, tiles
from microglia.runtime.operators import ACTIVATIONS
from microglia.runtime.sparse_layers.layout import one_group, to_blocks

DEVICE = "cuda" if "cuda" in sys.argv else "cpu"
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of one sum: of its terms' magnitudes in float32, of its result and of its largest term in half precision."""
FORMS = ((16, 1), (32, 1), (64, 1), (16, 8), (32, 32), (64, 64), (128, 2), (16, 4))


def run(site, x, other, form, tile):
    """Returns the result of the kernel for blocks of a form."""
    stripe, width = form
    x, other, bias = (None if t is None else t.to(DEVICE) for t in (x, other, site.bias))
    places = to_blocks(one_group(site.weight, site.groups).to(DEVICE), width, stripe, paired=False)
    activation = ACTIVATIONS.index(site.activation.name)
    if site.kind == "linear":
        return block_linear(x, *places[:3], bias, other, site.weight.shape[0], activation, tile)
    geometry = (site.weight.shape[2:], site.stride, site.padding, site.dilation)
    return block_conv2d(x, *places, bias, other, site.weight.shape[0], *geometry, activation, tile)


def main(count, seed):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    draw, failures = Draw(seed), []
    for index in range(count):
        site, x, other = linear(draw) if index % 4 == 3 else convolution(draw)
        dtype, form = draw.one(tuple(ROUNDING)), FORMS[index % len(FORMS)]
        # Large tiles: the interpreter takes a millisecond for each step of a program, whatever its size.
        tile = Tile(draw.one((64, 512, 1024)), draw.one((128, 512)), 4, 3, draw.one((False, True)))
        if DEVICE != "cpu":
            tile = draw.one((None, *tiles(form[1], dtype.itemsize)[:2]))
        x, other = (None if t is None else t.to(dtype) for t in (x, other))
        bias = None if site.bias is None else site.bias.to(dtype)
        site = replace(site, weight=site.weight.to(dtype), bias=bias)
        wanted, magnitude = reference(site, x, other)
        out = run(site, x, other, form, tile)
        allowed = ROUNDING[dtype] * (magnitude if dtype == torch.float32 else 1 + wanted.abs())
        layout = site.kind == "linear" or out.is_contiguous(memory_format=torch.channels_last)
        error = (out.cpu().double() - wanted).abs()
        if out.dtype != dtype or out.shape != wanted.shape or not layout or not bool((error <= allowed + 1e-6).all()):
            failures.append([f"{index} {form} {dtype} {tile}: {site}"[:600], float(error.max())])
    print(json.dumps({"problems": count, "failures": failures}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
