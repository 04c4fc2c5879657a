"""Files of other engines: verified before they count as written, whole or not there."""

import json
import sys

import pytest
import torch
from torch import nn

import microglia as mg
from commands import CONTEXT, LIMIT
from microglia.core.errors import ExportError, MicrogliaError
from microglia.core.optional import needs
from microglia.export import Exported, Target, export, open_onnx, targets


class Heads(nn.Module):
    """Several outputs in a structure of their own, and an argument that may be left out."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x, add=None):
        maps = self.conv(x) if add is None else self.conv(x) + add
        return {"logits": self.linear(maps.mean((2, 3))), "maps": [maps.relu(), maps.sum(1)]}


def masked():
    torch.manual_seed(0)
    model = Heads().eval()
    mg.mask(model, {"conv.weight": torch.rand(8, 3, 3, 3) > 0.5})
    return model, torch.randn(1, 3, 8, 8)


def test_onnx_has_names_free_sizes_metadata_and_the_zeros_of_the_masks(tmp_path):
    import onnx

    model, x = masked()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "new" / "model.onnx"
    other = [torch.randn(5, 3, 9, 10)]
    written = export(model, path, x, dynamic=(0, 2, 3), data=other, opset=21, external_data=True)
    assert written.examples == 1 + 3 + 5
    assert [file.name for file in written.files] == ["model.onnx", "model.onnx.data"]
    read = onnx.load(path)
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in read.graph.input}
    assert shapes == {"x": ["batch", 3, "x_2", "x_3"]}
    assert [value.name for value in read.graph.output] == ["logits", "maps_0", "maps_1"]
    assert [entry.version for entry in read.opset_import if entry.domain == ""] == [21]
    told = {entry.key: entry.value for entry in read.metadata_props}
    assert told["microglia_changes"] == "masks"
    assert len(told["microglia_plan_digest"]) == 32
    assert json.loads(told["microglia_input_shapes"]) == [[1, 3, 8, 8]]
    (weight,) = (onnx.numpy_helper.to_array(w, str(path.parent)) for w in read.graph.initializer if w.name == "conv.weight")
    assert (weight == 0).sum() == (~mg.masks_of(model)["conv.weight"]).sum() > 0
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    opened = written.open()(other[0])
    wanted = model(other[0])
    torch.testing.assert_close(opened, {"logits": wanted["logits"].detach(), "maps": [m.detach() for m in wanted["maps"]]})


def test_inputs_by_name_go_to_the_input_of_this_name(tmp_path):
    model, x = masked()
    add = torch.randn(1, 8, 8, 8)
    written = export(model, tmp_path / "model.onnx", {"x": x, "add": add})
    opened = open_onnx(written.path)
    torch.testing.assert_close(opened(add=add, x=x)[0], model(x, add)["logits"].detach())
    with pytest.raises(ExportError, match=r"takes 2 tensors \(x, add\); got 1"):
        opened(x)


def test_a_size_that_the_code_fixes_is_told(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(1, 12) * 2

    written = export(Fixed(), tmp_path / "model.pt2", torch.randn(1, 3, 4), data=[torch.randn(5, 3, 4)])
    assert written.notes == ("Dimension 0 of x stays 1: the model's code fixes it.",)
    assert written.batch == 1
    assert written.examples == 1 + 5, "data of another batch is compared one by one"


def test_an_accelerated_model_is_written_as_it_was_before(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    x = torch.randn(1, 64)
    mg.methods.OneShot(model, pattern=mg.Block(16, 1), density=0.3).finish()
    fast = mg.accelerate(model, x, against=("eager",), cache=None, rounds=1)
    assert export(fast, tmp_path / "model.pt2", x).difference < 1e-5
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), model(x).detach())


def test_a_pruner_that_still_searches_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    mg.methods.Smart(model, pattern=mg.Block(4, 4), density=0.5, total_steps=4)
    with pytest.raises(ExportError, match=r"call pruner\.finish\(\) before export"):
        export(model, tmp_path / "model.pt2", torch.randn(1, 16))


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("model.txt", {}, r"No export target writes \.txt files"),
        ("model.xml", {"to": "onnx"}, r"'onnx' writes a file that ends in \.onnx; got .*model\.xml"),
        ("model.onnx", {"to": "hf"}, r"'hf' writes a directory"),
        ("model.onnx", {"to": "onxn"}, "There is no export target named 'onxn'. Did you mean 'onnx'"),
        ("model.xml", {"opset": 18}, "'openvino' has no option 'opset'"),
        ("model.onnx", {"opest": 18}, "Did you mean 'opset'"),
        ("model.pt2", {"data": [torch.randn(2, 5, 8, 8)]}, "does not run"),
    ],
)
def test_wrong_words(tmp_path, path, settings, message):
    model, x = masked()
    with pytest.raises(MicrogliaError, match=message):
        export(model, tmp_path / path, x, **settings)
    assert not list(tmp_path.iterdir())


def test_an_operator_that_onnx_cannot_hold_is_named(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvalsh(x @ x.mT)

    x = torch.randn(1, 3, 3)
    before = tmp_path / "model.onnx"
    before.write_text("old")
    with pytest.raises(ExportError, match=r"no form of the operator [\w.]*eigh[\w.]* of Odd"):
        export(Odd(), before, x)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert before.read_text() == "old"
    assert export(Odd(), tmp_path / "model.pt2", x).difference == 0


def other_outputs(path):
    return Exported(lambda tensors: [tensors[0] * 1.001], ["x"], "toy")


def test_a_target_from_outside_and_a_file_whose_outputs_differ(tmp_path, monkeypatch):
    """One value in the registry is a target; its file takes its place only if its outputs are the model's."""
    toy = Target(".toy", lambda source, path: path.write_text(str(source.example.batch)), other_outputs, "a toy")
    monkeypatch.setattr(targets, "_items", {**targets._items, "toy": toy})
    x = torch.randn(1, 4)
    with pytest.raises(ExportError, match=r"outputs of toy differ from the model's by 1\.0e-03 of the largest"):
        export(nn.Identity(), tmp_path / "model.toy", x)
    assert not list(tmp_path.iterdir())
    written = export(nn.Identity(), tmp_path / "model.toy", x, tolerance=0.01)
    assert written.target == "toy"
    assert (tmp_path / "model.toy").read_text() == "1"


def test_outputs_that_are_not_numbers_do_not_pass(tmp_path, monkeypatch):
    nan = Exported(lambda tensors: [tensors[0] * float("nan")], ["x"], "toy")
    toy = Target(".toy", lambda source, path: path.write_text(""), lambda path: nan, "a toy")
    monkeypatch.setattr(targets, "_items", {**targets._items, "toy": toy})
    with pytest.raises(ExportError, match="differ from the model's"):
        export(nn.Identity(), tmp_path / "model.toy", torch.randn(1, 4))


def limited(folder, errors):
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    torch.manual_seed(0)
    model, x = nn.Linear(300, 300), torch.randn(2, 300)
    for name in NAMES:  # what the libraries write once is outside of the limit
        export(model, folder / name, x)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    for name in NAMES:
        for path in (folder / name, folder / "new" / name):
            try:
                export(model, path, x)
                errors.put("written")
            except Exception as error:
                errors.put(f"{type(error).__name__} {error}")
    errors.put({path: path.read_bytes() for path in folder.iterdir()} == before)


NAMES = ["model.onnx", "model.xml", "model.pt2"]


def test_a_disk_that_fills_while_an_export_is_written(tmp_path):
    """What was exported before is as it was, and nothing else is there."""
    errors = CONTEXT.Queue()
    process = CONTEXT.Process(target=limited, args=(tmp_path, errors))
    process.start()
    for _ in range(2 * len(NAMES)):
        assert errors.get(timeout=2 * LIMIT).startswith("FileError There is no room on the disk")
    assert errors.get(timeout=LIMIT) is True
    process.join(LIMIT)


def test_a_missing_extra_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MicrogliaError, match=r"pip install 'microglia\[export\]'"):
        export(nn.Linear(4, 4), tmp_path / "model.onnx", torch.randn(1, 4))
    assert not list(tmp_path.iterdir())
    with pytest.raises(MicrogliaError, match=r"needs nobody_has_this.*microglia\[zoo\]"):
        needs("zoo", "torch", "nobody_has_this")
