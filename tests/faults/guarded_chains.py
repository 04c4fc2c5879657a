"""Random chains through the C interface, every array ending at a page that must not be touched; a script.

Usage: guarded_chains.py LIBRARY COUNT. One byte past an array kills the process; a wrong result ends it with status 1.
"""

import ctypes
import sys

import numpy as np
from guarded_kernels import IN_PIECES, Convolution, Guarded, Places, address, load, packed, reference

KERNELS = ((1, 1), (3, 3), (1, 1), (3, 3), (2, 3))


class Step(ctypes.Structure):
    _fields_ = [("conv", Convolution), ("blocks", Places), ("bias", ctypes.c_void_p)]
    _fields_ += [("input", ctypes.c_int64), ("residual", ctypes.c_int64)]


class Image(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("channels", "height", "width"))]


def draw(random, x):
    """Returns sizes, dense weight (outputs, taps, inputs) and the output's height and width of a layer that reads ``x``."""
    batch, height, width, inputs = x.shape
    kernel = KERNELS[random.integers(len(KERNELS))]
    stride, padding, dilation = random.choice([1, 1, 1, 2], 2), random.integers(0, 3, 2), random.choice([1, 1, 2], 2)
    side = (height, width)
    space = [(side[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    if min(space) < 1:
        return draw(random, x)
    outputs, taps = int(random.choice([1, 15, 16, 17, 33])), kernel[0] * kernel[1]
    kept = random.random((-(-outputs // 16), taps, inputs)) < random.choice([0, 0.1, 0.4, 1])
    weight = random.standard_normal((outputs, taps, inputs)) * kept.repeat(16, 0)[:outputs]
    sizes = [batch, inputs, height, width, outputs, *kernel, *stride, *padding, *dilation]
    return [int(s) for s in sizes], weight, [int(s) for s in space]


def solve(library, random):
    """Runs one chain; returns the largest error against the size of the numbers, which grow from step to step."""
    batch, side, channels = int(random.choice([1, 1, 5])), random.integers(1, 10, 2), int(random.choice([1, 16, 17]))
    values = [random.standard_normal((batch, *side, channels))]
    image = Guarded.of(values[0].astype(np.float32))
    images = (Image * 1)(Image(address(image), channels, *map(int, side)))
    parallel = IN_PIECES if random.random() < 0.5 else None
    held, steps, results = [], [], []
    count = int(random.integers(1, 6))
    for index in range(count):
        source = int(random.integers(max(0, index - 1), index + 1))
        sizes, weight, space = draw(random, values[source])
        same = [k for k, value in enumerate(values) if value.shape == (batch, *space, len(weight))]
        other = int(random.choice(same)) if same else -1
        bias = random.standard_normal(len(weight)) if random.random() < 0.5 else None
        activation, width = int(random.integers(0, 4)), int(random.choice([1, 2, 4, 8]))
        summand = values[other] if same else None
        values.append(reference(sizes, weight, values[source], bias, summand, space, activation))
        blocks, pointer, channel, tap = packed(weight, 16, width)
        arrays = [Guarded.of(a) for a in (blocks, pointer, channel, None if weight.shape[1] == 1 else tap)]
        shift = None if bias is None else Guarded.of(bias.astype(np.float32))
        out = index == count - 1 or random.random() < 0.2
        y = Guarded.of(np.full(values[-1].shape, np.nan, np.float32)) if out else None
        conv = Convolution(*sizes, activation, 3 if parallel else 1)
        steps.append(Step(conv, Places(width, len(channel), *map(address, arrays)), address(shift), source, other))
        held.append((arrays, shift))
        results.append(y)
    pointers = (ctypes.c_void_p * count)(*map(address, results))
    big = ctypes.c_int64
    code = library.mg_block_chain((Step * count)(*steps), big(count), images, big(1), pointers, parallel)
    assert code == 0, code
    worst = 0.0
    for y, expected in zip(results, values[1:], strict=True):
        if y is not None:
            assert np.isfinite(y.array).all(), "an output was not written"
            worst = max(worst, float(np.abs(y.array - expected).max() / (1 + np.abs(expected).max())))
    return worst


def main(path, count):
    library, random = load(path), np.random.default_rng(0)
    worst = max(solve(library, random) for _ in range(count))
    print(library.mg_level_name(library.mg_level()).decode(), worst)
    sys.exit(0 if worst < 1e-4 else 1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
