"""`accelerate` in 8 bits: rounded between layers, near the model, calibrated, kept in files, and refused in words."""

import importlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import microglia as mg
from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.core.running import folded_twin
from microglia.core.timing import Timing
from microglia.runtime import accelerate, level
from microglia.runtime.dense.fusion import Activation, Site
from microglia.runtime.dense.packing import Packed
from microglia.runtime.int8.calibration import ranges_of
from microglia.runtime.int8.layers import Dequantize, Int8Layer, Pool8, Quantize, Scale
from microglia.runtime.int8.layout import PAIRS, dense_of_quads, largest, to_quads
from microglia.runtime.plans import choices_of
from microglia.runtime.precisions import Precision, precision_names, precision_of, register_precision
from microglia.runtime.record import read_record
from microglia.runtime.reload import reaccelerated

module = importlib.import_module("microglia.runtime.accelerate")
FAST = ("eager",)
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A stem with pooling, a residual block, an activation that does not fuse, tokens, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = (
            nn.Conv2d(3, 32, 3, padding=1),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.Conv2d(48, 32, 1),
        )
        self.down, self.inner, self.head = nn.Conv2d(32, 32, 1, stride=2), nn.Linear(32 * 16, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        x = torch.relu(self.second(torch.relu(self.first(x))) + x)
        x = nn.functional.silu(self.down(x))
        return self.head(nn.functional.relu6(self.inner(x.flatten(1))))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = Net()
    mg.methods.OneShot(made, pattern=mg.Block(16, 4), density=0.4, scope="layer").finish()
    return made.eval()


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(size, 3, 16, 16, generator=generator), torch.zeros(size)) for size in (8, 3)]


@pytest.fixture(scope="module")
def fast(model, batches):
    """The model in 8 bits wherever it can, whatever the times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time_interleaved", preferring("int8 blocks", "sparse, int8"))
        return accelerate(model, X, precision="int8", calibration=batches, against=FAST, cache=None)


def preferring(*names):
    """Returns a timing that finds these ways the fastest; it runs each."""

    def times(calls, **settings):
        for call in calls.values():
            call()
        return {name: Timing(*[1.0 if name in names else 2.0 + i] * 3, 1) for i, name in enumerate(calls)}

    return times


def test_values_stay_rounded_between_layers(fast):
    parts = {name: part for name, part in fast.fast.named_modules() if name}
    kinds = [type(part) for part in parts.values()]
    assert kinds.count(Int8Layer) == 6
    assert kinds.count(Pool8) == 1
    # The image is rounded, and the output of SiLU; nothing returns to float32 but the layers before SiLU and the end.
    assert (kinds.count(Quantize), kinds.count(Dequantize)) == (2, 0)
    wide = {(part.inputs, part.outputs) for part in parts.values() if isinstance(part, Int8Layer) and part.wide}
    assert wide == {(32, 32), (32, 10)}, "the layers before SiLU and the end"


def test_outputs_are_near_the_models_and_the_report_says_how_near(model, fast, batches):
    out, expected, report = fast(X), model(X).detach(), fast.report()
    assert out.dtype == torch.float32
    assert 0 < float((out - expected).abs().max()) < 0.08 * float(expected.abs().max())
    assert (report.chosen, report.precision) == ("sparse, int8", "int8")
    assert all(layer.chosen == "int8 blocks" for layer in report.layers)
    found = report.rounding
    assert found.examples == sum(len(images) for images, _ in batches)
    with torch.no_grad():
        scale = max(float(model(images).abs().max()) for images, _ in batches)
        away = max(float((fast(images[:2]) - model(images[:2])).abs().max()) for images, _ in batches)
    assert found.largest * scale >= away - 1e-6
    assert 0 < found.mean < found.largest < 0.1
    assert found.same > 0.8
    assert str(found) in " ".join(str(report).split())  # lines are broken anywhere
    assert json.loads(json.dumps(report.to_dict()))["rounding"]["examples"] == found.examples
    assert torch.equal(fast(X[:1]), fast.dense(X[:1])), "another shape runs in float32"


def test_what_is_faster_in_float32_stays_there(model, batches, monkeypatch):
    monkeypatch.setattr(module, "time_interleaved", preferring("dense, eager", "eager"))
    kept = accelerate(model, X, precision="int8", calibration=batches, against=FAST, cache=None)
    assert kept.report().chosen == "eager"
    assert kept.report().rounding is None
    assert not any(isinstance(part, Int8Layer) for part in kept.fast.modules())
    torch.testing.assert_close(kept(X), model(X), rtol=1e-4, atol=1e-5)


def test_a_record_makes_the_same_model_without_timing(fast, model, monkeypatch):
    monkeypatch.setattr(module, "time_interleaved", None)
    record = read_record(json.dumps(fast.record().to_dict()))
    again = reaccelerated(folded_twin(model), record, "stored")
    assert torch.equal(again(X), fast(X))
    assert again.report().rounding == fast.report().rounding
    broken = fast.record().to_dict() | {"ranges": {"x": [0.0, float("inf")]}}
    with pytest.raises(MicrogliaError, match=r"not finite|damaged"):
        read_record(json.dumps(broken))


WRONG = {
    "needs batches": None,
    "no calibration batch": [],
    "NaN or infinity": [torch.full_like(X, torch.nan)],
    "holds .2, 3, 8, 8. float32, but the example": [torch.zeros(2, 3, 8, 8)],
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_calibration_is_refused_in_words(model, said):
    with pytest.raises(MicrogliaError, match=said):
        accelerate(model, X, precision="int8", calibration=WRONG[said], cache=None)


def test_other_precisions_take_no_calibration(model):
    with pytest.raises(MicrogliaError, match="Only int8 is calibrated"):
        accelerate(model, X, precision="bf16", calibration=[X], cache=None)


def test_ranges_are_the_mean_of_the_extremes_of_batches():
    layer, batches = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), [torch.randn(5, 4), torch.randn(2, 4)]
    found = ranges_of(layer.eval(), [Example.of(batch) for batch in batches], Packed)
    (source, (low, high)), *_, (_, result) = found.items()
    assert source.startswith("input")
    assert (low, high) == pytest.approx([sum(float(getattr(b, side)()) for b in batches) / 2 for side in ("min", "max")])
    assert result[1] == pytest.approx(sum(float(layer(b).max()) for b in batches) / 2, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 150), st.integers(0, 2**16), st.sampled_from([0.0, 0.02, 0.3, 1.0]))
def test_quads_hold_the_weight_exactly_in_the_least_number_of_blocks(outputs, inputs, seed, density):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-outputs // 16), inputs, generator=generator) < density
    weight = torch.randint(-largest(), largest() + 1, (outputs, inputs), generator=generator)
    weight = (weight * kept.repeat_interleave(16, 0)[:outputs]).to(torch.int8)
    places = to_quads(weight)
    assert torch.equal(dense_of_quads(places, outputs, inputs, ()), weight.double())
    expected, columns = 0, torch.nn.functional.pad(weight, (0, 0, 0, -outputs % 16)).reshape(-1, 16, inputs).ne(0).any(1)
    for row in columns.tolist():
        covered = -1
        for at, wanted in enumerate(row):
            if wanted and (at > covered):
                expected, covered = expected + 1, min(at + 3, at // 64 * 64 + 63)
    assert len(places.values) == expected
    assert ((places.channel % 64) <= 60).all()


@pytest.mark.skipif(level() not in PAIRS, reason="this level adds in 32 bits at once")
def test_pairs_beyond_16_bits_become_two_blocks():
    weight = torch.full((16, 8), 127, dtype=torch.int8)
    weight[:, 4:] = 64
    places = to_quads(weight)
    assert len(places.values) == 3
    assert places.row_pointer.tolist() == [0, 3]
    assert (places.values.int().abs().unflatten(2, (2, 2)).sum(3) <= PAIRS[level()]).all()
    assert torch.equal(dense_of_quads(places, 16, 8, ()), weight.double())


def test_a_linear_layer_equals_its_rounded_weight():
    torch.manual_seed(0)
    weight, bias, x, other = torch.randn(24, 20), torch.randn(24), torch.randn(2, 3, 20), torch.randn(2, 3, 24)
    site = Site("l", "linear", weight, bias, (2, 3, 20), (2, 3, 24), Activation("relu"), True)
    source = Scale.of(float(x.min()), float(x.max()))
    layer, rounded = Int8Layer(site, source), source.quantize(x)
    exact = layer.dense()[..., 0, 0] * layer.scale[:24, None].double() / source.unit
    expected = torch.relu(source.dequantize(rounded).double() @ exact.T + bias + other)
    torch.testing.assert_close(layer(rounded, other).double(), expected, rtol=1e-5, atol=1e-5)
    assert float((exact - weight).abs().max()) <= float(weight.abs().max()) / largest() / 2 * 1.01


def test_a_quad_across_a_line_is_refused():
    layer = Int8Layer(Site("l", "linear", torch.randn(16, 130), None, (2, 130), (2, 16)), Scale(0.1, 3))
    layer.channel[0] = 61
    with pytest.raises(RuntimeError, match="across a multiple of 64"):
        layer(torch.zeros(2, 130, dtype=torch.uint8))


def test_a_precision_from_outside_is_one_more_value(monkeypatch):
    monkeypatch.setattr(
        precisions := importlib.import_module("microglia.runtime.precisions"),
        "_PRECISIONS",
        mg.core.registry.Registry("precision"),
    )
    toy = register_precision("toy", Precision(suffix=", toy", tolerance=0.1))
    assert precision_names() == ("toy",)
    assert precision_of("toy") is toy
    found = [{"dense": (None, 2.0), "block 16x1": (None, 1.0), "unstructured": (None, 3.0)}]
    assert choices_of(found, toy) == {"sparse, toy": ["block 16x1"]}
    assert precisions.precision_of("toy").rounds("dense")
