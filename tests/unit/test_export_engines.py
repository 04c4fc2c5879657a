"""Other engines as executions: found by name, compared with the model, timed beside PyTorch's own, never required."""

import copy
import importlib

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.core.errors import UnknownNameError
from microglia.core.timing import Timing
from microglia.lab.recipe import RecipeError, resolve
from microglia.measure import LatencyReport, executions, measure_latency
from microglia.runtime.dense import kinds
from microglia.runtime.dense.kinds import TORCH, ExecutionKind, execution_kind, execution_names, is_exact, register_execution

INSTALLED = ("onnxruntime", "openvino")
module = importlib.import_module("microglia.runtime.accelerate")


class Net(nn.Module):
    """Two inputs of which one comes by keyword, and a dictionary of outputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head, self.other = nn.Linear(16, 5), nn.Linear(4, 5)

    def forward(self, x, extra):
        features = torch.relu(self.norm(self.stem(x))).mean((2, 3))
        return {"logits": self.head(features) + self.other(extra), "pair": (features, extra * 2)}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def registry(monkeypatch):
    """The registry of executions, put back at the end."""
    monkeypatch.setattr(kinds._KINDS, "_items", dict(kinds._KINDS._items))
    return kinds


@pytest.mark.parametrize("name", INSTALLED)
def test_an_engine_takes_and_gives_what_the_model_does(name, net):
    for package in execution_kind(name).packages:
        pytest.importorskip(package)
    inputs = {"x": torch.randn(2, 3, 8, 8), "extra": torch.randn(2, 4)}
    notes = []
    runner = executions(net, inputs, (name,), notes=notes).get(name)
    assert not notes
    found, expected = runner(), net(**inputs)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["logits"], expected["logits"].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pair"][1], expected["pair"][1])
    assert isinstance(found["pair"], tuple)


def test_int8_is_near_the_model_and_not_exact(net):
    pytest.importorskip("nncf")
    generator = torch.Generator().manual_seed(0)
    inputs = {"x": torch.randn(2, 3, 8, 8, generator=generator), "extra": torch.randn(2, 4, generator=generator)}
    notes = []
    ready = executions(net, inputs, ("eager", "openvino-int8"), notes=notes)
    assert not notes
    found, expected = (ready[name]()["logits"] for name in ("openvino-int8", "eager"))
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.2 * float(expected.abs().max()))


def test_outputs_of_one_call_stay_after_the_next_and_copies_are_their_own():
    pytest.importorskip("openvino")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    x = torch.randn(1, 3, 8, 8)
    session = kinds.built("openvino", model, mg.core.batch.Example.of(x))
    first = session(x)
    before = first.clone()
    copied = copy.deepcopy(session)
    copied(-x)
    session(-x)
    assert torch.equal(first, before)
    assert torch.equal(copied(x), before)


def test_all_means_every_exact_execution_that_is_installed(registry, monkeypatch):
    assert execution_names("torch") == TORCH
    installed = execution_names("all")
    assert installed[: len(TORCH)] == TORCH
    assert "openvino-int8" not in installed
    assert execution_names(("all", "openvino-int8", "eager")) == (*installed, "openvino-int8")
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    assert execution_names("all") == TORCH


def test_a_missing_package_leaves_the_engine_out_and_says_so(monkeypatch):
    monkeypatch.setattr(kinds, "find_spec", lambda name: None)
    notes = []
    assert list(executions(nn.Linear(4, 4), torch.randn(1, 4), ("eager", "openvino"), notes=notes)) == ["eager"]
    how = "pip install 'microglia[export]' installs what it needs"
    assert notes == [f"openvino was left out: not installed here: openvino, onnx, onnxscript; {how}."]


def test_a_model_that_an_engine_cannot_hold_is_left_out():
    pytest.importorskip("openvino")

    class Branching(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    notes = []
    assert list(executions(Branching(), torch.randn(2, 4), ("eager", "openvino"), notes=notes)) == ["eager"]
    assert notes[0].startswith("openvino was left out: ")


def test_unknown_names_are_refused_with_the_groups_among_the_known():
    with pytest.raises(UnknownNameError, match="Did you mean 'openvino'"):
        execution_names(("openvin",))
    with pytest.raises(UnknownNameError, match="all, compiled"):
        measure_latency({"a": nn.Linear(2, 2)}, torch.randn(1, 2), executions="everything")


def test_an_execution_of_ones_own_is_measured_and_accelerated_against(registry, monkeypatch):
    calls = []

    def build(model, example):
        def call(*args, **kwargs):
            calls.append(1)
            return model(*args, **kwargs)

        return call

    register_execution("toy", ExecutionKind(build))
    with pytest.raises(ValueError, match="twice"):
        register_execution("toy", ExecutionKind(build))
    assert "toy" in execution_names("all")
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)
    report = measure_latency({"model": model}, x, executions=("eager", "toy"), rounds=1, min_round_seconds=0)
    assert set(report.timings["model"]) == {"eager", "toy"}

    def times(given, **settings):
        return {name: Timing(*[0.5 if name == "toy" else 1.0] * 3, 1) for name in given}

    monkeypatch.setattr(module, "time_interleaved", times)
    fast = mg.accelerate(model, x, against=("eager", "toy"), cache=None)
    assert (fast.report().chosen, fast.report().best_dense) == ("toy", "toy")
    calls.clear()
    torch.testing.assert_close(fast(x), model(x).detach())
    assert calls


def test_what_rounds_the_weights_is_timed_but_never_chosen(registry, monkeypatch):
    rounding = ExecutionKind(lambda model, example: lambda x: model(x) * 1.05, tolerance=0.1, exact=False)
    register_execution("rounding", rounding)
    assert not is_exact("rounding")
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)
    monkeypatch.setattr(
        module,
        "time_interleaved",
        lambda given, **settings: {name: Timing(*[0.1 if name == "rounding" else 1.0] * 3, 1) for name in given},
    )
    for against in (("eager", "rounding"), ("rounding",)):
        report = mg.accelerate(model, x, against=against, cache=None).report()
        assert report.times["rounding"] == 0.1
        assert "rounding" not in (report.chosen, report.best_dense)
    one, tenth = Timing(1.0, 1.0, 1.0, 1), Timing(0.1, 0.1, 0.1, 1)
    latency = LatencyReport({"a": {"eager": one, "rounding": tenth}, "b": {"rounding": tenth}}, "a CPU", 1, 1, "2")
    assert latency.best("a") == ("eager", one)
    assert latency.best("b") == ("rounding", tenth)


def test_a_recipe_names_any_registered_execution_and_no_other(registry):
    register_execution("toy", ExecutionKind(lambda model, example: model))
    asked = resolve({"model": "conv-2", "measure": {"executions": ["eager", "toy", "openvino"]}}).measure.executions
    assert tuple(asked) == ("eager", "toy", "openvino")
    with pytest.raises(RecipeError, match=r"executions.*'egaer'.*Did you mean 'eager'"):
        resolve({"model": "conv-2", "measure": {"executions": ["egaer"]}})
