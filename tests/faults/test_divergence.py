"""Numbers that are none: one sentence that says where, and what was finished before is kept."""

import pytest
import torch

import microglia as mg
from commands import TINY, microglia, refused


def test_a_loss_that_is_not_finite_names_epoch_and_step(tmp_path):
    words = ("prune", *TINY, "train.lr=1.0e+30", "--out", tmp_path / "run")
    refused(microglia(*words, folder=tmp_path / "work"), "The loss became", "in epoch 1, step ", "(learning rate 9.")
    stages = {path.name for path in (tmp_path / "run" / "stages").iterdir()}
    assert {"dense.safetensors", "dense-observed.safetensors", "prune.safetensors", "before-observed.safetensors"} == stages
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "model").exists()
    refused(microglia(*words, folder=tmp_path / "work"), "The loss became")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--method", "magnitude"), "infinite or not a number: fc2.weight, fc2.bias"),
        (("--method", "gradient"), "infinite or not a number: fc2.weight, fc2.bias"),
        (("--method", "gradual"), "infinite or not a number: fc2.weight, fc2.bias"),
        (("--method", "random"), "infinite or not a number: fc2.weight, fc2.bias"),
    ],
)
def test_a_checkpoint_with_a_nan(tmp_path, words, text):
    model = mg.tasks.build("lenet-300-100", classes=10, shape=(1, 8, 8))
    with torch.no_grad():
        model.fc2.weight[3, 4] = model.fc2.bias[3] = torch.nan
    torch.save(model.state_dict(), tmp_path / "nan.pt")
    command = ("prune", *TINY, *words, "--checkpoint", tmp_path / "nan.pt", "--out", tmp_path / "run")
    refused(microglia(*command, folder=tmp_path / "work"), text)


def test_the_model_holds_the_weights_before_the_step_that_failed():
    task = mg.tasks.image_task("lenet-300-100", "digits")
    model = task.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.fc3.bias[0] = torch.inf
    with pytest.raises(mg.MicrogliaError, match=r"The loss became nan in epoch 1, step 1 \(learning rate 0\.1\)"):
        mg.fit(model, task, mg.FitConfig(epochs=1))
    before["fc3.bias"][0] = torch.inf
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
