"""NaN and infinity through every kernel and through `accelerate`, and autocast around an accelerated model."""

import fnmatch
import importlib
import json
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fresh
import microglia as mg
from microglia.core.errors import MicrogliaError
from microglia.core.timing import Timing
from microglia.runtime import BlockConv2d, BlockLinear, RowConv2d, accelerate, level
from microglia.runtime.dense.fusion import Activation, Site
from microglia.runtime.operators import LEVELS
from microglia.runtime.sparse_layers.layout import every_block

ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu, "relu6": F.relu6, "silu": F.silu}
VALUES = (torch.nan, torch.inf, -torch.inf)


def problems():
    """Returns the kernels of this process's level whose outputs have NaN or infinity elsewhere than PyTorch's."""
    torch.manual_seed(0)
    return [
        problem for name in ACTIVATIONS for value in VALUES for side in (3, 14, 33) for problem in convolved(name, value, side)
    ]


def convolved(name, value, side):
    weight, bias, x = torch.randn(33, 8, 3, 3), torch.randn(33), torch.randn(1, 8, side, side)
    x[0, 1, side // 2, side // 2] = value
    other = torch.randn(1, 33, side, side)
    other[0, :, 0, 0] = value
    bare, activation = F.conv2d(x, weight, bias, padding=1), ACTIVATIONS[name]
    found = {}
    for rest in (None, other):
        shapes = tuple(x.shape), tuple(other.shape)
        site = Site("c", "conv2d", weight, bias, *shapes, Activation(name), rest is not None, padding=(1, 1))
        right = activation(bare if rest is None else bare + rest)
        for kind, width in ((BlockConv2d, 1), (BlockConv2d, 8), (RowConv2d, 1), (RowConv2d, 2), (RowConv2d, 4)):
            found[f"{kind.__name__} {width} {rest is not None}"] = kind.of(site, width)(x, rest), right
        narrow = [None if given is None else given.bfloat16() for given in (x, rest)]
        found[f"bfloat16 {rest is not None}"] = BlockConv2d.of(site, 1).to(torch.bfloat16)(*narrow).float(), right
    how = (bias, 33, [3, 3], [1, 1], [1, 1], [1, 1], tuple(ACTIVATIONS).index(name))
    values, rows, right = every_block(weight), torch.arange(0, 33, 2), activation(bare)
    found["part"] = torch.ops.microglia.part_conv2d(x, values, rows, None, *how), right[:, rows]
    found["gated"] = torch.ops.microglia.gated_conv2d(x, values, torch.arange(8).int(), torch.arange(3).int(), *how), right
    tokens = x[0, :, side // 2]
    linear = Site("l", "linear", weight[:, :, 0, 0], bias, (side, 8), (side, 33), Activation(name))
    found["linear"] = BlockLinear.of(linear, 1)(tokens.T), activation(F.linear(tokens.T, weight[:, :, 0, 0], bias))
    return [f"{key}, {name}, {value}, {side}" for key, (got, right) in found.items() if kinds(got) != kinds(right)]


def kinds(t):
    """Returns where a tensor is NaN, infinite and minus infinite."""
    return [(f(t)).flatten().tolist() for f in (torch.isnan, torch.isposinf, torch.isneginf)]


@pytest.mark.parametrize("isa", LEVELS[: LEVELS.index(level()) + 1])
def test_every_kernel_passes_nan_and_infinity_as_pytorch_does(isa):
    code = "import json, test_runtime_values as t; print(json.dumps(t.problems()))"
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    done = fresh.run(code, environment={"MICROGLIA_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("channel", [0, 3, 5])
@pytest.mark.parametrize("maximum", [True, False])
def test_a_gate_that_sees_one_nan_keeps_nothing(maximum, channel):
    torch.manual_seed(0)
    x = torch.randn(1, 6, 8, 8)
    x[0, channel, 2, 3] = torch.nan
    for softmax in (True, False):
        assert not len(torch.ops.microglia.gate_rows(x, None, torch.randn(9, 6), torch.ones(9), softmax, maximum))


class Net(nn.Module):
    """A network in which a weight that is left out is between an input and every output."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(F.relu6(self.body(x) + x).mean((2, 3)))


def pruned(density=0.3, pattern=None):
    torch.manual_seed(0)
    model = Net()
    mg.methods.OneShot(model, pattern=pattern or mg.Block(16, 1), density=density, scope="layer").finish()
    return model.eval()


@pytest.fixture
def prefer(monkeypatch):
    """Makes the timing find one way the fastest wherever it is offered."""

    def patch(*favourites):
        def times(calls, **settings):
            ranks = {name: 1.0 + i - 100 * any(fnmatch.fnmatch(name, f) for f in favourites) for i, name in enumerate(calls)}
            return {name: Timing(*[rank] * 3, 1) for name, rank in ranks.items()}

        monkeypatch.setattr(importlib.import_module("microglia.runtime.accelerate"), "time_interleaved", times)

    return patch


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    "ways", [("sparse", "block 16x1"), ("sparse, mixed*", "rows*", "unstr*"), ("dense, layer*", "dense"), ("packed",)]
)
def test_an_accelerated_model_gives_the_models_nan_and_infinity(ways, value, prefer):
    prefer(*ways)
    model, x = pruned(0.1, mg.Block(4, 1) if "rows*" in ways else None), torch.randn(4, 3, 10, 10)
    fast = accelerate(model, x, against=("eager", "packed"), cache=None)
    assert fnmatch.fnmatch(fast.report().chosen, ways[0])
    x[1, 2, 4, 4] = value
    expected = model(x)
    assert not expected[1].isfinite().all()
    torch.testing.assert_close(fast(x), expected, equal_nan=True)


def test_finite_inputs_stay_in_the_fast_execution():
    model, x = pruned(), torch.randn(2, 3, 10, 10)
    fast = accelerate(model, x, against=("eager",), cache=None)
    fast.dense = None
    assert fast(x).shape == (2, 5)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(TypeError):
        fast(x)


def test_autocast_is_refused_in_words():
    model, x = pruned(), torch.randn(2, 3, 10, 10)
    fast = accelerate(model, x, against=("eager",), cache=None)
    with torch.autocast("cpu", torch.bfloat16):
        for call in (lambda: fast(x), lambda: fast(x[:1]), lambda: accelerate(model, x, cache=None)):
            with pytest.raises(MicrogliaError, match=r'Autocast is on for cpu.*precision="bf16"'):
                call()
        with torch.autocast("cpu", enabled=False):
            torch.testing.assert_close(fast(x), model(x))
