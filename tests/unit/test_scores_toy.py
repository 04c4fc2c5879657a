"""A score from outside the package: registered, and known to recipes, runs, reports and the command line without an edit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import microglia as mg
from microglia.cli.app import IMPORTS, app
from microglia.lab.recipe import resolve
from microglia.report.write import report
from microglia.scores import scores

MODULE = '''
import torch
import microglia as mg

@mg.score("first-come")
def first_come(model, layers, evidence):
    """The weights of a layer are worth less the later they stand."""
    return {n: -torch.arange(l.raw.numel(), dtype=torch.float32).view(l.shape) for n, l in layers.items()}
'''
SHORT = {"dense": {"epochs": 1}, "train": {"epochs": 0}, "measure": {"latency": False}, "threads": 1}
WORDS = ["dense.epochs=1", "train.epochs=0", "measure.latency=false", "threads=1", "prune.score=first-come"]
WORDS += ["--density", "0.25", "prune.scope=layer", "--json"]


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's own, on the path and not yet imported."""
    (tmp_path / "toy_scores.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(IMPORTS, "")
    yield "toy_scores"
    sys.modules.pop("toy_scores", None)
    scores._items.pop("first-come", None)


def test_it_runs_through_execute_and_report(toy: str, tmp_path: Path) -> None:
    __import__(toy)
    prune = {"density": 0.25, "score": "first-come", "scope": "layer"}
    result = mg.execute(resolve({"model": "lenet-300-100", "prune": prune, **SHORT}), tmp_path / "runs" / "toy")
    assert result["masks"]["kept"] * 4 == result["masks"]["total"]
    for mask in mg.masks_of(mg.load(tmp_path / "runs" / "toy" / "model")).values():
        kept = mask.flatten()
        assert kept[: int(kept.sum())].all()  # the first ones of every layer
    usual = resolve({"model": "lenet-300-100", "prune": {**prune, "score": "magnitude"}, **SHORT})
    mg.execute(usual, tmp_path / "runs" / "usual")
    report([tmp_path / "runs"], tmp_path / "report")
    tables = (tmp_path / "report" / "results.md").read_text()  # which tells the two runs apart by their scores
    assert "score=first-come" in tables
    assert f"{result['pruned']['metrics']['accuracy'] * 100:.2f}" in tables


def test_it_runs_through_the_command_line(toy: str, tmp_path: Path) -> None:
    command = ["prune", "lenet-300-100", *WORDS, "--out", str(tmp_path / "run")]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1
    assert "There is no score named 'first-come'" in refused.stderr
    done = CliRunner().invoke(app, ["--import", toy, *command])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["recipe"]["prune"]["score"] == "first-come"
    listed = CliRunner().invoke(app, ["--import", toy, "methods", "--json"])
    assert "first-come" in json.loads(listed.stdout)["scores"]


def test_the_runs_of_a_sweep_import_it_too(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(mg.__file__).parents[1]}")
    base = {"model": "lenet-300-100", "prune": {"density": 0.5, "score": "first-come"}, **SHORT}
    (tmp_path / "sweep.yaml").write_text(json.dumps({"base": base, "grid": {"prune.density": [0.5]}}))
    done = CliRunner().invoke(app, ["--import", toy, "sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "runs")])
    assert done.exit_code == 0, done.output
    assert "1 done, 0 skipped, 0 failed" in done.stdout


def test_a_module_that_is_not_there_is_one_sentence() -> None:
    done = CliRunner().invoke(app, ["--import", "no_such_module", "methods"])
    assert done.exit_code == 1
    assert done.stderr.strip() == "error: There is no module 'no_such_module' to import: is its folder on PYTHONPATH?"
