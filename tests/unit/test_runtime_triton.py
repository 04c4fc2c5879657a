"""The kernels of the GPU, without one: run in Triton's interpreter, compiled for two GPUs, and their indices checked."""

import itertools
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fresh
from microglia.core.errors import MicrogliaError
from microglia.runtime import BlockConv2d, BlockLinear
from microglia.runtime import operators as library
from microglia.runtime.dense.fusion import Site
from microglia.runtime.devices import CPU, device_of
from microglia.runtime.gpu.candidates import block_forms, cuda_candidates
from microglia.runtime.gpu.semi_structured import SemiStructuredLinear, too_dense_groups, why_not
from microglia.runtime.gpu.triton.check import check_once, check_places
from microglia.runtime.gpu.triton.tiles import Tile, tiles
from microglia.runtime.sparse_layers.layout import STRIPES, WIDTHS, Places, dense_of_blocks, to_blocks

FOLDER = Path(__file__).parent


def interpreted(code, *words, **options):
    """Runs Python in a process of its own, in which the kernels run in Triton's interpreter; returns what it printed."""
    environment = {"TRITON_INTERPRET": "1", "MICROGLIA_ISA": "torch", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *sys.path])
    done = fresh.run(code, *words, environment=environment, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def sparse(*shape, tall=16, wide=1, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-shape[0] // tall), -(-shape[1] // wide), *shape[2:], generator=generator) < density
    kept = kept.repeat_interleave(tall, 0)[: shape[0]].repeat_interleave(wide, 1)[:, : shape[1]]
    return torch.randn(shape, generator=generator) * kept


def linear_site(weight, rows=64):
    return Site("layer", "linear", weight, None, (rows, weight.shape[1]), (rows, weight.shape[0]))


# --------------------------------------------------------------------------------------------------------------- results
def test_random_problems_equal_dense():
    found = interpreted(None, 24, 0, script=FOLDER / "triton_matrix.py")
    assert found["problems"] == 24
    assert not found["failures"], json.dumps(found["failures"], indent=1)[:3000]


def test_edges():
    """The first import registers the kernels for the CPU, so that the modules call them."""
    code = """
import json, torch
from dataclasses import replace
import microglia.runtime.gpu.triton.check as check, microglia.runtime.gpu.triton.launch as launch
from microglia.core.errors import MicrogliaError
from microglia.runtime.dense.fusion import Activation, Site
from microglia.runtime import BlockConv2d, BlockLinear
from microglia.runtime.gpu.triton import block_conv2d, block_linear

library = torch.library.Library("microglia", "IMPL")
library.impl("block_conv2d", block_conv2d, "CPU")
library.impl("block_linear", block_linear, "CPU")
torch.manual_seed(0)
found = {}

def site(weight, x, **settings):
    out = torch.conv2d(x, weight, padding=settings.get("padding", 0))
    return Site("c", "conv2d", weight, None, tuple(x.shape), tuple(out.shape), **settings)

def error(module, weight, x, padding):
    return float((module(x) - torch.conv2d(x, weight, padding=padding)).abs().max())

x, zeros = torch.randn(2, 20, 6, 5), torch.zeros(40, 20, 3, 3)
found["all zero"] = float(BlockConv2d.of(site(zeros, x), 1, 32)(x).abs().max())
weight = torch.randn(40, 20, 3, 3)
weight[16:32] = 0
module = BlockConv2d.of(site(weight, x, padding=(1, 1)), 1)
found["an empty stripe"] = error(module, weight, x, 1)
found["no images"] = list(module(x[:0]).shape)
image = torch.randn(1, 20, 1, 1)
found["one pixel"] = error(BlockConv2d.of(site(weight, image, padding=(1, 1)), 4), weight, image, 1)
large = torch.randn(16, 2, 7, 7)
found["49 taps"] = error(BlockConv2d.of(site(large, x[:, :2], padding=(3, 3)), 1), large, x[:, :2], 3)
x[0, 3, 2, 2] = torch.nan
out = BlockConv2d.of(site(torch.ones(16, 20, 1, 1), x, activation=Activation("relu")), 1)(x)
found["not a number"] = [bool(out[0, :, 2, 2].isnan().all()), bool(out[1].isnan().any())]
x[0, 3, 2, 2] = 0
half = module.half()(x.half())
found["half"] = [str(half.dtype), float((half.float() - torch.conv2d(x, weight, padding=1)).abs().max()) < 0.1]
narrow, bias = site(weight.bfloat16(), x.bfloat16(), padding=(1, 1)), torch.randn(40)
brief = BlockConv2d.of(replace(narrow, bias=bias), 1, paired=False)  # its bias stays in float32
out = brief(x.bfloat16())
wanted = torch.conv2d(x.bfloat16().float(), weight.bfloat16().float(), bias, padding=1)
found["bfloat16"] = [str(out.dtype), str(brief.bias.dtype), float(((out.float() - wanted).abs() / (1 + wanted.abs())).max())]

# Damaged indices, with the check that refuses them turned off: what lies outside counts as zero.
launch.check_once = lambda *args: None
damaged = BlockConv2d.of(site(weight, x, padding=(1, 1)), 1)
places = [int(v) for v in torch.randperm(len(damaged.values))[:6]]
damaged.channel[places[:3]] = torch.tensor([-1, 20, 2**31 - 1], dtype=torch.int32)
damaged.tap[places[3:]] = torch.tensor([9, 31, 255], dtype=torch.uint8)
damaged.row_pointer[-1] = 2**31 - 1
whole = BlockConv2d.of(site(weight, x, padding=(1, 1)), 1)
whole.values[places] = 0
found["damaged"] = float((damaged(x) - torch.conv2d(x, whole.dense(), padding=1)).abs().max())
print(json.dumps(found))
"""
    found = interpreted(code)
    assert found["all zero"] == 0
    assert found["bfloat16"][:2] == ["torch.bfloat16", "torch.float32"]
    assert found["bfloat16"][2] < 2**-7  # the interpreter cuts off instead of rounding
    assert found["no images"] == [0, 40, 6, 5]
    assert found["not a number"] == [True, False]
    assert found["half"] == ["torch.float16", True]
    for name in ("an empty stripe", "one pixel", "49 taps", "damaged"):
        assert found[name] < 1e-4, (name, found)


def test_accelerate_chooses_among_the_ways_of_a_gpu():
    """The whole of `accelerate` with a GPU's candidates, on the CPU: the times are made up, the outputs are not."""
    code = """
import dataclasses, importlib, json, torch
from torch import nn
import microglia as mg
from microglia.core.timing import Timing
from microglia.runtime import BlockConv2d, BlockLinear, devices
from microglia.runtime.gpu.candidates import cuda_candidates
from microglia.runtime.gpu.triton import block_conv2d, block_linear

library = torch.library.Library("microglia", "IMPL")
library.impl("block_conv2d", block_conv2d, "CPU")
library.impl("block_linear", block_linear, "CPU")
accelerate = importlib.import_module("microglia.runtime.accelerate")
accelerate.time_interleaved = lambda calls, **settings: {
    name: Timing(*[(0.1 if name.startswith(("block 64", "sparse")) else 1.0) * len(call() or "1")] * 3, 1)
    if name.startswith(("dense, e", "block", "2")) else Timing(*[0.1 if name == "sparse" else 1.0] * 3, 1)
    for name, call in calls.items()
}
devices.CPU = dataclasses.replace(devices.CPU, candidates=cuda_candidates, level=lambda: "triton", calls=2)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.second, self.last = nn.Conv2d(64, 64, 1), nn.Linear(64, 128)
    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.last((self.second(x) + x).mean((2, 3)))

torch.manual_seed(0)
model, x = Net(), torch.randn(2, 3, 6, 6)
model.norm.running_mean.normal_()
mg.methods.OneShot(model, pattern=mg.Block(64, 1), density=0.3, scope="layer").finish()
model.eval()
fast = mg.accelerate(model, x, against=("eager",), cache=None)
report = fast.report()
print(json.dumps({
    "chosen": [layer.chosen for layer in report.layers], "best": report.chosen, "level": report.level,
    "ways": [sorted(layer.times) for layer in report.layers], "notes": report.notes,
    "kinds": [type(m).__name__ for m in fast.fast.modules() if isinstance(m, (BlockConv2d, BlockLinear))],
    "error": float((fast(x) - model(x)).abs().max()),
}))
"""
    found = interpreted(code)
    assert found["chosen"] == ["block 64x1"] * 3, found
    assert (found["best"], found["level"]) == ("sparse", "triton")
    assert found["kinds"] == ["BlockConv2d", "BlockConv2d", "BlockLinear"]
    assert found["error"] < 1e-4
    assert {"dense", "dense, eager"} <= set(found["ways"][0])
    assert any("last as '2:4' was left out" in note for note in found["notes"])


# ----------------------------------------------------------------------------------------------------------------- layout
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(STRIPES), st.sampled_from(WIDTHS), st.integers(1, 140), st.integers(1, 70), st.sampled_from([1, 3]))
def test_blocks_of_every_size_hold_the_weight_exactly(stripe, width, outputs, inputs, side):
    weight = sparse(outputs, inputs, side, side, tall=min(stripe, 32), wide=width, seed=outputs)
    places = to_blocks(weight, width, stripe)
    assert torch.equal(dense_of_blocks(places, outputs, inputs, (side, side)), weight)
    assert places.values.shape[1:] == (width, stripe)
    check_places(places, outputs, inputs, (side, side))


def test_stripes_that_share_their_places_become_one():
    narrow, wide = to_blocks(weight := sparse(128, 40, 3, 3, tall=64), 1), to_blocks(weight, 1, 64)
    assert narrow.stored == wide.stored
    assert len(narrow.values) == 4 * len(wide.values)
    assert block_forms(weight) == [(64, 1)]
    assert block_forms(sparse(128, 128, tall=64, wide=64, density=0.5)) == [(64, 64), (64, 1)]
    assert block_forms(sparse(128, 128, tall=16)) == [(16, 1)]
    assert block_forms(torch.randn(128, 128)) == block_forms(torch.zeros(128, 128)) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_takes_half_precision(dtype):
    bound = {
        "rtol": 1.01 * {torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype],
        "atol": 1e-4,
    }  # rounded once, sums in float32
    x, weight = torch.randn(2, 32, 5, 5).to(dtype), sparse(64, 32, 3, 3, tall=64).to(dtype)
    site = Site("c", "conv2d", weight, None, tuple(x.shape), (2, 64, 5, 5), padding=(1, 1))
    module = BlockConv2d.of(site, 1, 64)
    out = library._convolution(dense_of_blocks, x, *module._operands(None))
    wanted = torch.conv2d(x.double(), weight.double(), padding=1)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, **bound)
    rows = x[:, :, 0, 0]
    linear = BlockLinear.of(linear_site(weight[:, :, 0, 0], 2), 1, 32)
    out = library._linear(rows, *linear.places[:3], None, None, 64, 0)
    torch.testing.assert_close(out.double(), rows.double() @ weight[:, :, 0, 0].double().t(), **bound)


# ---------------------------------------------------------------------------------------------------------------- indices
BAD = {
    "a channel below zero": ("channel", 0, -8, "begins at a channel"),
    "a channel past the input": ("channel", 3, 32, "begins at a channel"),
    "a channel far past the input": ("channel", 0, 2**31 - 8, "begins at a channel"),
    "a channel inside a block": ("channel", 1, 3, "multiple of its 8 inputs"),
    "a tap past the kernel": ("tap", 1, 9, "from 0 to 8"),
    "a row pointer that falls": ("row_pointer", 1, 10**6, "rise"),
    "a row pointer that begins late": ("row_pointer", 0, 3, "rise"),
    "a row pointer that ends early": ("row_pointer", -1, 0, "rise"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_hostile_indices_are_refused_also_after_a_good_call(bad):
    name, place, value, text = bad
    places = to_blocks(sparse(48, 32, 3, 3, wide=8), 8)
    check_once(places, 48, 32, (3, 3))
    getattr(places, name)[place] = value
    for _ in range(2):
        with pytest.raises(MicrogliaError, match=text):
            check_once(places, 48, 32, (3, 3))


def test_tensors_of_another_kind_are_refused():
    places = to_blocks(sparse(48, 32, 3, 3), 1)
    for changed in (
        places._replace(values=places.values[..., :8]),
        places._replace(values=places.values[0]),
        places._replace(row_pointer=places.row_pointer.long()),
        places._replace(row_pointer=places.row_pointer[:-1]),
        places._replace(channel=places.channel[:-1]),
        places._replace(tap=places.tap.int()),
        places._replace(tap=None),
    ):
        with pytest.raises(MicrogliaError):
            check_places(changed, 48, 32, (3, 3))
    with pytest.raises(MicrogliaError, match="16 outputs"):
        to_blocks(torch.ones(16, 16), 1, 48)


def test_indices_are_read_once_while_nobody_writes_into_them(monkeypatch):
    import microglia.runtime.gpu.triton.check as module

    seen = []
    monkeypatch.setattr(module, "check_places", lambda *args: seen.append(args))
    places = to_blocks(sparse(48, 32), 1)
    for _ in range(3):
        check_once(places, 48, 32, (1, 1))
    assert len(seen) == 1
    places.channel[0] = 1
    check_once(places, 48, 32, (1, 1))
    check_once(Places(*(None if t is None else t.clone() for t in places)), 48, 32, (1, 1))
    assert len(seen) == 3


# ---------------------------------------------------------------------------------------------------------------- choices
def test_why_a_layer_is_not_2_of_4():
    weight = torch.ones(128, 64).reshape(-1, 4)
    weight[:, 1:3] = 0
    weight = weight.reshape(128, 64).half()
    assert too_dense_groups(weight) == 0
    denser = weight.clone()
    denser[0, :3] = 1
    denser[1, :4] = 0
    assert too_dense_groups(denser) == 1
    for dense, text in (
        (weight.float(), "float16 or bfloat16"),
        (weight[:60], "multiples of 64"),
        (weight[:, :32].contiguous(), "multiples of 64"),
        (denser, "1 of 2048 groups"),
        (weight, "not on cpu"),
    ):
        assert text in why_not(linear_site(dense))
        with pytest.raises(MicrogliaError, match=re.escape(text)):
            SemiStructuredLinear(linear_site(dense))
        notes = []
        assert "2:4" not in [candidate.name for candidate in cuda_candidates(linear_site(dense), notes)]
        assert text in notes[0]
    notes = []
    assert [way.name for way in cuda_candidates(linear_site(torch.randn(64, 64)), notes)] == ["dense, eager"]
    assert not notes


def test_a_model_on_several_or_other_devices_is_refused_in_words():
    assert device_of([torch.zeros(1)]) is CPU
    for tensors in ([torch.zeros(1, device="meta")], [torch.zeros(1), torch.zeros(1, device="meta")]):
        with pytest.raises(MicrogliaError, match=r"one CUDA GPU, not on .*meta"):
            device_of(tensors)


def test_without_triton_everything_imports():
    code = """
import sys
sys.modules["triton"] = None
import microglia, microglia.runtime.gpu.triton, torch
from microglia.runtime import devices
from microglia.runtime import operators as library
print(devices.cuda_level(), library._on_cuda("block_linear", lambda x: x + 1)(1))
"""
    done = fresh.run(code)
    assert done.stdout.strip() == "none: triton is not installed 2", done.stderr[-2000:]


# ------------------------------------------------------------------------------------------------------------ compilation
def compiled(capability, tile, *, stripe=64, width=1, side=3, dtype="fp16"):
    """Returns a block kernel compiled for a GPU as a launch with sizes of multiples of 16 would; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from microglia.runtime.gpu.triton.kernel import block_kernel

    constants = {
        "KERNEL_H": side, "KERNEL_W": side, "STRIPE": stripe, "WIDTH": width, "PIXELS": tile.pixels, "COLUMNS": tile.columns,
        "ACTIVATION": 1, "HAS_TAP": side > 1, "HAS_BIAS": True, "HAS_RESIDUAL": True, "BORDER": side > 1, "FLAT": side == 1,
        "IMAGES_LAST": tile.turned, "WIDE": False, "PRECISION": "ieee", "WIDEN": False, "y_output": 1,
        "x_image" if tile.turned else "x_channel": 1, **({} if side > 1 else {"tap": None}),
    }  # fmt: skip
    names = block_kernel.arg_names
    pointers = dict.fromkeys(("x", "values", "bias", "residual", "y"), f"*{dtype}")
    pointers |= {"row_pointer": "*i32", "channel": "*i32", "tap": "*u8"}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    even = [*pointers, "images", "channels", "outputs", "readable", *(n for n in names if n.startswith(("x_", "y_")))]
    source = ASTSource(
        fn=block_kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even if signature[name] != "constexpr"},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": tile.warps, "num_stages": tile.stages}
    )


def copies(kernel):
    """Returns the bytes of the asynchronous copies of a kernel."""
    return {
        int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (0x\w+)", kernel.asm["ptx"])
    }


FAST = [*((tile, 1) for tile in tiles(1, 2) if tile.turned), *((tile, 64) for tile in tiles(64, 2)[:2])]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # what was compiled earlier proves nothing
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does unasked today, with a warning


@pytest.mark.parametrize(("tile", "width"), FAST, ids=str)
def test_it_compiles_for_hopper_with_its_matrix_instructions_and_whole_copies(tile, width):
    kernel = compiled(90, tile, width=width)
    assert len(kernel.asm["cubin"]) > 1000
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert 16 in copies(kernel)
    assert kernel.metadata.shared <= 227 * 1024
    assert not re.findall(r"ld\.global[\w.]*\.b16 ", kernel.asm["ptx"]), "an image is read element by element"


@pytest.mark.parametrize(
    ("capability", "settings"),
    [
        (80, {}),
        (80, {"dtype": "bf16", "width": 64}),
        (80, {"dtype": "fp32", "side": 1, "stripe": 16}),
        (90, {"dtype": "bf16", "stripe": 128}),
        (90, {"dtype": "bf16", "side": 1, "stripe": 32}),
        (90, {"dtype": "fp32", "width": 8}),
    ],
    ids=str,
)
def test_every_type_and_form_compiles(capability, settings):
    kernel = compiled(capability, tiles(settings.get("width", 1), 2)[0], **settings)
    assert len(kernel.asm["cubin"]) > 1000
    assert f".target sm_{capability}" in kernel.asm["ptx"]


def test_single_elements_are_only_read_where_the_image_is_not_turned():
    scattered = next(tile for tile in tiles(1, 2) if not tile.turned)
    assert re.findall(r"ld\.global[\w.]*\.b16 ", compiled(90, scattered).asm["ptx"])
    assert all(tile.pixels >= 64 for tile in itertools.chain(tiles(1, 2), tiles(64, 2)))
    assert isinstance(tiles(8, 2)[0], Tile)
    assert not any(tile.turned for tile in tiles(8, 2))
