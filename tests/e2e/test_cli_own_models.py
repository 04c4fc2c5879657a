"""Models of the user's own on the command line: found in the current folder, and one sentence for each that does not fit."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from commands import LIMIT, TINY, microglia, refused

MODELS = """
from torch import nn

class Own(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.layer = nn.Linear(64, classes)

    def forward(self, x):
        return self.layer(x.flatten(1))

class Eight(Own):
    def __init__(self):
        super().__init__(8)

class Wrong(Own):
    def forward(self, x):
        return self.layer(x)

class Pair(Own):
    def forward(self, x):
        return super().forward(x), x

class Labels(Own):
    def forward(self, x):
        return super().forward(x).argmax(1)

def raises():
    return {}["missing"]
"""


@pytest.fixture
def work(tmp_path):
    """A folder with the user's own modules, where the commands are started."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "mynet.py").write_text(MODELS)
    (folder / "badnet.py").write_text("import not_there_at_all\n")
    return folder


def test_a_model_in_the_current_folder_is_found_by_the_installed_command(work):
    script = Path(sysconfig.get_path("scripts")) / "microglia"
    words = ["prune", "mynet:Own", *TINY[1:], "--out", work / "run", "--json"]
    done = subprocess.run(
        [sys.executable, script, *words], cwd=work, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (work / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("model", "texts"),
    [
        ("mynet:raises", ["mynet:raises cannot be built", "KeyError: 'missing' (mynet.py, line "]),
        ("badnet:Net", ["badnet:Net cannot be built", "not_there_at_all", "(badnet.py, line 1)"]),
        ("mynet:Wrong", ["does not take images of shape (1, 1, 8, 8)", "cannot be multiplied"]),
        ("mynet:Eight", ["shape (1, 8)", "10 classes of digits"]),
        ("mynet:Pair", ["returns tuple", "one tensor of logits"]),
        ("mynet:Labels", ["torch.int64 of shape (1,)", "one tensor of logits"]),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_anything_is_written(work, model, texts):
    refused(microglia("prune", model, *TINY[1:], "--out", work / "run", folder=work), *texts)
    assert not (work / "run").exists()
    refused(microglia("measure", model, "--no-latency", folder=work), *texts)


@pytest.mark.parametrize("command", ["eval", "measure", "surface", "routes", "shifts"])
def test_a_run_directory_that_is_not_there_is_called_that(work, command):
    refused(microglia(command, "runs/none", folder=work), "There is no run directory", "runs/none")
    refused(microglia(command, "none", folder=work), "no run directory, saved model or network named 'none'")


def test_a_connection_of_a_run_with_itself_is_refused(work):
    assert microglia("prune", *TINY, "--out", work / "run", folder=work).status == 0
    refused(microglia("connect", "run", "./run", folder=work), "two different networks")


def test_a_sweep_file_that_is_a_recipe_says_how_to_run_it(work):
    (work / "recipe.yaml").write_text("model: conv-2\nprune: {density: 0.5}\n")
    refused(microglia("sweep", "recipe.yaml", folder=work), "no sweep", "microglia prune --recipe recipe.yaml")


def test_a_wrong_value_does_not_bring_the_whole_recipe_into_its_sentence(work):
    outcome = microglia("prune", *TINY[:-1], "--seed=-3", folder=work)
    refused(outcome, "got -3")
    assert "lenet-300-100" not in outcome.err


def test_a_typo_in_a_data_name_offers_only_what_can_be_read(work, tmp_path):
    readable = tmp_path / "data" / "pets" / "train"
    for name in ("cat", "dog"):
        (readable / name).mkdir(parents=True)
        (readable / name / "one.png").touch()
    (tmp_path / "data" / "checkpoints").mkdir()
    outcome = microglia(
        "prune", "conv-2", "--data", "petz", folder=work, environment={"MICROGLIA_DATA": str(tmp_path / "data")}
    )
    refused(outcome, "petz", "Did you mean 'pets'")
    assert "checkpoints" not in outcome.err
