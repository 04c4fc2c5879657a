"""Damaged files: a stage is computed again, with the same bits; a model is refused with what is wrong with it."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import save_file

import microglia as mg
from commands import TINY, microglia, start, weights
from microglia.core.errors import FileError, MicrogliaError
from microglia.storage import files


def flip(path, place=-5):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("not what you expect\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert microglia("prune", *TINY, "--out", folder / "run", folder=folder / "work").status == 0
    return folder / "run"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run killed in the middle of its last training."""
    folder = tmp_path_factory.mktemp("interrupted")
    first = start("prune", *TINY, "--out", folder / "run", folder=folder / "work")
    first.wait_for(folder / "run/stages/train.partial.safetensors")
    assert first.kill().status == -signal.SIGKILL
    return folder / "run"


@pytest.mark.parametrize("damage", [flip, cut, empty, text])
@pytest.mark.parametrize("stage", ["dense", "prune", "dense-observed", "train"])
def test_a_damaged_stage_is_computed_again(tmp_path, finished, damage, stage):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    damage(tmp_path / "run" / "stages" / f"{stage}.safetensors")
    outcome = microglia("prune", *TINY, "--out", tmp_path / "run", folder=tmp_path / "work")
    assert outcome.status == 0, outcome.err
    assert f"{stage}.safetensors is damaged" in outcome.err
    assert "This stage is computed again" in outcome.err
    assert "Traceback" not in outcome.err
    assert weights(tmp_path / "run") == weights(finished)
    for file in (finished / "stages").iterdir():
        if "train" not in file.name and "dense.s" not in file.name:  # these hold the seconds of their epochs
            assert (tmp_path / "run" / "stages" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("damage", [flip, cut, empty, text])
def test_a_damaged_partial_is_computed_again(tmp_path, interrupted, finished, damage):
    shutil.copytree(interrupted, tmp_path / "run")
    damage(tmp_path / "run" / "stages" / "train.partial.safetensors")
    outcome = microglia("prune", *TINY, "--out", tmp_path / "run", folder=tmp_path / "work")
    assert outcome.status == 0, outcome.err
    assert "train.partial.safetensors is damaged" in outcome.err
    assert weights(tmp_path / "run") == weights(finished)


@pytest.mark.parametrize("file", ["result.json", "metrics.jsonl"])
@pytest.mark.parametrize("damage", [cut, text])
def test_damage_outside_the_stages_is_no_traceback(tmp_path, interrupted, finished, file, damage):
    shutil.copytree(interrupted if file == "metrics.jsonl" else finished, tmp_path / "run")
    damage(tmp_path / "run" / file)
    outcome = microglia("prune", *TINY, "--out", tmp_path / "run", folder=tmp_path / "work")
    assert "Traceback" not in outcome.err
    if outcome.status:
        assert file in outcome.err
    else:
        assert weights(tmp_path / "run") == weights(finished)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = mg.tasks.build("lenet-300-100", classes=10, shape=(1, 8, 8))
    mg.methods.OneShot(model, density=0.1)
    mg.save(model, tmp_path / "model")
    return model, tmp_path / "model"


def same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_whole_model_is_loaded_bit_for_bit(saved):
    model, folder = saved
    assert same(model, mg.load(folder))
    assert same(model, mg.load(folder, mg.tasks.build("lenet-300-100", classes=10, shape=(1, 8, 8))))
    assert mg.masks_of(mg.load(folder)).same(mg.masks_of(model))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (flip, "model.safetensors is damaged: its content does not match its digest"),
        (lambda path: flip(path, 3), "model.safetensors is damaged or not a safetensors file"),
        (cut, "model.safetensors is damaged or not a safetensors file"),
        (empty, "model.safetensors is damaged or not a safetensors file"),
        (text, "model.safetensors is damaged or not a safetensors file"),
        (lambda path: path.unlink(), "There is no file"),
        (lambda path: save_file({"fc1.weight": torch.ones(2)}, path), "is not a file of this library"),
        (lambda path: files.write_state(path, {}), "is a microglia.state file; expected microglia.weights"),
    ],
)
def test_damaged_weights_are_refused(saved, damage, sentence):
    _, folder = saved
    damage(folder / "model.safetensors")
    with pytest.raises(FileError) as caught:
        mg.load(folder)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.unlink(), "there is no plan.json"),
        (cut, "plan.json is damaged or not a JSON file"),
        (empty, "plan.json is damaged or not a JSON file"),
        (text, "plan.json is damaged or not a JSON file"),
        (lambda path: path.write_text("[1, 2]"), "plan.json holds no JSON object"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "plan.json is damaged or not a JSON file"),
        (lambda path: path.write_text("{}"), "plan.json is not a file of this library"),
        (lambda path: edit(path, format="torch.model"), "plan.json is a torch.model file; expected microglia.model"),
        (lambda path: edit(path, version=999), "plan.json has version 999, this library reads up to 1: upgrade microglia"),
        (lambda path: edit(path, version="new"), "does not say its version"),
        (lambda path: edit(path, digest="0" * 32), "do not belong together"),
        (lambda path: edit(path, source=None), "does not say how to build"),
        (lambda path: edit(path, source={"name": "lenet-300-100"}), "does not say how to build"),
        (lambda path: edit(path, source="lenet-300-100"), "does not say how to build"),
    ],
)
def test_a_damaged_plan_is_refused(saved, damage, sentence):
    _, folder = saved
    damage(folder / "plan.json")
    with pytest.raises(FileError) as caught:
        mg.load(folder)
    assert sentence in str(caught.value)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_plan_that_names_another_network_is_refused(saved):
    _, folder = saved
    for source, error in (
        ({"name": "conv-2", "classes": 10, "shape": [1, 8, 8], "options": {}}, FileError),
        ({"name": "lenet-300-100", "classes": 7, "shape": [1, 8, 8], "options": {}}, FileError),
        ({"name": "nothing", "classes": 10, "shape": [1, 8, 8], "options": {}}, MicrogliaError),
        ({"name": "lenet-300-100", "classes": 10, "shape": [1, 8], "options": {}}, MicrogliaError),
        ({"name": "lenet-300-100", "classes": 10, "shape": [1, 8, 8], "options": {"width": 3}}, MicrogliaError),
    ):
        edit(folder / "plan.json", source=source)
        with pytest.raises(error):
            mg.load(folder)


def test_weights_of_another_save_are_refused(saved, tmp_path):
    model, folder = saved
    with torch.no_grad():
        model.fc1.bias.add_(1)
    mg.save(model, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    with pytest.raises(FileError, match="do not belong together"):
        mg.load(folder)


def test_a_model_that_does_not_fit_is_refused(saved):
    _, folder = saved
    for other in (mg.tasks.build("lenet-5", classes=10, shape=(1, 8, 8)), torch.nn.ReLU(), torch.nn.Linear(64, 300)):
        with pytest.raises(FileError, match="do not fit"):
            mg.load(folder, other)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(FileError, match="holds no saved model"):
        mg.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="Cannot write"):
        mg.save(torch.nn.Linear(2, 2), tmp_path / "file")
