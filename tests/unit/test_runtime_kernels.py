"""The sparse operators: every level against dense float64, hostile indices, compilers, copies, threads and forks."""

import copy
import ctypes
import io
import json
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import fresh
import microglia.runtime
from microglia.core.errors import MicrogliaError
from microglia.runtime import BlockConv2d, BlockLinear, RowConv2d, level
from microglia.runtime.dense.fusion import Activation, Site
from microglia.runtime.operators import LEVELS
from microglia.runtime.sparse_layers.layout import (
    dense_of_blocks,
    dense_of_every_block,
    dense_of_rows,
    every_block,
    one_group,
    to_blocks,
    to_rows,
)

MATRIX = Path(__file__).with_name("kernel_matrix.py")
HERE = LEVELS[: LEVELS.index(level()) + 1]
"""The levels that this machine and this build have."""


def process(code, **environment):
    """Runs Python code in a process of its own; returns it finished."""
    return fresh.run(code, environment={"OMP_NUM_THREADS": "1", **environment})


def site(weight, x, *, bias=None, activation="none", **settings):
    kind = "conv2d" if weight.ndim == 4 else "linear"
    out = torch.conv2d(x, weight, None, *settings.values()) if kind == "conv2d" else nn.functional.linear(x, weight)
    return Site("layer", kind, weight, bias, tuple(x.shape), tuple(out.shape), Activation(activation), **settings)


def sparse(*shape, tall=16, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-shape[0] // tall), *shape[1:], generator=generator) < density
    return torch.randn(shape, generator=generator) * kept.repeat_interleave(tall, 0)[: shape[0]]


def test_the_kernels_are_built_where_there_is_a_compiler():
    assert level() != "torch", "no compiled kernels: is there a C++ compiler? `microglia doctor` says more"


@pytest.mark.parametrize(("isa", "threads"), [*((isa, 1) for isa in HERE), (HERE[-1], 2)])
def test_every_operator_equals_dense_at_every_level(isa, threads):
    count = 20 if isa == "torch" else 120 if threads == 1 else 40
    done = fresh.run(None, count, threads, script=MATRIX, environment={"MICROGLIA_ISA": isa, "OMP_NUM_THREADS": str(threads)})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert (found["level"], found["problems"]) == (isa, 21 * count)
    assert not found["failures"], json.dumps(found["failures"], indent=1)[:3000]


def test_a_level_that_is_not_there_is_refused():
    done = process("import microglia.runtime as r; r.level()", MICROGLIA_ISA="sse9")
    assert done.returncode != 0
    assert "one of torch, generic, avx2, avx512, avx512vnni, avx512bf16, amx" in done.stderr


@pytest.mark.parametrize("shape", [(1, 1), (17, 5), (40, 8, 3, 3), (16, 3, 1, 1), (33, 7, 2, 5)])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_blocks_hold_the_weight_exactly(shape, width):
    weight = sparse(*shape)
    places = to_blocks(weight, width)
    assert torch.equal(dense_of_blocks(places, *shape[:2], shape[2:]), weight)
    assert places.row_pointer[-1] == len(places.values) == len(places.channel)
    assert (places.channel % width == 0).all()
    assert places.values.flatten(1).ne(0).any(1).all(), "a block of zeros is stored"


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rows_hold_the_weight_exactly(rows):
    weight = sparse(18, 5, 3, 3, tall=1)
    assert torch.equal(dense_of_rows(to_rows(weight, rows), 18, 5, (3, 3)), weight)
    assert rows > 1 or to_rows(weight, 1).stored == int(weight.count_nonzero())


def test_every_block_holds_the_weight_exactly():
    weight = torch.randn(40, 5, 3, 2)
    assert torch.equal(dense_of_every_block(every_block(weight), 40, (3, 2)), weight)


def test_groups_become_blocks_of_one_group():
    weight, x = sparse(12, 2, 3, 3, tall=1), torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(torch.conv2d(x, one_group(weight, 4)), torch.conv2d(x, weight, groups=4))


BAD = {
    "a channel below zero": {"channel": (0, -1)},
    "a channel past the input": {"channel": (3, 32)},
    "a channel far past the input": {"channel": (0, 2**31 - 1)},
    "a tap past the kernel": {"tap": (1, 9)},
    "a row pointer that falls": {"row_pointer": (1, 10**6)},
    "a row pointer that begins late": {"row_pointer": (0, 3)},
    "a row pointer below zero": {"row_pointer": (1, -5)},
    "a row pointer that ends early": {"row_pointer": (-1, 0)},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("kind", [BlockConv2d, RowConv2d])
def test_hostile_indices_are_refused(kind, bad):
    x = torch.randn(1, 32, 7, 7)
    module = kind.of(site(sparse(48, 32, 3, 3), x, padding=(1, 1)), 1)
    (name, (place, value)), *_ = bad.items()
    getattr(module, name)[place] = value
    with pytest.raises(RuntimeError, match=r"block_conv2d|row_conv2d"):
        module(x)


LISTS = {
    "an output below zero": ((-1, 3), (0, 5)),
    "an output past the weight": ((3, 40), (0, 5)),
    "an output far past the weight": ((3, 2**31 - 1), (0, 5)),
    "an output past 32 bits": ((3, 2**32 + 4), (0, 5)),
    "outputs that fall": ((3, 1), (0, 5)),
    "an output twice": ((3, 3), (0, 5)),
    "an input below zero": ((3, 4), (-1, 5)),
    "an input past the weight": ((3, 4), (0, 32)),
    "inputs that fall": ((3, 4), (5, 0)),
    "an input twice": ((3, 4), (5, 5)),
    "more inputs than given": ((3, 4), (0, 5, 6)),
    "fewer inputs than given": ((3, 4), (5,)),
    "no outputs": ((), (0, 5)),
    "all inputs, some given": ((3, 4), None),
}


@pytest.mark.parametrize(("rows", "columns"), LISTS.values(), ids=LISTS)
def test_hostile_lists_of_a_part_are_refused(rows, columns):
    lists = [None if given is None else torch.tensor(given, dtype=torch.int64) for given in (rows, columns)]
    values, geometry = every_block(torch.randn(40, 32, 3, 3)), ([3, 3], [1, 1], [1, 1], [1, 1], 0)
    with pytest.raises(RuntimeError, match=r"part_conv2d|microglia"):
        torch.ops.microglia.part_conv2d(torch.randn(1, 2, 7, 7), values, *lists, None, 40, *geometry)


COLUMNS = {"below zero": [-1, 5], "past the input": [0, 8], "falling": [5, 0], "twice": [5, 5], "too many": [0, 1, 2]}


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
def test_hostile_lists_of_a_gate_and_of_a_sum_are_refused(columns):
    x, hostile = torch.randn(1, 2, 7, 7), torch.tensor(columns)
    with pytest.raises(RuntimeError, match=r"gate_rows|microglia"):
        torch.ops.microglia.gate_rows(x, hostile, torch.randn(4, 8), torch.randn(4), True, False)
    with pytest.raises(RuntimeError, match=r"add_rows|microglia"):
        torch.ops.microglia.add_rows(torch.randn(1, 8, 7, 7), x, hostile)


def test_gates_and_sums_refuse_what_does_not_belong_together():
    x, weight, bias = torch.randn(1, 8, 7, 7), torch.randn(4, 8), torch.randn(4)
    gate, add = torch.ops.microglia.gate_rows, torch.ops.microglia.add_rows
    for given in ((x[:, :7], None, weight, bias), (torch.cat([x, x]), None, weight, bias), (x, None, weight, bias[:3]),
                  (x.double(), None, weight, bias), (x, None, weight.double(), bias), (x, None, weight[0], bias)):  # fmt: skip
        with pytest.raises(RuntimeError, match="microglia"):
            gate(*given, True, False)
    rows = torch.tensor([0, 3])
    for part, where in ((x[:, :3], rows), (x[:, :2, :6], rows), (x[:, :2], rows.int()), (torch.cat([x, x])[:, :2], rows)):
        with pytest.raises(RuntimeError, match="microglia"):
            add(x, part, where)


@pytest.mark.parametrize("maximum", [True, False])
def test_a_gate_that_sees_no_number_keeps_nothing(maximum):
    x = torch.full((1, 8, 7, 7), float("nan"))
    assert not len(torch.ops.microglia.gate_rows(x, None, torch.randn(4, 8), torch.ones(4), False, maximum))


def test_a_weight_of_another_size_is_no_weight_of_a_part():
    x, geometry = torch.randn(1, 32, 7, 7), ([3, 3], [1, 1], [1, 1], [1, 1], 0)
    values, rows = every_block(torch.randn(40, 32, 3, 3)), torch.tensor([3, 4])
    run = torch.ops.microglia.part_conv2d
    for given, outputs in ((values, 50), (values[:, :-1], 40), (values[:, :-9], 40), (values[..., :8], 40), (values[:1], 40)):
        with pytest.raises(RuntimeError, match="microglia"):
            run(x, given, rows, None, None, outputs, *geometry)
    with pytest.raises(RuntimeError, match="rows"):
        run(x, values, rows.int(), None, None, 40, *geometry)
    with pytest.raises(RuntimeError, match="bias"):
        run(x, values, rows, None, torch.zeros(2), 40, *geometry)


def test_tensors_of_another_kind_or_length_are_refused():
    x = torch.randn(1, 32, 7, 7)
    for name, value in {
        "values": torch.zeros(3, 1, 16), "row_pointer": torch.zeros(3, dtype=torch.int64), "channel": torch.zeros(4),
        "bias": torch.zeros(5), "tap": torch.zeros(1, dtype=torch.uint8),
    }.items():  # fmt: skip
        module = BlockConv2d.of(site(sparse(48, 32, 3, 3), x, bias=torch.zeros(48), padding=(1, 1)), 1)
        setattr(module, name, value)
        with pytest.raises(RuntimeError, match="microglia"):
            module(x)
    module = BlockConv2d.of(site(sparse(48, 32, 3, 3), x, padding=(1, 1)), 1)
    for given in (x.double(), x[0], x[:, :, :0]):
        with pytest.raises(RuntimeError, match="microglia"):
            module(given)
    with pytest.raises(RuntimeError, match="residual"):
        module(x, torch.zeros(1, 48, 6, 7))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64])
def test_a_residual_of_another_type_is_refused(dtype):
    x, tokens = torch.randn(1, 32, 7, 7), torch.randn(512, 8)
    block, row = (kind.of(site(sparse(48, 32, 3, 3), x, padding=(1, 1)), 1) for kind in (BlockConv2d, RowConv2d))
    linear = BlockLinear.of(site(sparse(512, 8), tokens), 1)
    given = ((block, x, (1, 48, 7, 7)), (row, x, (1, 48, 7, 7)), (linear, tokens, (512, 512)))
    for module, inputs, shape in given:
        with pytest.raises(RuntimeError, match="the residual must be"):
            module(inputs, torch.ones(shape).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_can_be_written_over(dtype):
    x, tokens = torch.randn(2, 24, 7, 9).to(dtype), torch.randn(2, 5, 24).to(dtype)
    conv = BlockConv2d.of(site(sparse(40, 24, 3, 3), x.float(), padding=(1, 1), activation="relu"), 2).to(dtype)
    linear = BlockLinear.of(site(sparse(40, 24), tokens.float(), activation="silu"), 2).to(dtype)
    image = torch.randn(2, 40, 7, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    for module, given, other in ((conv, x, image), (linear, tokens, torch.randn(2, 5, 40).to(dtype))):
        expected = module(given, other)
        module.overwrites = True
        target = other.clone()
        out = module(given, target)
        assert out is target
        assert out.equal(expected)
        apart = other.mT.contiguous().mT  # of another layout: it is read, and stays
        before = apart.clone()
        assert module(given, apart).equal(expected)
        assert apart.equal(before)
        assert module(given).shape == expected.shape


def test_what_cannot_be_written_over_is_refused():
    x = torch.randn(1, 32, 7, 7).contiguous(memory_format=torch.channels_last)
    conv, over = BlockConv2d.of(site(sparse(32, 32, 1, 1), x), 1), torch.ops.microglia.block_conv2d_
    with pytest.raises(RuntimeError, match="must lie in memory as the output would"):
        over(x, *conv._operands(torch.randn(1, 32, 7, 7)))
    with pytest.raises(RuntimeError, match="cannot write over its own input"):
        over(x, *conv._operands(x))
    with pytest.raises(RuntimeError, match="shape of the output"):
        over(x, *conv._operands(x[:, :, :6]))
    linear, tokens = BlockLinear.of(site(sparse(24, 24), torch.zeros(3, 24)), 1), torch.randn(3, 24)
    with pytest.raises(RuntimeError, match="cannot write over its own input"):
        torch.ops.microglia.block_linear_(tokens, *linear.places[:3], None, tokens, 24, 0)
    with pytest.raises(RuntimeError, match="must lie in memory as the output would"):
        torch.ops.microglia.block_linear_(tokens, *linear.places[:3], None, torch.randn(24, 3).T, 24, 0)
    rows = torch.randn(6, 24)
    for first in (1, 2):  # shares some rows with the input, before it and behind it
        for given, other in ((rows[:3], rows[first : first + 3]), (rows[first : first + 3], rows[:3])):
            with pytest.raises(RuntimeError, match="cannot write over its own input"):
                torch.ops.microglia.block_linear_(given, *linear.places[:3], None, other, 24, 0)
    torch.ops.microglia.block_linear_(rows[:3], *linear.places[:3], None, rows[3:], 24, 0)  # neighbours share nothing


# ------------------------------------------------------------------------------------------------------------- bfloat16
@pytest.mark.parametrize("shape", [(1, 1), (17, 5), (40, 8, 3, 3), (33, 33, 1, 1), (48, 64, 3, 3), (16, 70)])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_pairs_hold_the_weight_exactly(shape, width):
    weight = sparse(*shape).bfloat16()
    places = to_blocks(weight, width)
    assert torch.equal(dense_of_blocks(places, *shape[:2], shape[2:]), weight)
    assert places.values.shape[1:] == (max(width, 2) // 2, 16, 2)
    assert places.values.flatten(1).ne(0).any(1).all(), "a block of zeros is stored"


def test_there_are_as_few_pairs_as_can_be():
    def pairs(*kept, inputs=64):
        weight = torch.zeros(16, inputs).index_fill(1, torch.tensor(kept), 1).bfloat16()
        return to_blocks(weight, 1).channel.tolist()

    assert pairs(0, 1, 2, 3) == [0, 2]
    assert pairs(1, 2, 5, 6, 7) == [1, 5, 7]
    assert pairs(31, 32) == [30, 32], "no pair lies in two lines of 32"
    assert pairs(29, 30, 31) == [29, 30]
    assert pairs(16, inputs=17) == [16]


def test_a_layer_goes_to_bfloat16_and_back():
    x = torch.randn(2, 8, 6, 6)
    weight, bias = sparse(24, 8, 3, 3), torch.randn(24)
    module = BlockConv2d.of(site(weight, x, bias=bias, padding=(1, 1)), 1)
    assert module.to(torch.bfloat16) is module
    assert module(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(module.bias, bias), "the bias stays in float32"
    assert torch.equal(module.dense(), weight.bfloat16())
    state = load(save({name: tensor.contiguous() for name, tensor in module.state_dict().items()}))
    fresh = BlockConv2d.of(site(weight.bfloat16(), x.bfloat16(), bias=bias, padding=(1, 1)), 1)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x.bfloat16()), module(x.bfloat16()))
    back = module.to(torch.float32)
    assert torch.equal(back.dense(), weight.bfloat16().float())
    assert back.values.shape == (len(to_blocks(weight).values), 1, 16), "float32 keeps no halves of pairs that are zero"
    torch.testing.assert_close(back(x), torch.conv2d(x, weight.bfloat16().float(), bias, padding=1))


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_hostile_indices_are_refused_in_bfloat16_too(bad):
    x = torch.randn(1, 32, 7, 7)
    module = BlockConv2d.of(site(sparse(48, 32, 3, 3), x, padding=(1, 1)), 1).to(torch.bfloat16)
    (name, (place, value)), *_ = bad.items()
    getattr(module, name)[place] = value
    with pytest.raises(RuntimeError, match="block_conv2d"):
        module(x.bfloat16())


@pytest.mark.parametrize(("width", "channel"), [(1, 31), (4, 29), (8, 25), (8, 31)])
def test_a_pair_across_two_lines_is_refused(width, channel):
    module = BlockLinear.of(site(sparse(16, 64, density=1.0), torch.zeros(1, 64)), width).to(torch.bfloat16)
    module(torch.ones(1, 64).bfloat16())
    module.channel[0] = channel - 2
    if width < 8:
        module(torch.ones(1, 64).bfloat16())
    module.channel[0] = channel
    with pytest.raises(RuntimeError, match="multiple of 32"):
        module(torch.ones(1, 64).bfloat16())


@pytest.mark.parametrize("isa", [level(), "torch"])
def test_mixed_types_are_refused_in_words(isa):
    code = """
import torch
from microglia.runtime import BlockConv2d, BlockLinear
from microglia.runtime.sparse_layers.layout import to_blocks
for layer, x in ((BlockLinear(to_blocks(torch.eye(20)), None, 20, 20), torch.ones(3, 20)),
                 (BlockConv2d(to_blocks(torch.ones(20, 4, 1, 1)), None, 4, 20, (1, 1)), torch.ones(1, 4, 5, 5))):
    narrow = torch.bfloat16
    for module_type, x_type, other_type, said in ((torch.float32, narrow, None, "both must be of one type"),
                                                  (narrow, torch.float32, None, "both must be of one type"),
                                                  (narrow, narrow, torch.float32, "the residual"),
                                                  (torch.float32, torch.float32, narrow, "the residual")):
        layer = layer.to(module_type)
        other = None if other_type is None else layer(x.to(x_type)).to(other_type)
        try:
            layer(x.to(x_type), other)
        except Exception as error:
            assert said in str(error) and "float" in str(error), error
        else:
            raise SystemExit("mixed types ran")
print("refused")
"""
    done = process(code, MICROGLIA_ISA=isa)
    assert done.stdout.strip() == "refused", done.stdout + done.stderr[-2000:]


def test_a_row_layer_in_bfloat16_is_refused_in_words():
    x = torch.randn(1, 8, 6, 6)
    module = RowConv2d.of(site(sparse(24, 8, 3, 3, tall=4), x), 4).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="microglia"):
        module(x.bfloat16())


def test_infinity_and_not_a_number_pass_in_bfloat16():
    weight, x = sparse(16, 16, 1, 1, density=1.0), torch.randn(1, 16, 5, 5).bfloat16()
    x[0, 3, 2, 2], x[0, 3, 1, 1] = torch.nan, torch.inf
    out = BlockConv2d.of(site(weight, x.float(), activation="relu"), 1).to(torch.bfloat16)(x)
    assert out[0, :, 2, 2].isnan().all()
    assert torch.equal(out[0, :, 1, 1].isinf(), weight[:, 3, 0, 0] > 0)
    assert out[0, :, 0].isfinite().all()


def test_a_model_of_blocks_in_bfloat16_compiles_whole_and_exports():
    x = torch.randn(2, 8, 6, 6)
    first = BlockConv2d.of(site(sparse(24, 8, 3, 3), x, activation="silu", padding=(1, 1)), 1)
    last = BlockLinear.of(site(sparse(10, 24), torch.zeros(2, 24), bias=torch.ones(10)), 2)
    model = nn.Sequential(first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last).to(torch.bfloat16).eval()
    expected = model(x.bfloat16())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.bfloat16()), expected)
    torch.testing.assert_close(torch.export.export(model, (x.bfloat16(),)).module()(x.bfloat16()), expected)
    for layer, given in ((first, x), (last, torch.randn(3, 24))):
        operands = layer._operands(None) if layer is first else (*layer.places[:3], layer.bias, None, 10, 0)
        name = "block_conv2d" if layer is first else "block_linear"
        operator = getattr(torch.ops.microglia, name).default
        torch.library.opcheck(operator, (given.bfloat16(), *operands), test_utils=("test_schema", "test_faketensor"))


def test_geometries_that_no_memory_holds_are_refused_or_right():
    module = BlockConv2d.of(site(sparse(16, 1, 2, 2, density=1.0), torch.zeros(1, 1, 4, 4)), 1)
    module(torch.zeros(1, 1, 4, 4))  # leaves scratch behind
    for stride, padding, dilation in (([1, 2**31 - 1], [2**25, 0], [2**26, 1]), ([1, 1], [2**25, 2**25], [2**26, 2**26])):
        module.geometry = ([2, 2], stride, padding, dilation)
        with pytest.raises(RuntimeError, match="block_conv2d"):
            module(torch.zeros(1, 1, 2, 2))


def test_other_activations_and_widths_are_refused_in_words():
    with pytest.raises(MicrogliaError, match="relu6"):
        BlockLinear(to_blocks(torch.ones(16, 4)), None, 4, 16, activation="gelu")
    with pytest.raises(MicrogliaError, match="1, 2, 4 or 8"):
        to_blocks(torch.ones(16, 4), 3)


def test_not_a_number_passes_through_relu():
    x = torch.randn(1, 16, 5, 5)
    x[0, 3, 2, 2] = torch.nan
    weight = sparse(16, 16, 1, 1, density=1.0)
    for kind in (BlockConv2d, RowConv2d):
        out = kind.of(site(weight, x, activation="relu"), 1)(x)
        assert out[0, :, 2, 2].isnan().all()
        assert not out[0, :, 0].isnan().any()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        x = torch.zeros(2, 8, 6, 6)
        self.first = BlockConv2d.of(site(sparse(24, 8, 3, 3), x, activation="relu", padding=(1, 1)), 1)
        self.second = RowConv2d.of(site(sparse(24, 24, 1, 1, tall=4), torch.zeros(2, 24, 6, 6)), 4)
        self.last = BlockLinear.of(site(sparse(10, 24), torch.zeros(2, 24), bias=torch.ones(10)), 2)

    def forward(self, x):
        y = self.first(x)
        return self.last(self.second(y, y).mean((2, 3)))


def test_a_sparse_model_compiles_whole_and_exports():
    model, x = Net().eval(), torch.randn(2, 8, 6, 6)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


def test_the_operators_keep_the_rules_of_custom_operators():
    x = torch.randn(2, 8, 6, 6)
    block, row = (kind.of(site(sparse(24, 8, 3, 3), x, padding=(1, 1)), 1) for kind in (BlockConv2d, RowConv2d))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.microglia.block_conv2d.default, (x, *block._operands(None)), test_utils=tests)
    torch.library.opcheck(torch.ops.microglia.row_conv2d.default, (x, *row._operands(None)), test_utils=tests)
    rows, columns, geometry = torch.tensor([1, 20]), torch.arange(0, 8, 2), ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    values = every_block(sparse(24, 8, 3, 3))
    for given in ((x, values, None, None), (x[:, ::2].contiguous(), values, rows, columns)):
        torch.library.opcheck(torch.ops.microglia.part_conv2d.default, (*given, None, 24, *geometry), test_utils=tests)
    gate = (x[:1], None, torch.randn(24, 8), torch.randn(24), True, False)
    torch.library.opcheck(torch.ops.microglia.gate_rows.default, gate, test_utils=tests)
    torch.library.opcheck(
        torch.ops.microglia.add_rows.default, (x, x[:, :2].contiguous(), rows[:1].repeat(2).cumsum(0)), test_utils=tests
    )
    linear = BlockLinear.of(site(sparse(10, 8), torch.zeros(3, 8)), 1)
    given = (torch.randn(3, 8), *linear.places[:3], None, None, 10, 1)
    torch.library.opcheck(torch.ops.microglia.block_linear.default, given, test_utils=tests)
    over = (given[0], *linear.places[:3], None, torch.randn(3, 10), 10, 1)
    torch.library.opcheck(torch.ops.microglia.block_linear_.default, over, test_utils=tests)
    image = torch.randn(2, 24, 6, 6).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.microglia.block_conv2d_.default, (x, *block._operands(image)), test_utils=tests)


def test_sparse_weights_are_plain_tensors():
    model, x = Net().eval(), torch.randn(2, 8, 6, 6)
    expected = model(x)
    state = load(save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))
    fresh = Net().eval()
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), expected)
    assert torch.equal(copy.deepcopy(model).to("cpu")(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert torch.equal(model.first.dense(), sparse(24, 8, 3, 3))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() > 0


def test_two_threads_and_forked_workers_give_the_same_bits():
    code = """
import os, sys, torch
sys.path.insert(0, {folder!r})
from test_runtime_kernels import Net
model, x = Net().eval(), torch.randn(8, 8, 6, 6, generator=torch.Generator().manual_seed(0))
torch.set_num_threads(1); one = model(x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(model(x), one) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
torch.set_num_threads(2)
assert torch.equal(model(x), one)
loader = torch.utils.data.DataLoader([0, 1, 2], num_workers=2, collate_fn=lambda _: model(x), multiprocessing_context="fork")
assert all(torch.equal(out, one) for out in loader)
print("same")
"""
    done = process(code.format(folder=str(Path(__file__).parent)), OMP_NUM_THREADS="2")
    assert done.stdout.strip().endswith("same"), done.stderr[-2000:]


def test_without_compiled_kernels_it_says_so_once_and_goes_on(tmp_path):
    package = tmp_path / "microglia"
    source = Path(microglia.runtime.__file__).parents[1]
    subprocess.run(["cp", "-r", str(source), str(package)], check=True)
    for built in package.glob("runtime/_kernels*"):
        built.unlink()
    code = "import warnings, torch; from microglia.runtime import *\n"
    code += "from microglia.runtime.sparse_layers.layout import to_blocks\n"
    code += "with warnings.catch_warnings(record=True) as said:\n    warnings.simplefilter('always')\n"
    code += "    for _ in range(2): print(BlockLinear(to_blocks(torch.eye(20)), None, 20, 20)(torch.ones(20)).sum().item())\n"
    code += "print(sum('without its compiled kernels' in str(w.message) for w in said), level())"
    done = process(code, PYTHONPATH=str(tmp_path))
    assert done.stdout.split() == ["20.0", "20.0", "1", "torch"], done.stderr[-2000:]


def test_a_level_between_two_runs_the_lower_one():
    """VNNI without bfloat16 has no kernels of its own in float32: it runs those of AVX-512, to the bit."""
    code = (
        "import torch\nfrom microglia.runtime import BlockLinear\n"
        "from microglia.runtime.sparse_layers.layout import to_blocks\n"
        "torch.manual_seed(0); w, x = torch.randn(64, 200), torch.randn(9, 200)\n"
        "print(BlockLinear(to_blocks(w), None, 200, 64)(x).numpy().tobytes().hex())"
    )
    bits = {isa: process(code, MICROGLIA_ISA=isa).stdout for isa in HERE}
    assert all(bits.values())
    wide = {bits[isa] for isa in HERE if LEVELS.index(isa) >= LEVELS.index("avx512")}
    assert len(wide) <= 1
    assert bits["generic"] not in wide


def test_a_level_that_this_machine_has_not_is_refused():
    missing = [isa for isa in LEVELS if isa not in HERE]
    for isa in missing:
        done = process("import microglia.runtime as r; r.level()", MICROGLIA_ISA=isa)
        assert done.returncode != 0
        assert f"asks for {isa!r}, but the best that this machine can run is {level()!r}" in done.stderr
    flags = Path("/proc/cpuinfo").read_text().split()
    assert ("avx512bf16" in missing) == ("avx512_bf16" not in flags)


def test_the_c_interface_says_what_is_wrong():
    built = next(Path(microglia.runtime.__file__).parent.glob("_kernels*.so"))
    library = ctypes.CDLL(str(built))
    library.mg_error_text.restype = library.mg_level_name.restype = ctypes.c_char_p
    texts = {library.mg_error_text(code) for code in range(12)}
    assert len(texts) == 12
    assert library.mg_level_name(library.mg_level()).decode() in LEVELS
