"""Models of the user's own on the command line: found in the current folder, and one sentence for each that does not fit."""

import functools
import json
import shutil
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


def put_first(folder):
    sys.path.insert(0, folder)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run of a model of the user's own."""
    folder = tmp_path_factory.mktemp("original") / "work"
    folder.mkdir()
    (folder / "mynet.py").write_text(MODELS)
    assert microglia("prune", "mynet:Own", *TINY[1:], "--out", folder / "run", folder=folder).status == 0
    return folder / "run"


@pytest.fixture
def elsewhere(original, work, tmp_path):
    """A run of a model of the user's own, as if made in their folder; another folder has another module of that name."""
    shutil.copytree(original, tmp_path / "run")
    told = (original / "environment.json").read_text()
    assert str(original.parent) in told
    (tmp_path / "run" / "environment.json").write_text(told.replace(str(original.parent), str(work)))
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "mynet.py").write_text(f"open({str(tmp_path / 'wrong')!r}, 'w')\n")
    return other


def test_a_run_remembers_where_its_code_was(work, elsewhere, tmp_path):
    shutil.rmtree(tmp_path / "run")
    assert microglia("prune", "mynet:Own", *TINY[1:], "--out", tmp_path / "run", folder=work).status == 0
    told = json.loads((tmp_path / "run" / "environment.json").read_text())["code"]
    assert told == {"module": "mynet", "folder": str(work)}
    here = microglia("eval", tmp_path / "run", "--trust", "--json", folder=work)
    there = microglia("eval", tmp_path / "run", "--trust", "--json", folder=elsewhere)
    assert there.status == 0, there
    assert json.loads(there.out) == json.loads(here.out)
    assert f"'mynet' is imported from {work}" in there.err
    assert microglia("measure", tmp_path / "run" / "model", "--trust", "--no-latency", folder=elsewhere).status == 0
    assert microglia("report", tmp_path / "run", "--out", tmp_path / "report", folder=elsewhere).status == 0
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("command", ["eval", "measure", "shrink", "surface"])
def test_without_trust_the_module_and_its_folder_are_shown_and_nothing_is_imported(work, elsewhere, tmp_path, command):
    (work / "mynet.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    outcome = microglia(command, tmp_path / "run", folder=elsewhere)
    refused(outcome, "'mynet:Own'", "the module 'mynet'", str(work), "look at that module", "--trust")
    assert not (tmp_path / "imported").exists()
    assert not (tmp_path / "wrong").exists()


def test_a_recipe_of_a_run_finds_its_code_too(work, elsewhere, tmp_path):
    words = ("prune", "--recipe", tmp_path / "run" / "recipe.yaml", "--out", tmp_path / "again", "--seed", "4")
    refused(microglia(*words, folder=elsewhere), "the module 'mynet'", str(work), "--trust")
    assert microglia(*words, "--trust", folder=elsewhere).status == 0
    assert json.loads((tmp_path / "again" / "environment.json").read_text())["code"]["folder"] == str(work)
    assert not (tmp_path / "wrong").exists()


def test_code_that_is_gone_is_looked_for_in_the_current_folder_and_then_missed(work, elsewhere, tmp_path):
    (work / "mynet.py").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(microglia("eval", tmp_path / "run", "--trust", folder=empty), "'mynet'", str(work), "where it is not", "PYTHONPATH")
    (elsewhere / "mynet.py").write_text(MODELS)
    assert microglia("eval", tmp_path / "run", "--trust", folder=elsewhere).status == 0


def test_another_module_that_comes_first_is_not_taken_for_it(work, elsewhere, tmp_path):
    shadow = tmp_path / "shadow"
    (shadow / "mynet").mkdir(parents=True)
    (shadow / "mynet" / "__init__.py").write_text(f"open({str(tmp_path / 'wrong')!r}, 'w')\n")
    ahead = functools.partial(put_first, str(shadow))
    outcome = microglia("eval", tmp_path / "run", "--trust", folder=work, prepare=ahead)
    refused(outcome, "'mynet'", str(work), str(shadow), "comes first")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    "code",
    [None, [], "mynet", {"module": "os", "folder": "/"}, {"module": "mynet", "folder": "."}, {"module": "mynet", "folder": 3}],
)
def test_what_a_run_says_of_its_code_is_no_more_than_a_hint(work, elsewhere, tmp_path, code):
    (tmp_path / "run" / "environment.json").write_text(json.dumps({"code": code}))
    refused(microglia("eval", tmp_path / "run", folder=elsewhere), "'mynet:Own'", "--trust")
    assert microglia("eval", tmp_path / "run", "--trust", folder=work).status == 0
    (tmp_path / "run" / "environment.json").write_text("{")
    assert microglia("eval", tmp_path / "run", "--trust", folder=work).status == 0
