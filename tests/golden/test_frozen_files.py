"""Files of earlier versions, as users have them on their disks: they load, evaluate, resume and report the same for ever.

`tests/fixtures/freeze.py` wrote them, once, with the version that their directory names. A test that fails here says that
a change would break a user's files: mend the change, not the files.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import microglia as mg
from microglia.graph import plan_of
from microglia.lab.recipe import read_yaml, resolve
from microglia.lab.target import open_target
from microglia.report.write import collect, export, report

FIXTURES = Path(__file__).parent.parent / "fixtures"
sys.path.insert(0, str(FIXTURES))
from frozen_models import Attention, Conv  # noqa: E402

VERSIONS = sorted(path for path in FIXTURES.iterdir() if (path / "runs").is_dir())
EVERY = [(version, run.name) for version in VERSIONS for run in sorted((version / "runs").iterdir())]
OWN = {"masked": Conv, "module": Conv, "graph": Attention}


def ids(value: object) -> str:
    return value.name if isinstance(value, Path) else str(value)


@pytest.mark.parametrize(("version", "name"), EVERY, ids=ids)
def test_a_run_evaluates_as_when_it_was_frozen(version: Path, name: str):
    model, task = open_target(str(version / "runs" / name))
    expected = json.loads((version / "metrics.json").read_text())[name]
    assert mg.evaluate(model, task, "test") == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("version", "name"), EVERY, ids=ids)
def test_a_finished_run_is_known_and_not_run_again(version: Path, name: str, tmp_path: Path):
    shutil.copytree(version / "runs" / name, tmp_path / "run")
    recipe = mg.Recipe(**json.loads((tmp_path / "run" / "result.json").read_text())["recipe"])
    assert mg.execute(resolve(recipe_dict(tmp_path / "run")), tmp_path / "run") == stored_result(tmp_path / "run")
    assert recipe.method == stored_result(tmp_path / "run")["recipe"]["method"]
    assert not list((tmp_path / "run").glob("stages/*")), "a stage was run again"


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_an_interrupted_run_goes_on_from_its_stages(version: Path, tmp_path: Path):
    shutil.copytree(version / "interrupted", tmp_path / "run")
    before = (tmp_path / "run" / "stages" / "dense.safetensors").read_bytes()
    result = mg.execute(resolve(recipe_dict(tmp_path / "run")), tmp_path / "run")
    finished = stored_result(version / "runs" / "masked")
    assert result["masks"] == finished["masks"]
    assert result["dense"]["metrics"] == finished["dense"]["metrics"]  # observed before, hence read and not measured
    assert result["pruned"]["metrics"]["accuracy"] == pytest.approx(finished["pruned"]["metrics"]["accuracy"], abs=0.02)
    assert (tmp_path / "run" / "stages" / "dense.safetensors").read_bytes() == before


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
@pytest.mark.parametrize("name", OWN)
def test_a_model_of_the_caller_loads_with_its_outputs(version: Path, name: str):
    outputs = load_file(version / "models" / "outputs.safetensors")
    model = mg.load(version / "models" / name, OWN[name]().eval()).eval()
    torch.testing.assert_close(model(outputs[f"{name}.input"]), outputs[f"{name}.output"], atol=1e-5, rtol=1e-5)
    if name != "masked":
        assert plan_of(model).kind == name


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_runs_are_exported_as_before(version: Path, tmp_path: Path):
    export(collect([version / "runs"]), tmp_path / "results.json")
    assert_holds(json.loads((tmp_path / "results.json").read_text()), json.loads((version / "results.json").read_text()))


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_an_exported_file_reports_what_its_runs_did(version: Path, tmp_path: Path):
    report([version / "results.json"], tmp_path)
    assert numbers(tmp_path / "results.md") == numbers(version / "results.md")


def recipe_dict(run: Path) -> dict[str, object]:
    return read_yaml(run / "recipe.yaml")


def stored_result(run: Path) -> dict[str, object]:
    return json.loads((run / "result.json").read_text())


def numbers(tables: Path) -> list[list[str]]:
    """Returns the cells with a number in every row of every table: words may be written better, results may not change."""
    rows = [line for line in tables.read_text().splitlines() if line.startswith("|")]
    return [cells for row in rows if (cells := [cell.strip() for cell in row.split("|") if re.search(r"\d", cell)])]


def assert_holds(found: object, stored: object) -> None:
    """Asserts that all that was stored is still there; there may be more beside it."""
    if isinstance(stored, dict):
        assert isinstance(found, dict)
        for key, value in stored.items():
            assert_holds(found[key], value)
    elif isinstance(stored, list):
        assert isinstance(found, list)
        assert len(found) == len(stored)
        for mine, theirs in zip(found, stored, strict=True):
            assert_holds(mine, theirs)
    else:
        assert found == stored
