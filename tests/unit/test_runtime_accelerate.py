"""`accelerate`: exact, never slower than dense by its own times, and honest about what it chose."""

import copy
import fnmatch
import importlib
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.core.running import folded_twin
from microglia.core.timing import Timing
from microglia.runtime import BlockChain, BlockConv2d, RowConv2d, accelerate, level
from microglia.runtime import timing_cache as choices_module
from microglia.runtime.bfloat16 import TOLERANCE, Lowered
from microglia.runtime.candidates import Compact, candidates
from microglia.runtime.dense.fusion import fuse
from microglia.runtime.precisions import precision_of
from microglia.runtime.timing_cache import Choices

module = importlib.import_module("microglia.runtime.accelerate")
FAST = ("eager", "packed")


class Net(nn.Module):
    """Residual, grouped, activations that fuse and others that do not, images and tokens."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.first, self.first_norm = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.down = nn.Conv2d(32, 48, 1, stride=2)
        self.grouped = nn.Conv2d(48, 48, 3, padding=1, groups=4)
        self.inner, self.head = nn.Linear(48, 40), nn.Linear(40, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.first_norm(self.first(x)) + x)
        x = nn.functional.silu(self.down(x))
        x = nn.functional.hardswish(self.grouped(x))
        return self.head(nn.functional.gelu(self.inner(x.mean((2, 3)))))


def net(pattern, density=0.3):
    torch.manual_seed(0)
    model = Net()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    mg.methods.OneShot(model, pattern=pattern, density=density, scope="layer").finish()
    return model.eval()


@pytest.fixture
def prefer(monkeypatch):
    """Makes the timing find one way the fastest wherever it is offered, so that a test sees it run."""

    def patch(*favourites):
        def times(calls, **settings):
            for call in calls.values():
                call()
            return {
                n: Timing(*[1.0 + i - 100 * any(fnmatch.fnmatch(n, f) for f in favourites)] * 3, 1) for i, n in enumerate(calls)
            }

        monkeypatch.setattr(module, "time_interleaved", times)

    return patch


WAYS = {
    "block 16x1": (mg.Block(16, 1), BlockConv2d),
    "block 16x8": (mg.Block(16, 8), BlockConv2d),
    "rows 4x1": (mg.Block(4, 1), RowConv2d),
    "unstructured": (mg.Unstructured(), RowConv2d),
    "compact": (mg.Channel(), Compact),
    "dense": (mg.Block(16, 1), nn.Module),
    "dense, eager": (mg.Block(16, 1), nn.Module),
}


def layers_of(fast):
    """Returns all modules that run, the layers of chains among them."""
    parts = list(fast.fast.modules())
    return parts + [layer for part in parts if isinstance(part, BlockChain) for layer in part.layers()]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_masked_models_outputs(way, prefer):
    pattern, kind = WAYS[way]
    model, x = net(pattern), torch.randn(2, 3, 12, 12)
    before = copy.deepcopy(model.state_dict())
    prefer("sparse, mixed*" if kind is RowConv2d else "dense, layer*" if way.startswith("dense") else "sparse", way)
    fast = accelerate(model, x, against=FAST, cache=None)
    assert sum(layer.chosen == way for layer in fast.report().layers) >= 2
    assert any(isinstance(part, kind) for part in layers_of(fast))
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_report_names_every_layer_in_order_and_all_times():
    model, x = net(mg.Block(16, 1)), torch.randn(1, 3, 12, 12)
    report = accelerate(model, x, against=FAST, cache=None).report()
    assert [layer.name for layer in report.layers] == ["stem", "first", "down", "grouped", "inner", "head"]
    assert report.layers[1].density == pytest.approx(0.3, abs=0.01)
    for layer in report.layers:
        assert {"dense", "dense, eager"} <= set(layer.times)
        assert ("block 16x1" in layer.times) == (layer.name != "grouped")  # 12 outputs a group: no block fits in one
        assert layer.chosen in layer.times
    assert report.speedup == report.times[report.best_dense] / report.times[report.chosen]
    assert (report.level, report.threads) == (level(), torch.get_num_threads())
    text = str(report)
    assert "grouped" in text
    assert "the best dense" in text
    assert json.loads(json.dumps(report.to_dict()))["chosen"] == report.chosen


def test_what_lost_as_a_whole_falls_back_to_the_best_dense_execution(prefer):
    model, x = net(mg.Block(16, 1)), torch.randn(2, 3, 12, 12)
    prefer("block*", "packed")  # each layer alone wins, the whole does not
    fast = accelerate(model, x, against=FAST, cache=None)
    assert fast.report().chosen == "packed"
    assert all(layer.chosen.startswith("dense") and "as a whole" in layer.why for layer in fast.report().layers)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


def test_other_shapes_run_in_the_dense_model():
    model, x = net(mg.Block(16, 1)), torch.randn(2, 3, 12, 12)
    fast = accelerate(model, x, against=FAST, cache=None)
    for other in (torch.randn(5, 3, 12, 12), torch.randn(2, 3, 20, 16)):
        torch.testing.assert_close(fast(other), model(other), rtol=1e-5, atol=1e-6)


def test_it_is_for_inference_and_can_be_copied():
    model, x = net(mg.Block(16, 1)), torch.randn(2, 3, 12, 12)
    fast = accelerate(model, x, against=FAST, cache=None)
    assert not fast(x).requires_grad
    assert nn.Sequential(fast).train()[0] is fast
    assert not fast.training
    assert fast.to("cpu") is fast
    for change in (fast.double, lambda: fast.load_state_dict(fast.state_dict())):
        with pytest.raises(MicrogliaError, match="accelerated model"):
            change()
    torch.testing.assert_close(copy.deepcopy(fast)(x), fast(x))


def test_times_are_kept_for_a_machine_and_measured_anew_for_another_layer(tmp_path, monkeypatch):
    model, x = net(mg.Block(16, 1)), torch.randn(2, 3, 12, 12)
    first = accelerate(model, x, against=FAST, cache=tmp_path).report()
    calls = []
    timed = module._time
    monkeypatch.setattr(module, "_time", lambda site, *rest: calls.append(site.name) or timed(site, *rest))
    again = accelerate(model, x, against=FAST, cache=tmp_path).report()
    assert not calls
    assert [layer.times for layer in again.layers] == [layer.times for layer in first.layers]
    model.first.parametrizations.weight[0].mask[:16] = 0
    accelerate(model, x, against=FAST, cache=tmp_path)
    assert calls == ["first"]
    calls.clear()
    monkeypatch.setattr(choices_module, "processor_name", lambda: "another processor")
    accelerate(model, x, against=FAST, cache=tmp_path)
    assert len(calls) == 6


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"a": 1}', b'{"a": {"b": "c"}}', b'{"a": {"dense": NaN}}', b"\xff\x00"]
)
def test_a_damaged_cache_counts_as_empty(tmp_path, content):
    Choices(tmp_path).save()
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    Choices(tmp_path).save()
    assert file.read_text() == "{}"


def test_a_model_is_timed_anew_beside_a_damaged_cache(tmp_path):
    model, x = net(mg.Block(16, 1)), torch.randn(1, 3, 8, 8)
    Choices(tmp_path).save()
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"{")
    accelerate(model, x, against=FAST, cache=tmp_path)
    assert len(json.loads(file.read_text())) == 6


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("in the way")
    model, x = net(mg.Block(16, 1)), torch.randn(1, 3, 8, 8)
    fast = accelerate(model, x, against=FAST, cache=tmp_path / "file")
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_empty_layer_and_a_model_without_zeros_are_exact(prefer):
    x = torch.randn(1, 3, 12, 12)
    prefer("sparse", "block*", "rows*")
    for density in (1.0, 0.02):
        model = net(mg.Block(16, 1), density)
        with torch.no_grad():
            model.first.parametrizations.weight[0].mask.zero_()
        torch.testing.assert_close(accelerate(model, x, against=FAST, cache=None)(x), model(x), rtol=1e-5, atol=1e-6)


class Asks(nn.Module):
    """Behaves by a flag, a number and a tensor given by name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x, flag=True, scale=1.0, *, shift=None):
        y = self.conv(x) * scale
        y = y if shift is None else y + shift
        return y.relu() if flag else y


def test_other_arguments_run_in_the_dense_model():
    torch.manual_seed(0)
    model, x, shift = Asks().eval(), torch.randn(2, 3, 8, 8), torch.randn(2, 16, 8, 8)
    fast = accelerate(model, (x, True, 1.0), against=FAST, cache=None)
    for args, kwargs in (((x, False, 1.0), {}), ((x, True, 3.0), {}), ((x,), {"shift": shift}), ((), {"x": x, "flag": False})):
        torch.testing.assert_close(fast(*args, **kwargs), model(*args, **kwargs), rtol=1e-5, atol=1e-6)
    named = accelerate(model, {"x": x, "shift": shift}, against=FAST, cache=None)
    for kwargs in ({"x": x, "shift": shift}, {"x": x, "shift": -shift}, {"x": x}):
        torch.testing.assert_close(named(**kwargs), model(**kwargs), rtol=1e-5, atol=1e-6)


class Views(nn.Module):
    """Views and writes that are right in one layout and wrong in another."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.head = kind, nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 64, 7)

    def forward(self, x, b):
        y = self.conv(x)
        if self.kind == "view":
            return self.head(y.contiguous().view(y.size(0), -1)) + b
        if self.kind == "write through a view":
            y.flatten(1).mul_(b)
            return y
        if self.kind == "a view of what is written":
            flat = y.flatten(1)
            y.mul_(b)
            return flat
        x.mul_(b)  # its own input
        return self.conv(x)


@pytest.mark.parametrize("kind", ["view", "write through a view", "a view of what is written", "its own input"])
@pytest.mark.parametrize("favourite", ["sparse", "packed"])
def test_views_and_writes_mean_what_they_meant(kind, favourite, prefer):
    torch.manual_seed(0)
    model, x = Views(kind).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.conv.weight.mul_(torch.rand_like(model.conv.weight[:1]) < 0.3)
    prefer(favourite, "block*")
    fast = accelerate(model, (x, torch.ones(1)), against=FAST, cache=None)
    assert fast.report().chosen == favourite
    for b in (torch.ones(1), torch.full((1,), 3.0)):
        torch.testing.assert_close(fast(x.clone(), b), model(x.clone(), b), rtol=1e-5, atol=1e-5)


def test_large_kernels_run_dense_and_depthwise_ones_are_not_expanded():
    x = torch.randn(1, 3, 40, 40)
    model = nn.Sequential(nn.Conv2d(3, 16, 17, stride=4), nn.Conv2d(16, 16, 3, groups=16)).eval()
    fast = accelerate(model, x, against=FAST, cache=None)
    assert all(way.startswith("dense") for layer in fast.report().layers for way in layer.times)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_way_that_fails_is_left_out_with_a_note(monkeypatch):
    model, x = net(mg.Block(16, 1)), torch.randn(1, 3, 12, 12)
    monkeypatch.setattr(BlockConv2d, "forward", lambda self, x, other=None: torch.zeros(()))
    fast = accelerate(model, x, against=FAST, cache=None)
    assert any("block 16x1" in note and "left out" in note for note in fast.report().notes)
    assert all(not layer.chosen.startswith("block") for layer in fast.report().layers if layer.kind == "conv2d")
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_traced_is_refused_in_words():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            y = self.layer(x)
            return y if y.sum() > 0 else -y

    with pytest.raises(MicrogliaError, match="cannot be traced"):
        accelerate(Branch(), torch.randn(2, 4), cache=None)


def test_wrong_input_is_refused_in_words():
    model = net(mg.Block(16, 1))
    with pytest.raises(MicrogliaError, match="does not run on the example inputs"):
        accelerate(model, torch.randn(1, 4, 12, 12), cache=None)
    with pytest.raises(MicrogliaError, match="no 2-d convolution or linear layer"):
        accelerate(nn.Sequential(nn.ReLU()), torch.randn(2, 3), cache=None)
    with pytest.raises(MicrogliaError, match="float32"):
        accelerate(nn.Sequential(nn.Linear(4, 4).double()), torch.randn(2, 4).double(), cache=None)
    with pytest.raises(MicrogliaError, match="execution"):
        accelerate(model, torch.randn(1, 3, 12, 12), against=("tvm",), cache=None)


def test_a_shrunk_and_masked_model_is_accelerated_too():
    model, x = net(mg.Channel(), 0.5), torch.randn(2, 3, 12, 12)
    small = mg.prune_channels(net(mg.Block(16, 1), 1.0), x, mg.Budget(density=0.5))
    torch.testing.assert_close(accelerate(small, x, against=FAST, cache=None)(x), small(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(accelerate(model, x, against=FAST, cache=None)(x), model(x), rtol=1e-5, atol=1e-6)


def test_wider_blocks_are_offered_only_where_they_fit():
    def names(pattern):
        found = []

        def note(site):
            found.append([candidate.name for candidate in candidates(site)])
            return nn.Identity()

        fuse(folded_twin(net(pattern)), Example.of(torch.randn(1, 3, 12, 12)), note)
        return found[1]

    assert names(mg.Block(16, 8)) == ["dense, eager", "dense", "block 16x1", "block 16x8", "rows 4x1"]
    assert names(mg.Block(16, 1)) == ["dense, eager", "dense", "block 16x1", "rows 4x1"]
    assert names(mg.Unstructured())[-1] == "unstructured"


# ------------------------------------------------------------------------------------------------------------- bfloat16
ONEDNN = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether oneDNN has layers in bfloat16 here: it wants AVX-512."""
BF16_WAYS = {
    "block 16x2": (mg.Block(16, 1), BlockConv2d),
    "block 16x8": (mg.Block(16, 8), BlockConv2d),
    "compact": (mg.Channel(), Compact),
    "dense, eager": (mg.Block(16, 1), nn.Module),
}


@pytest.mark.parametrize("way", [way for way in BF16_WAYS if ONEDNN or way != "compact"])
def test_every_way_in_bfloat16_is_near_the_masked_model_and_rounds(way, prefer):
    pattern, kind = BF16_WAYS[way]
    model, x = net(pattern), torch.randn(2, 3, 12, 12)
    prefer("sparse, bf16", "dense, layer by layer, bf16", way)
    fast = accelerate(model, x, against=FAST, precision="bf16", cache=None)
    report, expected = fast.report(), model(x).detach()
    assert (report.precision, report.chosen) == ("bf16", f"{'dense, layer by layer' if kind is nn.Module else 'sparse'}, bf16")
    assert any(layer.chosen == way for layer in report.layers)
    assert any(isinstance(part, kind) for part in fast.fast.modules())
    assert all(part.values.dtype == torch.bfloat16 for part in fast.fast.modules() if isinstance(part, BlockConv2d))
    out = fast(x)
    assert out.dtype == torch.float32
    assert 0 < float((out - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
    assert torch.equal(fast(x[:1]), fast.dense(x[:1])), "another shape runs in float32"


def test_bfloat16_is_timed_against_dense_in_both_precisions():
    model, x = net(mg.Block(16, 1)), torch.randn(2, 3, 12, 12)
    report = accelerate(model, x, against=FAST, precision="bf16", cache=None, rounds=1).report()
    assert {*FAST, "bf16 eager"} <= {*report.times}
    assert len({"sparse, bf16", "dense, layer by layer, bf16"} & {*report.times}) == 1
    # oneDNN has no bfloat16 on some processors, which must be said.
    assert "bf16 packed" in report.times or any("bf16 packed was left out" in note for note in report.notes)
    assert report.speedup >= 1
    assert "timed in bf16" in str(report)


def test_bfloat16_that_lost_leaves_float32(prefer):
    model, x = net(mg.Block(16, 1)), torch.randn(2, 3, 12, 12)
    prefer("packed")
    fast = accelerate(model, x, against=FAST, precision="bf16", cache=None)
    assert fast.report().chosen == "packed"
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_execution_too_far_from_float32_is_left_out(monkeypatch):
    monkeypatch.setattr(importlib.import_module("microglia.runtime.bfloat16"), "TOLERANCE", 0.0)
    strict = replace(precision_of("bf16"), tolerance=0.0)
    monkeypatch.setattr(module, "precision_of", lambda name: strict)
    report = accelerate(
        net(mg.Block(16, 1)), torch.randn(2, 3, 12, 12), against=FAST, precision="bf16", cache=None, rounds=1
    ).report()
    assert {*report.times} == {*FAST}
    assert len([note for note in report.notes if "bf16" in note and "outputs differ" in note]) >= 2 + ONEDNN


def test_times_in_bfloat16_are_kept_apart(tmp_path):
    model, x = net(mg.Block(16, 1)), torch.randn(2, 3, 12, 12)
    for precision, kept in (("float32", 6), ("bf16", 12), ("bf16", 12)):
        accelerate(model, x, against=("eager",), precision=precision, cache=tmp_path, rounds=1)
        (file,) = tmp_path.glob("*.json")
        assert len(json.loads(file.read_text())) == kept


def test_another_precision_is_refused_in_words():
    with pytest.raises(MicrogliaError, match=r"float32, bf16 or int8, not in 'fp8'"):
        accelerate(net(mg.Block(16, 1)), torch.randn(2, 3, 12, 12), precision="fp8", cache=None)


def test_a_lowered_model_leaves_integers_alone():
    model = Lowered(lambda ids, scale: (ids, scale * 2))
    ids, doubled = model(torch.arange(3), torch.ones(2))
    assert (ids.dtype, doubled.dtype) == (torch.int64, torch.float32)
