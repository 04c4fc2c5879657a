"""Rows of 4x1 and single weights: what the blocks are tested for, in each of their widths."""

import copy
import pickle

import pytest
import torch

from microglia.core.errors import MicrogliaError
from microglia.runtime import RowConv2d
from microglia.runtime.dense.fusion import Activation, Site

WIDTHS = (1, 2, 4)
"""Single weights, pairs of rows, and rows of 4."""


def layer(width, x, outputs=22, *, groups=1, stride=(1, 1), dilation=(1, 1), bias=True, activation="relu"):
    """Returns a random row layer and the dense weight and bias that it holds."""
    generator = torch.Generator().manual_seed(width)
    kept = (torch.rand(-(-outputs // width), x.shape[1] // groups, 3, 3, generator=generator) < 0.3).repeat_interleave(width, 0)
    weight = torch.randn(outputs, x.shape[1] // groups, 3, 3, generator=generator) * kept[:outputs]
    added = torch.randn(outputs, generator=generator) if bias else None
    shape = torch.conv2d(x, weight, None, stride, 1, dilation, groups).shape
    site = Site("r", "conv2d", weight, added, tuple(x.shape), tuple(shape), Activation(activation), False,
                stride, (1, 1), dilation, groups)  # fmt: skip
    return RowConv2d.of(site, width), weight, added


BAD = {
    "a channel below zero": ("channel", 0, -1),
    "a channel past the input": ("channel", 3, 32),
    "a channel far past the input": ("channel", 0, 2**31 - 1),
    "a tap past the kernel": ("tap", 1, 9),
    "a row pointer that rises too far": ("row_pointer", 1, 10**6),
    "a row pointer that begins late": ("row_pointer", 0, 3),
    "a row pointer below zero": ("row_pointer", 1, -5),
    "a row pointer that ends early": ("row_pointer", -1, 0),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_hostile_indices_are_refused_and_the_layer_is_right_again_after(bad, width):
    x = torch.randn(1, 32, 7, 7)
    module = layer(width, x)[0]
    (name, place, value), before = bad, module(x)
    right = getattr(module, name)[place].item()
    getattr(module, name)[place] = value
    with pytest.raises(RuntimeError, match="row_conv2d"):
        module(x)
    getattr(module, name)[place] = right
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("width", WIDTHS)
def test_tensors_of_another_kind_or_length_are_refused(width):
    x = torch.randn(1, 32, 7, 7)
    wrong = {"values": torch.zeros(3, width), "row_pointer": torch.zeros(3, dtype=torch.int64), "channel": torch.zeros(4),
             "bias": torch.zeros(5), "tap": torch.zeros(1, dtype=torch.uint8)}  # fmt: skip
    for name, value in wrong.items():
        module = layer(width, x)[0]
        setattr(module, name, value)
        with pytest.raises((RuntimeError, MicrogliaError), match="microglia"):
            module(x)
    module = layer(width, x)[0]
    for given in (x.double(), x[0], x[:, :, :0]):
        with pytest.raises(RuntimeError, match="microglia"):
            module(given)
    with pytest.raises(RuntimeError, match="residual"):
        module(x, torch.zeros(1, 22, 6, 7))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
@pytest.mark.parametrize("groups", [1, 2])
def test_strides_dilations_groups_layouts_and_threads_give_the_dense_result(groups, dilation, stride, width):
    x = torch.randn(3, 12, 11, 30, generator=torch.Generator().manual_seed(0))
    module, weight, bias = layer(width, x, groups=groups, stride=stride, dilation=dilation)
    expected = torch.conv2d(x.double(), weight.double(), bias.double(), stride, 1, dilation, groups).relu()
    wide = torch.cat([x, x], 1)[:, :12]
    for given in (x, x.contiguous(memory_format=torch.channels_last), wide, x.mT.contiguous().mT):
        torch.testing.assert_close(module(given).double(), expected, rtol=1e-5, atol=1e-5)
    threads, one = torch.get_num_threads(), module(x)
    try:
        torch.set_num_threads(2)
        assert torch.equal(module(x), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("width", WIDTHS)
def test_it_compiles_whole_exports_copies_and_keeps_the_rules_of_operators(width):
    x = torch.randn(2, 8, 6, 6)
    module, weight, _ = layer(width, x, activation="silu")
    expected = module.eval()(x)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), expected)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), expected)
    assert torch.equal(module.dense(), weight)
    for residual in (None, torch.randn(2, 22, 6, 6)):
        given = (x, *module._operands(residual))
        torch.library.opcheck(torch.ops.microglia.row_conv2d.default, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("width", WIDTHS)
def test_geometries_that_no_memory_holds_are_refused(width):
    x = torch.zeros(1, 1, 4, 4)
    module = layer(width, x)[0]
    module(x)
    for padding, dilation in (([2**25, 2**25], [2**25, 2**25]), ([2**26, 2**26], [2**25, 1])):
        module.geometry = ([3, 3], [1, 1], padding, dilation)
        with pytest.raises(RuntimeError, match=r"row_conv2d|microglia"):
            module(x)
