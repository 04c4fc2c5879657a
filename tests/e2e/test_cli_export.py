"""`microglia export` as a user types it: a run's model, verified on test data, and one sentence for everything wrong."""

import json

import pytest
import torch

import microglia as mg
from commands import TINY, microglia, refused
from microglia.export import open_onnx


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    outcome = microglia("prune", *TINY, "--out", folder / "run", folder=folder / "work")
    assert outcome.status == 0, outcome.err
    return folder / "run"


def test_export_writes_verifies_and_compares(run, tmp_path):
    outcome = microglia("export", run, "--to", "onnx", "--accuracy", "--json", folder=tmp_path / "work")
    assert outcome.status == 0, outcome.err
    told = json.loads(outcome.out)
    (file,) = told["export"]["files"]
    assert file == str(run / "exported.onnx")
    assert told["export"]["examples"] == 1 + 3 + 2 * 16, "the example, three of it, and two batches of the test split"
    assert told["export"]["difference"] < 1e-5
    assert told["exported"]["metrics"] == pytest.approx(told["model"]["metrics"], abs=1e-5)
    assert told["export"]["engine"] in told["latency"]["timings"]["model"]
    model = mg.load(run / "model").eval()
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(open_onnx(file)(x), model(x).detach(), atol=1e-4, rtol=1e-4)


def test_export_prints_a_table_for_people_and_finds_the_target_by_the_suffix(run, tmp_path):
    outcome = microglia("export", run / "model", "--out", tmp_path / "new" / "model.pt2", folder=tmp_path / "work")
    assert outcome.status == 0, outcome.err
    assert "torch.export, PyTorch" in outcome.out
    assert "Outputs differ by" in outcome.out
    assert f"File: {tmp_path / 'new' / 'model.pt2'}" in outcome.out.replace("\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "onnyx"), "There is no export target named 'onnyx'. Did you mean 'onnx'"),
        (("--to", "hf"), "no model of transformers"),
        (("--out", "model.tflite"), "No export target writes .tflite files"),
        (("--to", "program", "--opset", "18"), "'program' has no option 'opset'"),
        (("--dynamic", "all"), "--dynamic takes dimensions such as 0,2,3; got 'all'"),
        (("--dynamic", "-1"), "--dynamic takes dimensions such as 0,2,3; got '-1'"),
    ],
)
def test_wrong_words(run, tmp_path, words, message):
    before = sorted(run.iterdir())
    refused(microglia("export", run, *words, folder=tmp_path / "work"), message)
    assert sorted(run.iterdir()) == before


def test_a_run_that_is_none(tmp_path):
    message = "is neither a run directory (recipe.yaml) nor a saved model (plan.json)"
    for target in (tmp_path, tmp_path / "nothing", "resnet20"):
        refused(microglia("export", target, "--to", "onnx", folder=tmp_path / "work"), message)
