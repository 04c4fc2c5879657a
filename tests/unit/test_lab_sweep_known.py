"""Cells whose results are kept elsewhere: said on the screen, an option, and never by mistake; cells at a time on a cluster."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from microglia.cli.app import app
from microglia.lab.recipe import identity_of, resolve
from microglia.lab.sweep import Cell, CellOutcome, Sweep, run_sweep
from microglia.report.known import known_at, known_identities, known_lines

KEPT = Path(__file__).parents[2] / "results" / "conv6_at_init.json"


class Together:
    """A launcher whose cells end only if all of them run at the same time."""

    def __init__(self, jobs: int, limit: float = 20) -> None:
        self.jobs, self._all = jobs, threading.Barrier(jobs, timeout=limit)

    def run(self, cell: Cell, directory: Path, *, starts: Path | None = None) -> CellOutcome:
        self._all.wait()
        return CellOutcome(cell.name, "done")

    def stop(self) -> None:
        self._all.abort()

    def close(self) -> None:
        pass


def test_a_launcher_gets_as_many_cells_as_it_takes(tmp_path: Path) -> None:
    sweep = Sweep(grid={"seed": [0, 1, 2]}, base={"model": "lenet-300-100", "prune": {"density": 0.5}})
    assert run_sweep(sweep, tmp_path, launcher=Together(3)).done == ["seed-0", "seed-1", "seed-2"]
    with pytest.raises(threading.BrokenBarrierError):
        run_sweep(sweep, tmp_path, 1, Together(2, limit=0.2))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a sweep of one cell whose result lies in ``results``."""
    (record, *_) = json.loads(KEPT.read_text())
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "kept.json").write_text(json.dumps([record]))
    sweep = {"base": record["recipe"], "grid": {"seed": [record["recipe"]["seed"]]}, "name": "again"}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def swept(*words: str) -> tuple[str, str]:
    done = CliRunner().invoke(app, ["sweep", "sweep.yaml", *words])
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def test_a_known_cell_is_named_with_its_place_and_listed(project: Path) -> None:
    stdout, stderr = swept()
    assert "known seed-" in stderr
    assert ": results/kept.json#" in stderr
    assert "0 done, 1 skipped (1 known from elsewhere), 0 failed." in stdout
    assert "results/kept.json#" in swept("--list")[0].replace("\n", "")
    assert "known" not in swept("--list", "--again")[0]
    assert "to run" in swept("--list", "--known", "sweep.yaml")[0], "another place has no such result"


def test_a_folder_results_of_something_else_is_no_error(project: Path) -> None:
    (project / "results" / "kept.json").write_text('{"epochs": 3}')
    (project / "results" / "plot.png").write_bytes(b"no result")
    assert "to run" in swept("--list")[0]


def test_own_code_has_no_known_result() -> None:
    def cell(**other: object) -> Cell:
        return Cell("a", {}, resolve({"model": "lenet-300-100", "prune": {"density": 0.5}, **other}))

    plain, own = cell(), cell(model="mynet:MyNet")
    known = {identity_of(one.recipe): "results/a.json" for one in (plain, own)}
    assert known_at(plain, known) == "results/a.json"
    assert known_at(own, known) is None, "the code behind the name may have changed"
    assert known_at(plain, {}) is None


def test_own_code_is_run_by_the_sweep_too_and_a_checkpoint_is_compared_by_name(tmp_path: Path) -> None:
    (tmp_path / "dense.th").write_bytes(b"")
    sweep = Sweep(grid={"seed": [0]}, base={"model": "mynet:MyNet", "prune": {"density": 0.5}})
    (cell,) = sweep.cells
    assert run_sweep(sweep, tmp_path / "own", launcher=Together(1), known=[identity_of(cell.recipe)]).done == ["seed-0"]
    plain = {"model": "lenet-300-100", "prune": {"density": 0.5}}
    loaded = Sweep(grid={"seed": [0]}, base={**plain, "checkpoint": str(tmp_path / "dense.th")})
    known = {identity_of(loaded.cells[0].recipe): "results/a.json#1"}
    (line,) = known_lines(loaded, tmp_path, known)
    assert line == "known seed-0: results/a.json#1; its checkpoint is compared by name"


def test_the_results_of_this_project_have_places() -> None:
    found = known_identities([KEPT])
    assert len(found) > 1
    assert all(place.startswith("conv6_at_init.json#") for place in found.values())
