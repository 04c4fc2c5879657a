"""Sweeps: names and checks of cells, running them in processes, and what happens when something is killed."""

import contextlib
import fcntl
import json
import os
import re
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from commands import microglia, start
from microglia.core.errors import MicrogliaError, RunError
from microglia.lab.recipe import RecipeError, as_dict, resolve
from microglia.lab.sweep import Sweep, cells, read_sweep, run_cell, run_sweep
from microglia.report.plan import plan_table

RECIPES = Path(__file__).parents[2] / "recipes"
BASE = {"model": "lenet-300-100", "prune": {"density": 0.5}}


def grid(**keys):
    return Sweep(grid={key.replace("__", "."): values for key, values in keys.items()}, base=BASE)


def write(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


class TestCells:
    def test_all_combinations_in_the_order_of_the_grid(self):
        found = cells(grid(method=["global-magnitude", "random"], prune__params=[0.5, 0.25], seed=[0, 1]))
        assert [cell.name for cell in found] == [
            f"{method}_params-{params}_seed-{seed}"
            for method in ("global-magnitude", "random")
            for params in (0.5, 0.25)
            for seed in (0, 1)
        ]
        assert found[3].values == {"method": "global-magnitude", "prune.params": 0.25, "seed": 1}
        recipe = found[3].recipe
        assert (recipe.method, recipe.prune["params"], recipe.prune["density"], recipe.seed) == (
            "global-magnitude",
            0.25,
            0.5,
            1,
        )
        assert recipe.model == "lenet-300-100"

    def test_recipes_are_resolved_so_that_reading_them_again_changes_nothing(self):
        (cell,) = cells(grid(method=["layer-gradient"]))
        assert cell.recipe.prune["scope"] == "layer"
        assert as_dict(resolve(yaml.safe_load(yaml.safe_dump(as_dict(cell.recipe))))) == as_dict(cell.recipe)

    def test_the_grid_wins_over_the_base_and_leaves_it_alone(self):
        sweep = grid(prune__density=[0.1])
        assert sweep.cells[0].recipe.prune["density"] == 0.1
        assert sweep.base == {"model": "lenet-300-100", "prune": {"density": 0.5}}

    def test_names_are_unique_safe_and_short(self):
        long = ["layer-that-has-a-very-long-name-" * 3 + end for end in ("a", "b")]
        found = cells(
            Sweep(
                base=BASE,
                grid={
                    "prune.pattern": ["block:16x8"],
                    "prune.layers": [["fc1*"], ["fc1?"], [*long, "fc1"], [*long, "fc2"]],
                    "prune.scope": ["layer"],
                    "label_smoothing": [0.0, 0.1],
                    "threads": [None, 1],
                },
            )
        )
        names = [cell.name for cell in found]
        assert len(names) == 16
        assert len({name.casefold() for name in names}) == 16
        for name in names:
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,119}", name)
        # fc1* and fc1? both become fc1, so both are marked; the long ones are cut and marked.
        assert re.fullmatch(
            r"pattern-block-16x8_layers-fc1_scope-layer_label-smoothing-0\.0_threads-none-[0-9a-f]{8}", names[0]
        )
        assert len(names[-1]) == 120

    def test_names_do_not_depend_on_the_other_values_unless_they_collide(self):
        few = [cell.name for cell in cells(grid(seed=[3]))]
        assert few == ["seed-3"]
        assert "seed-3" in [cell.name for cell in cells(grid(seed=[1, 3, 5]))]

    def test_keys_with_the_same_end_are_spelled_out(self):
        (cell, *_) = cells(grid(train__epochs=[1], dense__epochs=[2], seed=[0]))
        assert cell.name == "train.epochs-1_dense.epochs-2_seed-0"

    @pytest.mark.parametrize(
        ("key", "value", "field"),
        [
            ("train.epochs", -1, "train"),
            ("train.epoch", 1, "train.epoch: there is no such field"),
            ("prune.density", 1.5, "density"),
            ("prune.params", 0, "params"),
            ("prune.patern", "block:2x2", "patern"),
            ("prune.pattern", "blok:2x2", "blok:2x2"),
            ("prune.score", "magnitud", "magnitud"),
            ("prune.scope", "globl", "scope"),
            ("method", "global-magnitud", "Did you mean 'global-magnitude'"),
            ("checkpoint", "nowhere/model.th", "checkpoint"),
            ("seed.x", 1, "seed"),
        ],
    )
    def test_an_invalid_cell_is_named_with_its_field_before_anything_runs(self, tmp_path, key, value, field):
        valid = {"prune.density": 0.25, "train.epochs": 1, "method": "random", "seed.x": 1}.get(key)
        values = [value] if valid is None or key == "seed.x" else [valid, value]
        file = write(tmp_path / "s.yaml", {"base": BASE, "grid": {key: values, "threads": [1]}})
        with pytest.raises(MicrogliaError) as caught:
            read_sweep(file)
        assert re.search(r"The cell \S+_threads-1 of the sweep is not valid", str(caught.value))
        assert field in str(caught.value)
        assert re.sub(r"[^A-Za-z0-9.+-]+", "-", str(value)) in str(caught.value)
        assert list(tmp_path.iterdir()) == [file]


class TestFile:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ({"base": {}}, "grid"),
            ({"grid": {}}, "grid needs at least one key"),
            ({"grid": {"seed": []}}, "grid.seed"),
            ({"grid": {"seed": [0, 0]}}, "grid.seed needs one or more different values"),
            ({"grid": {"seed": 0}}, "grid.seed"),
            ({"grid": {"seed": [0]}, "bas": {}}, "bas"),
            ({"grid": {"seed": [0]}, "base": [1]}, "base"),
            ("[1, 2]", "mapping"),
            ("a: [", "YAML"),
        ],
    )
    def test_an_invalid_file_is_refused_with_the_field(self, tmp_path, content, expected):
        with pytest.raises(RecipeError, match=re.escape(expected)):
            read_sweep(write(tmp_path / "s.yaml", content))

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(RecipeError, match=r"none\.yaml"):
            read_sweep(tmp_path / "none.yaml")

    def test_overrides_reach_base_grid_and_name(self, tmp_path):
        file = write(tmp_path / "s.yaml", {"base": BASE, "grid": {"prune.density": [0.5, 0.25], "seed": [0]}})
        overrides = [
            "base.model=conv-2",
            "base.train.epochs=3",
            "grid.prune.density=[0.1]",
            "grid.train.lr=[0.1, 0.2]",
            "name=mine",
        ]
        sweep = read_sweep(file, overrides)
        assert sweep.name == "mine"
        assert [cell.name for cell in sweep.cells] == ["density-0.1_seed-0_lr-0.1", "density-0.1_seed-0_lr-0.2"]
        assert {(c.recipe.model, c.recipe.train.epochs) for c in sweep.cells} == {("conv-2", 3)}
        assert [c.recipe.train.lr for c in sweep.cells] == [0.1, 0.2]

    def test_the_plan_shows_every_cell_and_what_is_finished(self, tmp_path):
        sweep = grid(seed=[0, 1])
        (tmp_path / "seed-1").mkdir()
        (tmp_path / "seed-1" / "result.json").write_text("{}")
        console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(plan_table(sweep, tmp_path))
        lines = console.export_text().splitlines()
        assert next(line for line in lines if "seed-0" in line).count("to run") == 1
        assert next(line for line in lines if "seed-1" in line).count("finished") == 1
        assert "state" not in [column.header for column in plan_table(sweep).columns]


class TestShipped:
    def test_shrinkbench(self, tmp_path):
        checkpoint = write(tmp_path / "resnet20.th", "")
        sweep = read_sweep(RECIPES / "shrinkbench_resnet20.yaml", [f"base.checkpoint={checkpoint}"])
        assert len(sweep.cells) == 30
        assert sweep.cells[0].name == "global-magnitude_params-0.5_seed-0"
        expected = {
            "global-magnitude": ("magnitude", "global"),
            "layer-magnitude": ("magnitude", "layer"),
            "global-gradient": ("gradient", "global"),
            "layer-gradient": ("gradient", "layer"),
        }
        for cell in sweep.cells:
            recipe, train = cell.recipe, cell.recipe.train
            assert list(recipe.prune["exclude"]) == ["role:classifier"]
            assert recipe.checkpoint == str(checkpoint)
            assert (train.epochs, train.lr, train.momentum, train.weight_decay, train.batch_size) == (1, 0.02, 0.9, 1e-4, 128)
            if recipe.method in expected:
                assert (recipe.prune["score"], recipe.prune["scope"]) == expected[recipe.method]
        assert {c.recipe.prune["params"] for c in sweep.cells} == {0.5, 0.25, 0.125}

    def test_digits_demo(self):
        sweep = read_sweep(RECIPES / "digits_demo_sweep.yaml")
        assert len(sweep.cells) == 4
        assert all(not cell.recipe.measure.latency and cell.recipe.data == "digits" for cell in sweep.cells)


FAKE = """#!{python}
import json, os, sys, time
from pathlib import Path
assert sys.argv[1:4] == ["-m", "microglia", "prune"] and sys.argv[-1] == "--json"
options = dict(zip(sys.argv[4:-1:2], sys.argv[5:-1:2]))
out = Path(options["--out"])
assert Path(options["--recipe"]).is_file()
began = time.time()
(out / "recipe.yaml").write_text(Path(options["--recipe"]).read_text())
(out / "pid").write_text(str(os.getpid()))
print("working in", out.name, flush=True)
time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
if out.name == os.environ.get("FAKE_FAILS"):
    print("line one", "error: the selector 'nothing*' meets no layer", sep=chr(10), file=sys.stderr)
    sys.exit(3)
found = {{"began": began, "ended": time.time(), "threads": os.environ["OMP_NUM_THREADS"]}}
(out / "result.json").write_text(json.dumps(found))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A python that only understands ``-m microglia prune``: notes when it ran, and fails or sleeps on demand."""
    path = write(tmp_path / "fake-python", FAKE.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(path))
    return monkeypatch


@pytest.fixture
def interruptible():
    """SIGINT heard, also where the tests run as a shell's background job, which starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def results(out):
    return {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/result.json")}


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.usefixtures("fake")
class TestRunning:
    def test_every_cell_runs_once_and_finished_ones_are_left_alone(self, tmp_path):
        sweep, out = grid(seed=[0, 1, 2]), tmp_path / "out"
        first = run_sweep(sweep, out)
        assert (first.done, first.skipped, first.failed) == (["seed-0", "seed-1", "seed-2"], [], [])
        stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
        (out / "seed-1" / "result.json").unlink()
        second = run_sweep(sweep, out)
        assert (second.done, second.skipped, second.failed) == (["seed-1"], ["seed-0", "seed-2"], [])
        for name in ("seed-0", "seed-2"):
            assert (out / name / "result.json").stat().st_mtime_ns == stamps[out / name / "result.json"]
        assert second.sentence.startswith(f"{out}: 1 done, 2 skipped, 0 failed")
        assert [cell["status"] for cell in second.to_dict()["cells"]] == ["skipped", "done", "skipped"]

    def test_recipe_and_log_lie_in_the_run_directory(self, tmp_path):
        sweep = grid(seed=[4])
        run_sweep(sweep, tmp_path)
        assert yaml.safe_load((tmp_path / "seed-4" / "cell.yaml").read_text()) == as_dict(sweep.cells[0].recipe)
        assert (tmp_path / "seed-4" / "log.txt").read_text().splitlines()[1:] == ["working in seed-4"]
        again = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
        assert read_sweep(write(tmp_path / "again.yaml", again)) == sweep

    @pytest.mark.parametrize("jobs", [1, 2, 4])
    def test_that_many_run_at_a_time_and_share_the_cores(self, tmp_path, fake, jobs):
        fake.setenv("FAKE_SECONDS", "0.5")
        fake.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
        run_sweep(grid(seed=[0, 1, 2, 3]), tmp_path, jobs=jobs)
        spans = [(r["began"], r["ended"]) for r in results(tmp_path).values()]
        at_once = [sum(low <= moment < high for low, high in spans) for moment, _ in spans]
        assert max(at_once) <= jobs
        assert jobs == 1 or max(at_once) > 1
        assert {r["threads"] for r in results(tmp_path).values()} == {str(7 // jobs)}

    def test_a_failed_cell_is_named_with_its_log_and_stops_nothing(self, tmp_path, fake):
        fake.setenv("FAKE_FAILS", "seed-1")
        sweep = grid(seed=[0, 1, 2])
        outcome = run_sweep(sweep, tmp_path)
        assert (outcome.done, outcome.failed) == (["seed-0", "seed-2"], ["seed-1"])
        assert "seed-1 failed" in outcome.sentence
        assert "    error: the selector 'nothing*' meets no layer\n    (exit status 3)" in outcome.sentence
        fake.delenv("FAKE_FAILS")
        again = run_sweep(sweep, tmp_path)
        assert (again.done, again.skipped) == (["seed-1"], ["seed-0", "seed-2"])

    def test_only_the_last_attempt_is_quoted(self, tmp_path, fake):
        fake.setenv("FAKE_FAILS", "seed-0")
        run_sweep(grid(seed=[0]), tmp_path)
        outcome = run_sweep(grid(seed=[0]), tmp_path)
        assert outcome.cells[0].problem.count("working in seed-0") == 1
        assert (tmp_path / "seed-0" / "log.txt").read_text().count("working in seed-0") == 2

    def test_success_without_a_result_is_a_failure(self, tmp_path, fake):
        fake.setattr(sys, "executable", "/bin/true")
        assert run_sweep(grid(seed=[0]), tmp_path).failed == ["seed-0"]

    def test_a_program_that_cannot_start_is_a_failure_of_the_cell(self, tmp_path, fake):
        fake.setattr(sys, "executable", str(tmp_path / "no-python"))
        outcome = run_sweep(grid(seed=[0]), tmp_path / "out")
        assert outcome.failed == ["seed-0"]
        assert "no-python" in outcome.cells[0].problem

    def test_runs_of_another_recipe_are_refused_before_anything_runs(self, tmp_path):
        run_sweep(grid(seed=[0]), tmp_path)
        other = Sweep(base={**BASE, "train": {"epochs": 77}}, grid={"seed": [1, 0]})
        with pytest.raises(RunError, match=r"seed-0 holds a run of another recipe .*train\.epochs: 10 -> 77"):
            run_sweep(other, tmp_path)
        assert not (tmp_path / "seed-1").exists()

    def test_a_cell_that_never_began_may_change(self, tmp_path, fake):
        fake.setattr(sys, "executable", "/bin/false")
        assert run_sweep(grid(seed=[0]), tmp_path).failed == ["seed-0"]
        other = Sweep(base={**BASE, "train": {"epochs": 77}}, grid={"seed": [0]})
        assert run_sweep(other, tmp_path).failed == ["seed-0"]
        assert yaml.safe_load((tmp_path / "seed-0" / "cell.yaml").read_text())["train"]["epochs"] == 77

    @pytest.mark.parametrize("jobs", [0, -1])
    def test_no_jobs_is_refused(self, tmp_path, jobs):
        with pytest.raises(RunError, match=f"got {jobs}"):
            run_sweep(grid(seed=[0]), tmp_path, jobs=jobs)

    @pytest.mark.usefixtures("interruptible")
    @pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
    def test_an_interrupt_ends_the_children_and_a_later_start_goes_on(self, tmp_path, fake, number, kind):
        if threading.current_thread() is not threading.main_thread():
            pytest.skip("signals reach the main thread only")
        fake.setenv("FAKE_SECONDS", "60")
        sweep, out = grid(seed=[0, 1, 2]), tmp_path / "out"
        before = signal.getsignal(signal.SIGTERM)

        def interrupt():
            deadline = time.monotonic() + 30
            while sum(bool(path.read_text()) for path in out.glob("*/pid")) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(os.getpid(), number)

        thread = threading.Thread(target=interrupt)
        thread.start()
        began = time.monotonic()
        with pytest.raises(kind):
            run_sweep(sweep, out, jobs=2)
        thread.join()
        assert time.monotonic() - began < 40
        pids = [int(path.read_text()) for path in out.glob("*/pid")]
        assert len(pids) == 2
        assert not any(alive(pid) for pid in pids)
        assert not (out / "seed-2").exists()
        assert results(out) == {}
        assert signal.getsignal(signal.SIGTERM) is before
        fake.delenv("FAKE_SECONDS")
        assert run_sweep(sweep, out, jobs=2).done == ["seed-0", "seed-1", "seed-2"]

    def test_a_cell_that_another_process_works_on_is_waited_for(self, tmp_path):
        (cell,) = cells(grid(seed=[0]))
        directory = tmp_path / cell.name
        directory.mkdir()
        outcomes = []
        with (directory / ".cell.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = threading.Thread(target=lambda: outcomes.append(run_cell(cell, directory)))
            waiting.start()
            time.sleep(0.6)
            assert not outcomes
            assert not (directory / "pid").exists()
            (directory / "result.json").write_text("{}")
        waiting.join(10)
        assert [(o.name, o.status) for o in outcomes] == [("seed-0", "skipped")]
        assert not (directory / "pid").exists()

    def test_the_child_holds_the_cell_when_the_sweep_is_gone(self, tmp_path, fake):
        fake.setenv("FAKE_SECONDS", "60")
        (cell,) = cells(grid(seed=[0]))
        directory = tmp_path / cell.name
        threading.Thread(target=run_cell, args=(cell, directory), daemon=True).start()
        deadline = time.monotonic() + 20
        while not (directory / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        pid = int((directory / "pid").read_text())
        try:
            assert any(Path(link).name == ".cell.lock" for link in _links(pid))
        finally:
            os.kill(pid, signal.SIGKILL)


def _links(pid):
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            yield os.readlink(descriptor)


SMALL = {
    "name": "small",
    "base": {
        "model": "lenet-300-100",
        "data": "digits",
        "prune": {"density": 0.2},
        "dense": {"epochs": 2, "lr": 0.05},
        "train": {"epochs": 1, "lr": 0.02},
        "measure": {"latency": False},
    },
    "grid": {"prune.layers": [["*"], ["fc1"], ["nothing*"]]},
}


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_a_failing_cell_stops_nothing(tmp_path):
    """The real thing: `microglia sweep` killed with SIGKILL after its first cell, then started again."""
    file, out = write(tmp_path / "sweep.yaml", SMALL), tmp_path / "runs"
    words = ("sweep", file, "--out", out, "--jobs", "2", "--json")
    first = start(*words, folder=tmp_path / "work")
    while not list(out.glob("*/result.json")) and first.process.is_alive():
        time.sleep(0.05)
    told = first.kill()  # the sweep alone: what it started lives on
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    assert finished, told.err

    second = microglia(*words, folder=tmp_path / "work")
    outcome = json.loads(second.out.strip().splitlines()[-1])
    status = {cell["name"]: cell["status"] for cell in outcome["cells"]}
    assert set(status) == {"layers", "layers-fc1", "layers-nothing"}
    assert {name for name, state in status.items() if state == "failed"} == {"layers-nothing"}
    for cell in outcome["cells"]:
        if cell["status"] == "failed":
            assert "nothing*" in cell["problem"]
    for path, stamp in finished.items():
        assert path.stat().st_mtime_ns == stamp
        assert status[path.parent.name] == "skipped"
    complete = results(out)
    assert len(complete) == 2
    assert {tuple(result["recipe"]["prune"]["layers"]) for result in complete.values()} == {("*",), ("fc1",)}
    assert all(result["masks"]["kept"] == round(0.2 * result["masks"]["total"]) for result in complete.values())
