"""Model repositories in the documented layouts of OpenVINO Model Server and Triton Inference Server."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from microglia.core.errors import FileError
from microglia.export.repository import openvino_model_server, triton, triton_config


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """The model as ONNX with a free batch and with a fixed one, and as OpenVINO IR."""
    folder = tmp_path_factory.mktemp("files")
    x = torch.zeros(2, 3, 8, 8)
    free = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    names = {"input_names": ["images"], "output_names": ["logits"], "dynamo": True, "verbose": False}
    torch.onnx.export(model, (x,), folder / "free.onnx", **names, **free, external_data=False)
    torch.onnx.export(model, (x,), folder / "fixed.onnx", **names, external_data=False)
    openvino.save_model(openvino.convert_model(folder / "free.onnx"), folder / "net.xml", compress_to_fp16=False)
    return folder


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


# ------------------------------------------------------------------------------------------------------------- Triton
def test_triton_gets_its_layout_and_a_model_that_runs(files, model, tmp_path):
    folder = triton(files / "free.onnx", tmp_path / "models", "net", max_batch_size=16, max_wait_ms=1.5)
    root = tmp_path / "models"
    assert folder == root / "net" / "1"
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*")) == ["net", "net/1", "net/1/model.onnx", "net/config.pbtxt"]
    assert (
        (root / "net" / "config.pbtxt").read_text()
        == """name: "net"
platform: "onnxruntime_onnx"
max_batch_size: 16
input [
  {
    name: "images"
    data_type: TYPE_FP32
    dims: [ 3, 8, 8 ]
  }
]
output [
  {
    name: "logits"
    data_type: TYPE_FP32
    dims: [ 5 ]
  }
]
dynamic_batching {
  max_queue_delay_microseconds: 1500
}
"""
    )
    x = torch.randn(7, 3, 8, 8)
    assert np.allclose(run_onnx(folder / "model.onnx", x), model(x).detach(), atol=1e-5)


def test_a_fixed_batch_is_no_batch(files, tmp_path):
    triton(files / "fixed.onnx", tmp_path, "net")
    text = (tmp_path / "net" / "config.pbtxt").read_text()
    assert "max_batch_size: 0" in text
    assert "dims: [ 2, 3, 8, 8 ]" in text
    assert "dynamic_batching" not in text


def test_further_versions_share_the_configuration(files, tmp_path):
    triton(files / "free.onnx", tmp_path, "net")
    assert triton(files / "free.onnx", tmp_path, "net", 2) == tmp_path / "net" / "2"
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["1", "2", "config.pbtxt"]
    with pytest.raises(FileError, match="has a version 2 already; give another number, such as version=3"):
        triton(files / "free.onnx", tmp_path, "net", 2)
    with pytest.raises(FileError, match="one file serves all versions"):
        triton(files / "fixed.onnx", tmp_path, "net", 3)
    assert not (tmp_path / "net" / "3").exists()


def test_weights_beside_the_file_come_along(model, tmp_path):
    x = torch.zeros(2, 3, 8, 8)
    path = tmp_path / "big.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, external_data=False)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="big.data", size_threshold=1024)
    folder = triton(path, tmp_path / "models", "net")
    assert sorted(p.name for p in folder.iterdir()) == ["big.data", "model.onnx"]
    x = torch.randn(2, 3, 8, 8)
    assert np.allclose(run_onnx(folder / "model.onnx", x), model(x).detach(), atol=1e-5)
    (tmp_path / "big.data").unlink()
    with pytest.raises(FileError, match=r"weights in 'big.data', and there is no such file beside it"):
        triton(path, tmp_path / "models", "other")


def odd(inputs, outputs):
    values = [[helper.make_tensor_value_info(n, k, s) for n, k, s in part] for part in (inputs, outputs)]
    return helper.make_model(helper.make_graph([], "odd", *values))


def test_types_free_sizes_and_scalars():
    ids = [("ids", TensorProto.INT64, ["batch", "length"]), ("mask", TensorProto.BOOL, ["batch", "length"])]
    text = triton_config("bert", odd(ids, [("loss", TensorProto.FLOAT16, ["batch"])]), 8, 0)
    assert text.count("dims: [ -1 ]") == 2
    assert "TYPE_INT64" in text
    assert "TYPE_BOOL" in text
    assert 'name: "loss"\n    data_type: TYPE_FP16\n    dims: [ 1 ]\n    reshape: { shape: [ ] }' in text
    assert "max_batch_size: 8" in text
    text = triton_config("mean", odd(ids, [("loss", TensorProto.FLOAT, [])]), 8, 0)  # over the batch: no batches
    assert "max_batch_size: 0" in text
    assert text.count("dims: [ -1, -1 ]") == 2
    with pytest.raises(FileError, match="no tensors of the type COMPLEX64, which 'wave' has"):
        triton_config("odd", odd(ids, [("wave", TensorProto.COMPLEX64, [2])]), 8, 0)


# ---------------------------------------------------------------------------------------------- OpenVINO Model Server
def test_openvino_gets_its_layout_and_a_model_that_runs(files, model, tmp_path):
    folder = openvino_model_server(files / "net.xml", tmp_path / "models", "net")
    root = tmp_path / "models"
    found = sorted(str(p.relative_to(root)) for p in root.rglob("*"))
    assert found == ["config.json", "net", "net/1", "net/1/model.bin", "net/1/model.xml"]
    assert json.loads((root / "config.json").read_text()) == {
        "model_config_list": [{"config": {"name": "net", "base_path": "net"}}]
    }
    x = torch.randn(3, 3, 8, 8)
    compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert np.allclose(compiled(x.numpy())[0], model(x).detach(), atol=1e-4)


def test_models_that_are_listed_stay(files, tmp_path):
    own = {"model_config_list": [{"config": {"name": "old", "base_path": "/models/old", "nireq": 4}}], "monitoring": {}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    openvino_model_server(files / "net.xml", tmp_path, "net")
    openvino_model_server(files / "net.xml", tmp_path, "net", 2)
    openvino_model_server(files / "net.xml", tmp_path, "third")
    listed = json.loads((tmp_path / "config.json").read_text())
    assert [entry["config"]["name"] for entry in listed["model_config_list"]] == ["old", "net", "third"]
    assert listed["model_config_list"][0] == own["model_config_list"][0]
    assert listed["monitoring"] == {}


# -------------------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize("write", [triton, openvino_model_server])
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "../net"}, "letters, digits"),
        ({"name": ""}, "letters, digits"),
        ({"version": 0}, "whole number of at least 1; got 0"),
        ({"version": "1"}, "whole number of at least 1; got '1'"),
    ],
)
def test_wrong_names_and_versions(files, tmp_path, write, settings, sentence):
    path = files / ("free.onnx" if write is triton else "net.xml")
    with pytest.raises(FileError, match=sentence):
        write(path, tmp_path / "models", **{"name": "net", **settings})
    assert not (tmp_path / "models").exists()


def test_wrong_files_leave_nothing(files, tmp_path):
    root = tmp_path / "models"
    with pytest.raises(FileError, match="There is no file"):
        triton(tmp_path / "none.onnx", root, "net")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(FileError, match="damaged or not an ONNX file"):
        triton(tmp_path / "text.onnx", root, "net")
    (tmp_path / "a.xml").write_bytes((files / "net.xml").read_bytes())
    with pytest.raises(FileError, match=r"a.bin, which holds the weights of a.xml"):
        openvino_model_server(tmp_path / "a.xml", root, "net")
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "a.xml").write_text("<net>")
    with pytest.raises(FileError, match="damaged or no OpenVINO IR"):
        openvino_model_server(tmp_path / "a.xml", root, "net")
    with pytest.raises(FileError, match="max_batch_size is at least 1"):
        triton(files / "free.onnx", root, "net", max_batch_size=0)
    assert not root.exists()


def test_a_strange_list_of_models_is_refused_before_anything_is_written(files, tmp_path):
    (tmp_path / "config.json").write_text('{"model_config_list": [{"name": "x"}]}')
    with pytest.raises(FileError, match="model_config_list names no models"):
        openvino_model_server(files / "net.xml", tmp_path, "net")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_disk_that_fills_leaves_nothing_half_written(files, tmp_path, monkeypatch):
    repository = sys.modules["microglia.export.repository"]  # `microglia.export` is the verb

    def full(source, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repository.shutil, "copyfile", full)
    with pytest.raises(FileError, match="No space left on device"):
        triton(files / "free.onnx", tmp_path / "a" / "models", "net")
    assert not (tmp_path / "a").exists()
