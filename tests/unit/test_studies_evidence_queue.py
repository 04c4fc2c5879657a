"""The queue of evidence: order, pilots, skipping, a kill in the middle, and the same bits from scratch."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import fresh
from microglia.core.errors import FileError, RunError
from microglia.core.processes import Children
from microglia.lab.execute import execute
from microglia.lab.recipe import RecipeError, as_dict, resolve
from microglia.lab.sweep import CellOutcome
from microglia.report.records import parse
from microglia.studies.evidence import queue as module
from microglia.studies.evidence.files import is_queue, read_queue
from microglia.studies.evidence.ledger import Entry, Ledger
from microglia.studies.evidence.plan import Planner
from microglia.studies.evidence.queue import QueueRun, commit_of, run_queue
from microglia.studies.evidence.status import status_of, status_table

STUDY = {
    "title": "Tiny",
    "seconds_per_epoch": 3600,
    "base": {
        "model": "lenet-300-100",
        "data": "digits",
        "device": "cpu",
        "dense": {"epochs": 1, "batch_size": 256, "lr": 0.05},
        "train": {"epochs": 4, "batch_size": 256, "lr": 0.02, "distill": 0},
        "measure": {"latency": False},
    },
    "rows": {
        "magnitude": {"set": {"method": "global-magnitude"}},
        "random": {"set": {"method": "random"}, "pilots": False, "control": True},
    },
    "grid": {"prune.density": [0.5, 0.2]},
    "seeds": [0, 1],
    "pilots": {"set": {"train.epochs": 1}, "at": {"prune.density": 0.5}, "steps": [{"train.lr": [0.001, 0.1]}]},
}
ALL = {"results": "results", "parts": [{"study": "one/tiny", "worth": 1}]}


def write(folder, queue=None, **changes):
    for path, content in (("queue.yaml", queue or ALL), ("one/tiny.yaml", {**STUDY, **changes})):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(yaml.safe_dump(content))
    return read_queue(folder / "queue.yaml")


def here(cell, directory, *, threads, children, starts):
    """Runs a cell in this process, which saves a second of imports."""
    execute(cell.recipe, directory, starts=starts)
    (directory / "shown").mkdir(exist_ok=True)
    (directory / "shown/dense.json").write_text('{"kind": "detection", "examples": [1, 2]}')
    return CellOutcome(cell.name, "done", 0.0)


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(module, "run_cell", here)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A queue that ran without interruption: its folder, and its files of results as lists."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_cell", here)
        outcome = run_queue(write(folder, seeds=[0], grid={"prune.density": [0.2]}), folder / "out", jobs=1)
    assert (outcome.failed, outcome.left) == ({}, 0)
    return folder


def results(folder):
    return {path.name: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}


def names(jobs):
    return [(job.kind, job.row, job.seed, *job.values.values()) for job in jobs]


class TestOrder:
    def test_what_a_cell_needs_comes_before_it_and_seeds_come_one_after_another(self, tmp_path):
        found = names(Planner(write(tmp_path), Ledger.read(tmp_path)).jobs())
        assert found[:8] == [
            ("start", "lenet-300-100", 0),
            ("pilot", "magnitude", 0, 0.001),
            ("pilot", "magnitude", 0, 0.1),
            ("cell", "magnitude", 0, 0.5),
            ("cell", "magnitude", 0, 0.2),
            ("cell", "random", 0, 0.5),
            ("cell", "random", 0, 0.2),
            ("start", "lenet-300-100", 1),
        ]
        assert len(found) == 12

    def test_parts_of_higher_worth_come_first_and_nothing_comes_twice(self, tmp_path):
        parts = [
            {"study": "one/tiny", "worth": 1},
            {"study": "one/tiny", "worth": 5, "seeds": [1], "rows": ["random"], "only": {"prune.density": [0.2]}},
        ]
        found = names(Planner(write(tmp_path, {**ALL, "parts": parts}), Ledger.read(tmp_path)).jobs())
        assert found[:3] == [("start", "lenet-300-100", 1), ("cell", "random", 1, 0.2), ("start", "lenet-300-100", 0)]
        assert len(found) == len(set(found)) == 12

    def test_a_cell_of_two_studies_is_in_both_and_runs_once(self, tmp_path):
        parts = [{"study": name, "worth": 1} for name in ("one/tiny", "one/other")]
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "other.yaml").write_text(yaml.safe_dump({**STUDY, "pilots": None}))
        queue = write(tmp_path, {**ALL, "parts": parts}, pilots=None)
        run = QueueRun(queue, tmp_path / "out", 2)
        cells = [job for job in run._plan() if job.kind == "cell"]
        assert {study: sum(job.study == study for job in cells) for study in queue.studies} == {"one/tiny": 8, "one/other": 8}
        assert len({job.identity for job in cells}) == 8
        for job in run._plan():
            if job.kind == "start":
                run.ledger.starts[job.identity] = entry_of(job, 0.9)
                run._dense(job.identity).parent.mkdir(parents=True)
                run._dense(job.identity).touch()
        assert len(run._ready([], 100)) == 8

    def test_the_best_pilot_on_validation_images_chooses(self, tmp_path):
        queue, ledger = write(tmp_path), Ledger.read(tmp_path)
        pilots = [job for job in Planner(queue, ledger).jobs() if job.kind == "pilot"]
        assert {job.recipe.measure.split for job in pilots} == {"validation"}
        assert {(job.recipe.train.epochs, job.recipe.prune["density"]) for job in pilots} == {(1, 0.5)}
        cell = next(job for job in Planner(queue, ledger).jobs() if job.kind == "cell")
        assert not cell.settled
        for job, value in zip(pilots, (0.3, 0.9), strict=True):
            ledger.add_pilot(entry_of(job, value))
        cells = [job for job in Planner(queue, ledger).jobs() if job.kind == "cell" and job.row == "magnitude"]
        assert all(job.settled and job.recipe.train.lr == 0.1 and job.recipe.train.epochs == 4 for job in cells)
        assert {job.recipe.measure.split for job in cells} == {"test"}

    @pytest.mark.parametrize(("better", "chosen"), [("higher", (0.1, 0.9)), ("lower", (0.001, 0.5))])
    def test_a_further_step_changes_the_best_pilot_so_far(self, tmp_path, better, chosen):
        row = {"set": {"method": "global-magnitude"}, "steps": [{"train.momentum": [0.5, 0.9]}]}
        queue, ledger = write(tmp_path, rows={"magnitude": row}, better=better), Ledger.read(tmp_path)
        values = {(0.001, 0.9): 0.1, (0.1, 0.9): 0.8, (0.1, 0.5): 0.3, (0.001, 0.5): 0.05}
        assert status_of(queue, ledger).studies[1].pilots == 3  # those that wait for the first ones are counted
        for _ in range(2):
            for job in Planner(queue, ledger).jobs():
                if job.kind == "pilot" and not job.done and job.settled:
                    ledger.add_pilot(entry_of(job, values[job.recipe.train.lr, job.recipe.train.momentum]))
        cell = next(job for job in Planner(queue, ledger).jobs() if job.kind == "cell")
        assert cell.settled
        assert (cell.recipe.train.lr, cell.recipe.train.momentum) == chosen
        assert len(ledger.pilots) == 3  # the default momentum is a pilot of the first step


def entry_of(job, value, **changes):
    keys = ("identity", "study", "row", "values", "seed", "epochs")
    known = {name: getattr(job, name) for name in keys}
    return Entry(**{**known, "commit": "c", "seconds": 7200.0, "start": "d", "value": value, **changes})


class TestFiles:
    def test_a_queue_is_told_from_a_sweep(self, tmp_path):
        write(tmp_path)
        (tmp_path / "sweep.yaml").write_text("grid: {seed: [0]}")
        assert is_queue(tmp_path / "queue.yaml")
        assert not is_queue(tmp_path / "sweep.yaml")

    @pytest.mark.parametrize(
        ("part", "changes", "text"),
        [
            ({"rows": ["magnitud"]}, {}, "rows 'magnitud'"),
            ({"seeds": [7]}, {}, "seeds 7"),
            ({"only": {"prune.density": [0.3]}}, {}, r"prune\.density 0\.3"),
            ({"sort": 1}, {}, "no such field"),
            ({}, {"rows": {"a": {"sets": {}}}}, r"rows\.a\.sets: there is no such field"),
            ({}, {"pilots": {"set": {}, "steps": [{"train.lr": []}]}}, "keys with equally long lists"),
            ({}, {"pilots": {"set": {}, "steps": [{"train.lr": [0.1], "seed": [1, 2]}]}}, "keys with equally long lists"),
        ],
    )
    def test_a_mistake_is_named(self, tmp_path, part, changes, text):
        with pytest.raises(RecipeError, match=text):
            write(tmp_path, {**ALL, "parts": [{"study": "one/tiny", "worth": 1, **part}]}, **changes)

    def test_a_row_that_is_no_recipe_is_named(self, tmp_path):
        queue = write(tmp_path, rows={"magnitude": {"set": {"method": "global-magnitude", "prune.densty": 1}}})
        with pytest.raises(RecipeError, match=r"The row magnitude of one/tiny is not valid.*densty"):
            Planner(queue, Ledger.read(tmp_path)).jobs()

    def test_a_damaged_file_of_results_is_named(self, tmp_path):
        (tmp_path / "one_tiny.json").write_text('[{"evidence": {}}]')
        with pytest.raises(FileError, match=r"one_tiny\.json, result 1, is damaged"):
            Ledger.read(tmp_path)


class TestRunning:
    def test_results_are_kept_with_commit_digest_and_settings(self, finished):
        told = results(finished)
        assert {name: len(rows) for name, rows in told.items()} == {
            "starts.json": 1,
            "one_tiny.json": 2,
            "one_tiny.pilots.json": 2,
        }
        (start,) = told["starts.json"]
        for cell in told["one_tiny.json"]:
            assert cell["evidence"]["start"] == start["start"]
            assert cell["evidence"]["commit"] == start["commit"] == commit_of(Path(module.__file__).parents[2])
            assert cell["evidence"]["seconds"] > 0
            assert parse(cell).curves["train"]["epoch"] == [1, 2, 3, 4]
            assert "shown" not in cell  # predictions stay in the directory of the run
        best = max(told["one_tiny.pilots.json"], key=lambda pilot: pilot["value"])
        magnitude = next(cell for cell in told["one_tiny.json"] if cell["evidence"]["row"] == "magnitude")
        assert magnitude["recipe"]["train"]["lr"] == best["values"]["train.lr"]
        assert not list((finished / "out").rglob("cell-*/stages"))

    @pytest.mark.usefixtures("in_process")
    def test_what_the_results_hold_is_skipped_on_a_new_machine_too(self, finished, tmp_path, monkeypatch):
        queue, ran = read_queue(finished / "queue.yaml"), []
        monkeypatch.setattr(module, "run_cell", lambda cell, directory, **rest: ran.append(cell.name))
        outcome = run_queue(queue, tmp_path / "another")
        assert (outcome.done, outcome.left, ran) == ((), 0, [])

    @pytest.mark.usefixtures("in_process")
    def test_a_new_machine_trains_the_start_again_to_the_same_bits(self, finished, tmp_path):
        queue = read_queue(finished / "queue.yaml")
        queue.studies["one/tiny"].grid["prune.density"] = [0.5]  # one cell more
        queue = replace(queue, path=tmp_path / "queue.yaml", parts=[replace(queue.parts[0], rows=["random"])])
        (tmp_path / "results").mkdir()
        for path in (finished / "results").iterdir():
            (tmp_path / "results" / path.name).write_text(path.read_text())
        outcome = run_queue(queue, tmp_path / "another", jobs=1)
        assert [name.partition("-")[0] for name in outcome.done] == ["start", "cell"]
        assert outcome.notes == ()
        assert results(tmp_path)["starts.json"] == results(finished)["starts.json"]

    def test_a_start_with_other_bits_is_kept_and_noted(self, finished, tmp_path):
        ledger = Ledger(tmp_path, starts=dict(Ledger.read(finished / "results").starts))
        (entry,) = ledger.starts.values()
        run = QueueRun(read_queue(finished / "queue.yaml"), tmp_path, 1)
        run.__dict__["ledger"] = ledger
        run._keep_start(replace(entry, start="0" * 32))
        assert "other bits" in run.notes[0]
        assert json.loads((tmp_path / "starts.json").read_text())[-1]["start"] == "0" * 32

    @pytest.mark.usefixtures("in_process")
    def test_a_failure_stops_only_what_needs_it_and_is_tried_again(self, finished, tmp_path, monkeypatch):
        def fails(cell, directory, **rest):
            return CellOutcome(cell.name, "failed", 0, "no room") if "random" in cell.name else here(cell, directory, **rest)

        monkeypatch.setattr(module, "run_cell", fails)
        queue = write(tmp_path, seeds=[0], grid={"prune.density": [0.2]})
        outcome = run_queue(queue, tmp_path / "out", jobs=2)
        assert len(outcome.done) == 4
        assert list(outcome.failed.values()) == ["no room"]
        assert outcome.left == 1
        assert "no room" in outcome.sentence
        monkeypatch.setattr(module, "run_cell", here)
        assert [name.partition("-d")[0] for name in run_queue(queue, tmp_path / "out", jobs=1).done] == ["cell-random"]

    @pytest.mark.usefixtures("in_process")
    def test_a_pilot_that_diverges_is_never_chosen_and_blocks_nothing(self, tmp_path, monkeypatch):
        def diverges(cell, directory, **rest):
            if cell.recipe.train.lr == 0.001:
                return CellOutcome(cell.name, "failed", 1.0, "error: The loss became nan in epoch 1, step 3")
            return here(cell, directory, **rest)

        monkeypatch.setattr(module, "run_cell", diverges)
        rows = {"magnitude": STUDY["rows"]["magnitude"]}
        queue = write(tmp_path, seeds=[0], grid={"prune.density": [0.2]}, rows=rows)
        outcome = run_queue(queue, tmp_path / "out", jobs=1)
        assert (outcome.failed, outcome.left) == ({}, 0)
        assert [pilot["value"] is None for pilot in results(tmp_path)["one_tiny.pilots.json"]] == [True, False]
        assert results(tmp_path)["one_tiny.json"][0]["recipe"]["train"]["lr"] == 0.1
        assert Planner(queue, Ledger.read(queue.ledger)).jobs()[-1].done

    def test_cells_wait_for_their_start_and_others_go_on(self, tmp_path, monkeypatch):
        queue = write(tmp_path, pilots=None)
        run = QueueRun(queue, tmp_path / "out", 2)
        first = run._ready([], 2)
        assert names(first) == [("start", "lenet-300-100", 0), ("start", "lenet-300-100", 1)]
        assert run._ready(first, 2) == []
        dense = run.starts / first[0].identity / "dense.safetensors"
        dense.parent.mkdir(parents=True)
        dense.touch()
        run.ledger.starts[first[0].identity] = entry_of(first[0], 0.9)
        assert names(run._ready(first[1:], 1)) == [("cell", "magnitude", 0, 0.5)]

    def test_one_queue_at_a_time(self, tmp_path):
        with module._only_one(tmp_path), pytest.raises(RunError, match="Another queue runs"):
            run_queue(write(tmp_path), tmp_path)
        with pytest.raises(RunError, match="got 0"):
            run_queue(write(tmp_path), tmp_path, jobs=0)


KILLED = """
import os, signal, sys
from pathlib import Path
from microglia.storage.run import Run
sys.path.insert(0, sys.argv[1])
from test_studies_evidence_queue import here, module, read_queue, run_queue
log = Run.log
def killed(self, stage, rows):
    log(self, stage, rows)
    if stage == "train" and self.recipe["method"] == "random" and len(rows) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Run.log, module.run_cell = killed, here
run_queue(read_queue(Path(sys.argv[2]) / "queue.yaml"), Path(sys.argv[2]) / "out", jobs=1)
"""


@pytest.mark.usefixtures("in_process")
def test_a_queue_killed_in_the_middle_goes_on_to_the_bits_of_one_that_was_not(finished, tmp_path):
    queue = write(tmp_path, seeds=[0], grid={"prune.density": [0.2]})
    assert fresh.run(KILLED, Path(__file__).parent, tmp_path).returncode == -9
    assert {name: len(rows) for name, rows in results(tmp_path).items()} == {
        "starts.json": 1,
        "one_tiny.json": 1,
        "one_tiny.pilots.json": 2,
    }
    outcome = run_queue(queue, tmp_path / "out", jobs=1)
    assert [name.partition("-d")[0] for name in outcome.done] == ["cell-random"]
    assert without_times(results(tmp_path)) == without_times(results(finished))
    for cell in ("magnitude", "random"):
        mine, theirs = (
            next(folder.glob(f"out/*/one/tiny/cell-{cell}-*/model/model.safetensors")) for folder in (tmp_path, finished)
        )
        assert mine.read_bytes() == theirs.read_bytes()


def without_times(told):
    for rows in told.values():
        for row in rows:
            row.pop("seconds", None)
            row.get("evidence", {}).pop("seconds", None)
    return told


def test_the_children_of_a_stopped_queue_end_at_once():
    children = Children()
    children.stop()
    with open("/dev/null", "w") as log:
        assert children.run(["/bin/sleep", "60"], log, log, {}) < 0


class TestStatus:
    def test_done_left_and_hours(self, tmp_path):
        queue, ledger = write(tmp_path), Ledger.read(tmp_path)
        before = status_of(queue, ledger)
        tiny = before.studies[1]
        assert (before.studies[0].cells, tiny.cells, tiny.pilots, tiny.done) == (2, 8, 2, 0)
        # 2 starts and 2 pilots of one epoch and 8 cells of four, an hour each, two side by side
        assert before.hours_left == pytest.approx(18.0)
        for job in Planner(queue, ledger).jobs():
            if job.kind == "pilot":
                ledger.add_pilot(entry_of(job, 0.5))  # two hours an epoch
        after = status_of(queue, ledger)
        assert (after.studies[1].pilots_done, after.studies[1].hours_done) == (2, 4.0)
        assert after.hours_left == pytest.approx((2 + 8 * 4 * 2) / 2)
        assert "0 of 8 cells are done, 8 left: 4.0 core hours spent" in after.sentence
        assert len(status_table(after).rows) == 2
        assert after.to_dict()["next"][0].startswith("start-lenet")

    def test_a_finished_queue_has_nothing_left(self, finished):
        status = status_of(read_queue(finished / "queue.yaml"), Ledger.read(finished / "results"))
        assert [(study.done, study.cells) for study in status.studies] == [(1, 1), (2, 2)]
        assert status.hours_left == 0


def test_an_older_recipe_with_fewer_fields_is_the_same_cell(finished, tmp_path):
    rows = results(finished)["one_tiny.json"]
    for row in rows:
        del row["recipe"]["prune"]["recalibrate"]  # as if this field were newer than the result
        row["evidence"]["identity"] = "0" * 16
    (tmp_path / "one_tiny.json").write_text(json.dumps(rows))
    ledger = Ledger.read(tmp_path)
    plan = Planner(read_queue(finished / "queue.yaml"), Ledger.read(finished / "results")).jobs()
    assert all(ledger.holds(job.identity) for job in plan if job.kind == "cell")


def test_a_run_for_a_choice_is_about_validation_images_and_stays_out_of_tables(tmp_path):
    base = {**STUDY["base"], "method": "random", "prune": {"density": 0.5}, "train": {"epochs": 0}}
    on_test, chosen = resolve(base), resolve({**base, "measure": {"latency": False, "split": "validation"}})
    assert "split" not in as_dict(on_test)["measure"]  # runs of earlier versions keep their identity
    shared = [execute(recipe, tmp_path / str(number), starts=tmp_path / "s") for number, recipe in enumerate((on_test, chosen))]
    assert shared[0]["dense"]["metrics"] != shared[1]["dense"]["metrics"]
    parse(shared[0])
    with pytest.raises(ValueError, match="validation images"):
        parse(shared[1])
