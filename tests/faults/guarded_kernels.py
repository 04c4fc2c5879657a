"""Random problems through the C interface, every array ending at a page that must not be touched; a script.

Usage: guarded_kernels.py LIBRARY COUNT. One byte past an array kills the process; a wrong result ends it with status 1.
"""

import ctypes
import itertools
import mmap
import sys

import numpy as np

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
SIZES = ["batch", "in_channels", "height", "width", "out_channels", "kernel_height", "kernel_width", "stride_height",
         "stride_width", "padding_height", "padding_width", "dilation_height", "dilation_width"]  # fmt: skip


class Convolution(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in SIZES), ("activation", ctypes.c_int32), ("threads", ctypes.c_int32)]


class Places(ctypes.Structure):
    """mg_blocks and mg_rows alike."""

    _fields_ = [("width", ctypes.c_int64), ("count", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("values", "row_pointer", "channel", "tap")]


BODY = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


@ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, BODY, ctypes.c_void_p)
def IN_PIECES(begin, end, grain, body, context):
    """Runs a range in three pieces, the last one first."""
    edges = sorted({begin, end, *(begin + (end - begin) * k // 3 for k in (1, 2))})
    for piece in reversed(list(itertools.pairwise(edges))):
        body(*piece, context)


class Guarded:
    """A copy of an array whose last byte is the last of its page, before one that cannot be read."""

    def __init__(self, array):
        pages = -(-array.nbytes // PAGE) + 1
        self.memory = mmap.mmap(-1, pages * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        assert LIBC.mprotect(start + (pages - 1) * PAGE, PAGE, mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0) == 0
        offset = (pages - 1) * PAGE - array.nbytes
        self.array = np.frombuffer(self.memory, array.dtype, array.size, offset).reshape(array.shape)
        self.array[...] = array
        self.address = start + offset

    @staticmethod
    def of(array):
        return None if array is None or not array.size else Guarded(np.ascontiguousarray(array))


def address(guarded):
    return None if guarded is None else guarded.address


def draw(random):
    """Returns a problem: sizes, dense weight (outputs, taps, inputs), x (batch, height, width, inputs), bias and residual."""
    kernel = random.choice([1, 3, 1, 3, 2, 5], 2) if random.random() < 0.5 else [1, 1]
    side, stride = random.integers(1, 12, 2), random.choice([1, 1, 2, 3], 2)
    padding, dilation = random.integers(0, 4, 2), random.choice([1, 1, 2], 2)
    space = [(side[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    if min(space) < 1:
        return draw(random)
    batch, inputs, outputs = random.choice([1, 1, 3]), random.choice([1, 3, 8, 16, 17]), random.choice([1, 4, 15, 16, 17, 33])
    tall = random.choice([1, 4, 16])
    kept = random.random((-(-outputs // tall), kernel[0] * kernel[1], inputs)) < random.choice([0, 0.1, 0.4, 1])
    weight = random.standard_normal((outputs, kernel[0] * kernel[1], inputs)) * kept.repeat(tall, 0)[:outputs]
    x = random.standard_normal((batch, *side, inputs))
    bias = random.standard_normal(outputs) if random.random() < 0.5 else None
    other = random.standard_normal((batch, *space, outputs)) if random.random() < 0.5 else None
    sizes = [batch, inputs, *side, outputs, *kernel, *stride, *padding, *dilation]
    return [int(s) for s in sizes], weight, x, bias, other, [int(s) for s in space]


def reference(sizes, weight, x, bias, other, space, activation):
    _, _, _, _, _, kh, kw, sh, sw, ph, pw, dh, dw = sizes
    padded = np.pad(x, ((0, 0), (ph, ph), (pw, pw), (0, 0)))
    out = np.zeros((len(x), *space, len(weight))) + (0 if bias is None else bias) + (0 if other is None else other)
    for tap in range(kh * kw):
        top, left = tap // kw * dh, tap % kw * dw
        window = padded[:, top : top + sh * (space[0] - 1) + 1 : sh, left : left + sw * (space[1] - 1) + 1 : sw]
        out += window @ weight[:, tap].T
    return [lambda v: v, lambda v: np.maximum(v, 0), lambda v: np.clip(v, 0, 6), lambda v: v / (1 + np.exp(-v))][activation](
        out
    )


def packed(weight, tall, width):
    """Returns values, row pointer, channel and tap: blocks of ``tall`` outputs x ``width`` inputs, taps outside."""
    outputs, taps, inputs = weight.shape
    grid = np.pad(weight, ((0, -outputs % tall), (0, 0), (0, -inputs % width)))
    grid = grid.reshape(-1, tall, taps, grid.shape[2] // width, width).transpose(0, 2, 3, 4, 1)
    stripe, tap, block = np.nonzero((grid != 0).any((-1, -2)))
    pointer = np.concatenate([[0], np.bincount(stripe, minlength=len(grid)).cumsum()])
    return (
        grid[stripe, tap, block].astype(np.float32),
        pointer.astype(np.int32),
        (block * width).astype(np.int32),
        tap.astype(np.uint8),
    )


def narrowed(array):
    """Returns the bits of float32 numbers in bfloat16, rounded to the nearest even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def paired(weight, width, odd):
    """Returns blocks as `packed` does, in pairs of bfloat16; those that begin at odd channels leave the first one out."""
    if odd:
        weight[:, :, 0] = 0
        weight = np.pad(weight, ((0, 0), (0, 0), (1, 0)))
    values, pointer, channel, tap = packed(weight, 16, width)
    pairs = values.reshape(len(values), width // 2, 2, 16).transpose(0, 1, 3, 2)
    return narrowed(pairs), pointer, (channel - odd).astype(np.int32), tap


def solve_bf16(library, random, activation):
    """Solves one problem of blocks in bfloat16; returns the largest error beyond one rounding, against the numbers."""
    sizes, weight, x, bias, other, space = draw(random)
    weight, x, other = (None if a is None else widened(narrowed(a)).astype(np.float64) for a in (weight, x, other))
    width = int(random.choice([2, 4, 8]))
    values, pointer, channel, tap = paired(weight, width, odd=int(random.integers(0, 2)) if width == 2 else 0)
    parallel = IN_PIECES if random.random() < 0.5 else None
    conv = Convolution(*sizes, activation, 3 if parallel else 1)
    arrays = [Guarded.of(a) for a in (values, pointer, channel, None if weight.shape[1] == 1 else tap)]
    places = Places(width, len(channel), *map(address, arrays))
    given = [None if a is None else Guarded.of(narrowed(a)) for a in (x, other)]
    shift = None if bias is None else Guarded.of(bias.astype(np.float32))
    y = Guarded.of(np.full((len(x), *space, len(weight)), 0x7FC0, np.uint16))
    big, pointer_to = ctypes.c_int64, ctypes.c_void_p
    code = library.mg_block_conv2d_bf16(
        ctypes.byref(conv), ctypes.byref(places), pointer_to(address(given[0])), big(sizes[1]), pointer_to(address(y)),
        big(sizes[4]), pointer_to(address(given[1])), big(sizes[4]), pointer_to(address(shift)), parallel,
    )  # fmt: skip
    assert code == 0, code
    got, expected = widened(y.array), reference(sizes, weight, x, bias, other, space, activation)
    assert np.isfinite(got).all(), "an output was not written"
    left = np.maximum(np.abs(got - expected) - 2.0**-8 * np.abs(expected), 0)
    return float(left.max() / (1 + np.abs(expected).max()))


def solve(library, random, activation):
    """Solves one problem in one way; returns the largest error against the size of the numbers."""
    sizes, weight, x, bias, other, space = draw(random)
    parallel = IN_PIECES if random.random() < 0.5 else None
    conv = Convolution(*sizes, activation, 3 if parallel else 1)
    rows = random.random() < 0.4
    tall, width = (int(random.choice([1, 2, 4])), 1) if rows else (16, int(random.choice([1, 2, 4, 8])))
    values, pointer, channel, tap = packed(weight, tall, width)
    arrays = [Guarded.of(a) for a in (values, pointer, channel, None if weight.shape[1] == 1 else tap)]
    places = Places(tall if rows else width, len(channel), *map(address, arrays))
    order = (0, 3, 1, 2) if rows else (0, 1, 2, 3)
    given = [None if a is None else Guarded.of(a.astype(np.float32).transpose(order)) for a in (x, other)]
    shift = None if bias is None else Guarded.of(bias.astype(np.float32))
    y = Guarded.of(np.full((len(x), *space, len(weight)), np.nan, np.float32).transpose(order))
    pointers = [address(given[0]), address(y), address(given[1]), address(shift)]
    big = ctypes.c_int64
    if rows:
        code = library.mg_row_conv2d(ctypes.byref(conv), ctypes.byref(places), *map(ctypes.c_void_p, pointers), parallel)
    else:
        strides = big(sizes[1]), big(sizes[4]), big(sizes[4])
        mixed = [part for pair in zip(map(ctypes.c_void_p, pointers[:3]), strides, strict=True) for part in pair]
        code = library.mg_block_conv2d(ctypes.byref(conv), ctypes.byref(places), *mixed, ctypes.c_void_p(pointers[3]), parallel)
    assert code == 0, code
    assert np.isfinite(y.array).all(), "an output was not written"
    got = y.array.transpose(0, 2, 3, 1) if rows else y.array
    expected = reference(sizes, weight, x, bias, other, space, activation)
    return float(np.abs(got - expected).max() / (1 + np.abs(expected).max()))


def load(path):
    """Returns the library; what it says its level is, is text."""
    try:
        library = ctypes.CDLL(path)
    except OSError:  # the installed library needs torch, the sanitized one does not and could not live with it
        import torch  # noqa: F401

        library = ctypes.CDLL(path)
    library.mg_level_name.restype = ctypes.c_char_p
    return library


def main(path, count):
    library, random = load(path), np.random.default_rng(0)
    ways = (solve, solve_bf16)
    worst = max(ways[index // 4 % 2](library, random, index % 4) for index in range(count))
    print(library.mg_level_name(library.mg_level()).decode(), worst)
    sys.exit(0 if worst < 1e-5 else 1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
