"""An accelerated model is saved and loaded with its kernels: no timing on the same machine, one sentence on another."""

import fnmatch
import importlib
import json
import random
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.core.batch import Example
from microglia.core.errors import FileError
from microglia.core.timing import Timing
from microglia.runtime import Accelerated, BlockChain, RowConv2d, level
from microglia.runtime.bfloat16 import Lowered
from microglia.runtime.candidates import Compact
from microglia.runtime.dense.packing import Packed
from microglia.runtime.record import record_of
from microglia.storage.acceleration import ACCELERATION, _digest

module = importlib.import_module("microglia.runtime.accelerate")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.deep, self.head = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Linear(32, 5)

    def forward(self, x):
        return self.head(torch.relu(self.deep(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.one, self.two = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids, mask=None, scale=1.0):
        x = self.embed(ids) * (1.0 if mask is None else mask[..., None].to(torch.float32))
        return self.two(torch.relu(self.one(x))) * scale


def pruned(model, pattern=None):
    torch.manual_seed(0)
    for tensor in model.parameters():
        nn.init.normal_(tensor, std=0.3)
    mg.methods.OneShot(model, pattern=pattern or mg.Block(16, 1), density=0.3, scope="layer").finish()
    return model.eval()


def preferring(monkeypatch, *favourites):
    """Makes the timing find these ways the fastest wherever they are offered."""

    def times(calls, **settings):
        for call in calls.values():
            call()
        return {
            name: Timing(*[(1.0 + i) / (1000 if any(fnmatch.fnmatch(name, f) for f in favourites) else 1)] * 3, 1)
            for i, name in enumerate(calls)
        }

    monkeypatch.setattr(module, "time_interleaved", times)


def saved(folder, monkeypatch, *favourites, pattern=None, **settings):
    """Returns a model accelerated in the favourite ways, and saved."""
    with monkeypatch.context() as patch:
        preferring(patch, *favourites)
        settings = {"against": ("eager", "packed"), "cache": None, "rounds": 1, **settings}
        fast = mg.accelerate(pruned(Net(), pattern), X, **settings)
    mg.save(fast, folder)
    return fast


@pytest.fixture
def untimed(monkeypatch):
    """Makes every timing fail."""

    def refuse(*args, **kwargs):
        raise AssertionError("nothing may be timed")

    monkeypatch.setattr(module, "time_interleaved", refuse)
    return monkeypatch


WAYS = {
    "block 16x1": (mg.Block(16, 1), BlockChain),
    "rows 4x1": (mg.Block(4, 1), RowConv2d),
    "unstructured": (mg.Unstructured(), RowConv2d),
    "compact": (mg.Channel(), Compact),
    "dense": (mg.Block(16, 1), Packed),
}
needs_kernels = pytest.mark.skipif(level() == "torch", reason="needs the compiled kernels")


@needs_kernels
@pytest.mark.parametrize("way", WAYS)
def test_each_layer_runs_by_its_kernel_again_without_timing(way, tmp_path, untimed):
    pattern, kind = WAYS[way]
    mixed = "sparse, mixed layouts" if kind is RowConv2d else "dense, layer by layer" if way == "dense" else "sparse"
    fast = saved(tmp_path, untimed, way, mixed, pattern=pattern)
    again = mg.load(tmp_path, Net())
    assert isinstance(again, Accelerated)
    assert {layer.chosen for layer in again.report().layers} >= {way}
    assert sum(isinstance(m, kind) for m in again.fast.modules()) == sum(isinstance(m, kind) for m in fast.fast.modules()) > 0
    assert again.report() == fast.report()
    assert torch.equal(again(X), fast(X))
    assert torch.equal(again(X[:1]), fast(X[:1]))  # another shape, by the dense model
    mg.save(again, tmp_path / "twice")
    assert torch.equal(mg.load(tmp_path / "twice", Net())(X), fast(X))


@pytest.mark.parametrize("chosen", ["eager", "packed", "bf16 eager", "sparse, bf16"])
def test_a_whole_model_runs_by_its_execution_again(chosen, tmp_path, untimed):
    if "bf16" in chosen and level() == "torch":
        pytest.skip("needs the compiled kernels")
    half = {"precision": "bf16"} if "bf16" in chosen else {}
    fast = saved(tmp_path, untimed, chosen, *(["block 16x*"] if "sparse" in chosen else []), **half)
    assert fast.report().chosen == chosen
    again = mg.load(tmp_path, Net())
    assert again.report() == fast.report()
    assert isinstance(again.fast, Lowered) == ("bf16" in chosen)
    assert torch.equal(again(X), fast(X))


def test_the_plain_model_comes_on_request_and_after_a_plain_save(tmp_path, untimed):
    fast = saved(tmp_path, untimed, "packed")
    plain = mg.load(tmp_path, Net(), kernels="none")
    assert type(plain) is Net
    with torch.no_grad():
        assert torch.equal(plain.eval()(X), fast.dense(X))
    with pytest.raises(FileError, match="timed, stored, none; got 'fast'"):
        mg.load(tmp_path, Net(), kernels="fast")
    mg.save(plain, tmp_path)
    assert not (tmp_path / ACCELERATION).exists()
    assert type(mg.load(tmp_path, Net())) is Net


def altered(folder, change):
    """Changes the record of a saved model; its digest is right."""
    content = json.loads((folder / ACCELERATION).read_text())
    change(content["record"])
    content["digest"] = _digest(content["record"])
    (folder / ACCELERATION).write_text(json.dumps(content))


def test_on_another_machine_it_is_timed_anew_or_dense_and_says_so(tmp_path, monkeypatch):
    fast = saved(tmp_path, monkeypatch, "packed")
    altered(tmp_path, lambda record: record["machine"].update(level="avx1024"))
    with pytest.warns(UserWarning, match=r"run.* dense.*level 'avx1024' there and '\w+' here"):
        assert type(mg.load(tmp_path, Net(), kernels="stored")) is Net
    preferring(monkeypatch, "eager")
    monkeypatch.setenv("MICROGLIA_CACHE", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="timed anew.*another machine"):
        again = mg.load(tmp_path, Net())
    assert again.report().chosen == "eager"
    assert "timed anew" in again.report().notes[0]
    torch.testing.assert_close(again(X), fast(X))


def test_another_number_of_threads_is_another_machine(tmp_path, monkeypatch):
    saved(tmp_path, monkeypatch, "packed")
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.warns(UserWarning, match=f"threads '{before}' there and {before + 1} here"):
            mg.load(tmp_path, Net(), kernels="stored")
    finally:
        torch.set_num_threads(before)


def test_an_execution_that_cannot_be_made_here_is_timed_anew(tmp_path, monkeypatch):
    saved(tmp_path, monkeypatch, "packed")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="run.* dense.*packed was left out: this build of PyTorch has no oneDNN"):
        assert type(mg.load(tmp_path, Net(), kernels="stored")) is Net


def deep(record):
    nested = {"value": 1}
    for _ in range(300):
        nested = {"list": [nested]}
    record["example"] = nested


NO_WAY = {"block 7x9": 1, "dense": 2}
HOSTILE = {
    "layers that are not the model's": lambda r: r["report"]["layers"].pop(),
    "a layer of another shape": lambda r: r["report"]["layers"][0].update(shape=[1, 2]),
    "a way without a time": lambda r: r["report"]["layers"][0].update(chosen="import os"),
    "a way that does not exist": lambda r: r["report"]["layers"][0].update(chosen="block 7x9", times=NO_WAY),
    "an execution that does not exist": lambda r: r["report"].update(chosen="os.system", times={"os.system": 1, "eager": 2}),
    "a group of executions": lambda r: r["report"].update(chosen="all", times={"all": 1, "eager": 2}),
    "an execution that rounds": lambda r: r["report"].update(chosen="openvino-int8", times={"openvino-int8": 1, "eager": 2}),
    "executions that do not exist": lambda r: r.update(against=["os"]),
    "a time that is none": lambda r: r["report"]["times"].update(eager=-1),
    "a machine that is none": lambda r: r.update(machine={}),
    "another precision": lambda r: r["report"].update(precision="int1"),
    "a number that is a text": lambda r: r["report"].update(threads="1"),
    "a field too few": lambda r: r["report"].pop("level"),
    "an example that is none": lambda r: r.update(example={"call": "os.system"}),
    "an example of another type": lambda r: r["example"]["tuple"][0]["tuple"][0]["tensor"].update(dtype="load"),
    "an example too large": lambda r: r["example"]["tuple"][0]["tuple"][0]["tensor"].update(shape=[10**6, 10**6]),
    "an example of negative size": lambda r: r["example"]["tuple"][0]["tuple"][0]["tensor"].update(shape=[-1, 3, 8, 8]),
    "an example that the model does not take": lambda r: r["example"]["tuple"][0]["tuple"][0]["tensor"].update(shape=[2, 9]),
    "an example nested deeply": deep,
    "no object": lambda r: r.update(report=[]),
}  # fmt: skip


@pytest.fixture(scope="module")
def by_layer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("kernels")
        saved(folder, patch, "dense", "dense, layer by layer")
    return folder, (folder / ACCELERATION).read_text()


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_record_is_refused_in_a_sentence(how, by_layer, untimed):
    folder, text = by_layer
    (folder / ACCELERATION).write_text(text)
    altered(folder, HOSTILE[how])
    with pytest.raises(FileError, match=r"acceleration\.json is refused; load\(\.\.\., kernels=\"none\"\) reads the model"):
        mg.load(folder, Net())
    assert type(mg.load(folder, Net(), kernels="none")) is Net


def test_a_damaged_record_is_refused_or_harmless(by_layer, untimed):
    folder, text = by_layer
    chosen, said = random.Random(0), set()
    for _ in range(150):
        at = chosen.randrange(len(text))
        (folder / ACCELERATION).write_text(text[:at] + chosen.choice(["", "0", "x", '"', "}"]) + text[at + 1 :])
        if (folder / ACCELERATION).read_text() != text:
            try:
                assert isinstance(mg.load(folder, Net()), Accelerated)  # white space
            except FileError as error:
                said.add(str(error).partition(ACCELERATION)[0])
    assert said == {f"{folder}/"}


def test_a_record_of_other_weights_is_refused(by_layer, tmp_path):
    _, text = by_layer
    mg.save(pruned(Net(), mg.Unstructured()), tmp_path)
    (tmp_path / ACCELERATION).write_text(text)
    with pytest.raises(FileError, match="It is of other weights"):
        mg.load(tmp_path, Net())


EXAMPLES = {
    "mapping": {"ids": torch.randint(0, 9, (2, 5)), "mask": torch.ones(2, 5, dtype=torch.bool), "scale": 2.0},
    "tuple": (torch.randint(0, 9, (2, 5)), torch.rand(2, 5)),
    "tensor": torch.randint(0, 9, (2, 5), dtype=torch.int32),
}


@pytest.mark.parametrize("form", EXAMPLES)
def test_whole_numbers_of_the_example_are_kept_and_images_are_not(form, tmp_path, untimed):
    example = Example.of(EXAMPLES[form])
    with untimed.context() as patch:
        preferring(patch, "packed")
        fast = mg.accelerate(pruned(Tokens()), EXAMPLES[form], against=("eager", "packed"), cache=None, rounds=1)
    again = mg.load(mg.save(fast, tmp_path), Tokens())
    assert again.takes(*example.args, **example.kwargs)
    assert torch.equal(again(*example.args, **example.kwargs), fast(*example.args, **example.kwargs))
    kept = again.record().inputs().tensors
    for given, read in zip(example.tensors, kept, strict=True):
        assert (given.shape, given.dtype) == (read.shape, read.dtype)
        assert torch.equal(given, read) != given.is_floating_point()


class Pair(NamedTuple):
    one: torch.Tensor
    two: torch.Tensor


def test_an_example_that_no_file_holds_is_named_when_the_model_is_saved(tmp_path, monkeypatch):
    fast = saved(tmp_path, monkeypatch, "packed")
    report = fast.report()
    fast._record = record_of(report, {}, ("eager",), Example((Pair(X, X),), {}))
    with pytest.warns(UserWarning, match="saved without its kernels.*its example holds a Pair"):
        mg.save(fast, tmp_path)
    assert type(mg.load(tmp_path, Net())) is Net


def test_a_loaded_model_is_measured_beside_its_dense_executions_and_accelerated_again(tmp_path, monkeypatch):
    saved(tmp_path, monkeypatch, "packed")
    again = mg.load(tmp_path, Net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured = mg.measure(again, X, executions=("eager",))
    assert set(measured.latency.timings["model"]) == {"eager", "accelerated"}
    assert measured.parameters.to_dict() == mg.measure(again.dense, X, latency=False).parameters.to_dict()
    assert set(mg.measure(again, X[:1], executions=("eager",)).latency.timings["model"]) == {"eager"}
    twice = mg.accelerate(again, X, against=("eager",), cache=None, rounds=1)
    torch.testing.assert_close(twice(X), again(X))
