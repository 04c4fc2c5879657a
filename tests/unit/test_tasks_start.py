"""A run of this library as the checkpoint of another: masks become zeros, other changes are refused by name."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from typer.testing import CliRunner

import microglia as mg
from microglia.cli.app import app
from microglia.core.errors import CheckpointError, FileError
from microglia.core.restore import without_masks
from microglia.storage.files import write_state
from microglia.tasks.start import load_start, start_of
from microglia.zoo import build
from microglia.zoo.yolo_checkpoint import load_yolov5, read_any


def made(seed=1):
    torch.manual_seed(seed)
    return build("resnet8", width=4)


@pytest.fixture
def masked():
    model = made()
    mg.mask(model, {"conv1.weight": torch.rand(4, 3, 3, 3) > 0.5, "layer2.0.conv1.weight": torch.rand(8, 4, 3, 3) > 0.5})
    return model


def assert_starts(path, source):
    """Expects the effective weights and the buffers of ``source`` in a network that starts from ``path``."""
    target = made(2)
    with pytest.warns(UserWarning, match=r"[1-9]\d* weights in .* are zero by masks"):
        load_start(target, path)
    expected = mg.fold(source).state_dict()
    assert target.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("place", ["run", "run/model", "run/model/model.safetensors", "run/stages/train.safetensors"])
def test_every_place_of_a_run_gives_its_weights(tmp_path, masked, place):
    mg.save(masked, tmp_path / "run/model")
    (tmp_path / "run/stages").mkdir()
    write_state(tmp_path / "run/stages/train.safetensors", {"model": masked.state_dict(), "seed": 3})
    assert_starts(tmp_path / place, masked)


def test_a_copy_of_the_weights_alone_is_a_start(tmp_path, masked):
    mg.save(masked, tmp_path / "run")
    (tmp_path / "best.safetensors").write_bytes((tmp_path / "run/model.safetensors").read_bytes())
    assert_starts(tmp_path / "best.safetensors", masked)


def test_reordered_channels_compute_the_same_from_a_start(tmp_path):
    model, x = made().eval(), torch.randn(2, 3, 32, 32)
    permuted = mg.permute_channels(model, x, mg.Block(4, 1), density=0.5)
    assert not torch.equal(permuted.conv1.weight, model.conv1.weight)
    mg.save(permuted, tmp_path)
    target = made(2).eval()
    load_start(target, tmp_path)
    assert torch.equal(target.conv1.weight, permuted.conv1.weight)
    assert torch.allclose(target(x), model(x), atol=1e-5)


def test_a_model_without_masks_starts_without_a_warning(tmp_path):
    mg.save(made(), tmp_path)
    target = made(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_start(target, tmp_path)
    assert torch.equal(target.conv1.weight, made().conv1.weight)


def test_another_parametrization_keeps_its_names(masked):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, weight):
            return weight * self.scale

    parametrize.register_parametrization(masked.conv1, "weight", Scaled())
    plain, removed = without_masks(masked.state_dict())
    assert "conv1.parametrizations.weight.original" in plain
    assert "layer2.0.conv1.weight" in plain
    assert removed == int((~mg.masks_of(masked)["layer2.0.conv1.weight"]).sum())


def test_removed_channels_are_refused_and_name_the_way_on(tmp_path):
    model = made()
    mg.save(mg.prune_channels(model, torch.randn(1, 3, 32, 32), mg.Budget(density=0.5), round_to=1), tmp_path)
    with pytest.raises(CheckpointError, match=r"layers or widths were changed.* microglia\.load\("):
        load_start(made(2), tmp_path)


def test_what_is_no_start_says_so(tmp_path, masked):
    write_state(tmp_path / "observed.safetensors", {"accuracy": 0.5})
    with pytest.raises(CheckpointError, match="a stage of a run without a model; take the run's directory"):
        load_start(made(), tmp_path / "observed.safetensors")
    with pytest.raises(CheckpointError, match="is a directory without a saved model; name the checkpoint file in it"):
        load_start(made(), tmp_path)
    mg.save(masked, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(FileError, match="damaged"):
        load_start(made(), tmp_path)


def test_a_detector_starts_with_other_classes(tmp_path):
    source, network = (build("yolov5n", classes=n, shape=(3, 64, 64), width=0.05) for n in (5, 3))
    mg.save(source, tmp_path / "model")
    load_yolov5(network, tmp_path, head="fresh", state=start_of(tmp_path, read_any))
    assert torch.equal(network.model[0].conv.weight, source.model[0].conv.weight)
    assert network.heads[0].weight.shape != source.heads[0].weight.shape


def test_a_second_run_prunes_what_a_first_one_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["prune", "lenet-300-100", "--data", "digits", "--epochs", "1", "measure.latency=false", "--json"]
    first = CliRunner().invoke(app, [*words, "--density", "0.5", "dense.epochs=1", "--out", "first"])
    assert first.exit_code == 0, first.output
    second = CliRunner().invoke(app, [*words, "--density", "0.25", "--checkpoint", "first", "--epochs", "0", "--out", "second"])
    assert second.exit_code == 0, second.output
    for place in ("first", "first/model"):
        refused = CliRunner().invoke(app, ["prune", place, "--density", "0.2"])
        assert refused.exit_code == 1
        assert f"microglia prune MODEL --checkpoint {place}" in " ".join(refused.output.split())
    one, two = mg.load("first/model"), mg.load("second/model")
    assert mg.masks_of(two).nested_in(mg.masks_of(one))
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("first", "second")]
    assert results[0]["pruned"]["metrics"]["accuracy"] == results[1]["dense"]["metrics"]["accuracy"]
