"""`dropout-path`, `fast-ensemble` and `least-squares` as commands: durable, drawn, and right where theory says so."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fresh
import microglia as mg
from microglia import studies
from microglia.cli.app import app
from microglia.core.errors import MicrogliaError
from microglia.storage.run import Run
from microglia.studies.dropout_paths.study import Building, view_dropout_path
from microglia.studies.fast_ensemble.study import Ensembling, ensemble_chart, view_fast_ensemble
from microglia.studies.least_squares.regression import bias_risk, variance_risk
from microglia.studies.least_squares.study import Regressing, risk_chart, view_least_squares
from microglia.studies.space.ensembling import Cycles
from microglia.tasks.classification import image_task
from microglia.train.optim import FitConfig

FORMS = ("csv", "html", "json", "png", "svg")


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200", "TERM": "dumb"}, prog_name="microglia")


def told_by(*words):
    outcome = run(*words, "--json")
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Two saved networks, trained a little on real digits from other initializations."""
    folder, task = tmp_path_factory.mktemp("ends"), image_task("lenet-300-100", "digits")
    for seed in (0, 1):
        model = task.fresh(seed)
        mg.fit(model, task, FitConfig(epochs=1, max_batches=20, batch_size=64, lr=0.1), seed=seed)
        mg.save(model, folder / f"end-{seed}")
    return str(folder / "end-0"), str(folder / "end-1")


@pytest.fixture
def once(monkeypatch):
    """The stages that were computed, not read from files."""
    made, stage = [], Run.stage

    def watched(self, name, work):
        return stage(self, name, lambda progress: made.append(name) or work(progress))

    monkeypatch.setattr(Run, "stage", watched)
    return made


class TestDropoutPath:
    WORDS = ("--tries", 2, "--points", 2, "--limit", 1)

    def test_the_built_path_stays_below_the_bound_and_the_line_does_not(self, ends, tmp_path, once):
        words = ("dropout-path", *ends, *self.WORDS, "--out", tmp_path / "out")
        told = told_by(*words)
        path, line = told["path"], told["line"]
        assert path["maximum"] <= path["bound"] + 1e-5
        assert path["segments"] == 23  # 2 + 5 on each side of 3 layers, 3 + 3 * 2 in the middle
        assert path["rows"][0]["loss"] == pytest.approx(line["loss"][0])
        assert path["rows"][-1]["loss"] == pytest.approx(line["loss"][-1])
        assert line["maximum"] == max(line["loss"])
        assert told["hidden"] == [300, 100]
        for form in FORMS:
            assert (tmp_path / "out" / f"dropout-path-loss.{form}").stat().st_size > 0
        assert once == ["keep-0", "keep-1", "path", "line"]
        (tmp_path / "out" / "stages" / "line.safetensors").unlink()
        once.clear()
        assert told_by(*words) == told
        assert once == ["line"]
        text = run(*words).output
        assert f"at most {path['maximum']:.4f}" in text
        assert f"the straight line reaches {line['maximum']:.4f}" in text

    def test_a_searched_factor_is_not_worse(self, ends, tmp_path):
        asked = Building(ends, tries=1, points=1, limit=1, out=tmp_path / "one")
        plain = view_dropout_path(asked)
        best = view_dropout_path(Building(ends, tries=1, points=1, limit=1, rescale=True, out=tmp_path / "two"))
        assert all(one <= other + 1e-6 for one, other in zip(best["path"]["epsilon"], plain["path"]["epsilon"], strict=True))
        assert plain["rescale"] == [None, None]
        assert all(factor > 0 for factor in best["rescale"])

    def test_what_has_no_path(self, ends, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for number in (0, 1):
            mg.save(image_task("resnet8", "digits").fresh(number), tmp_path / f"r{number}")
        for words, text in (
            (("r0", "r1"), "no plain chain of layers"),
            ((ends[0], ends[0]), "two different networks"),
            ((*ends, "--limit", 0), "at least 1; got 0"),
            ((*ends, "--split", "all"), "The split is train, validation or test; got 'all'."),
        ):
            outcome = run("dropout-path", *words)
            assert outcome.exit_code == 1
            assert text in outcome.stderr
        assert not (tmp_path / "runs").exists()


class TestFastEnsemble:
    WORDS = ("--members", 2, "--batches", 3, "--batch-size", 64, "--high", 0.1, "--low", 0.02)

    def test_members_and_their_ensemble(self, ends, tmp_path, once):
        words = ("fast-ensemble", ends[0], *self.WORDS, "--out", tmp_path / "out")
        told = told_by(*words)
        task = image_task("lenet-300-100", "digits")
        assert told["start"] == mg.evaluate(mg.load(ends[0]), task)["accuracy"]
        assert [(row["member"], row["epoch"]) for row in told["members"]] == [(1, 1), (2, 3)]
        assert told["members"][0]["ensemble"] == told["members"][0]["accuracy"]
        assert told["cycles"] == {"members": 2, "length": 2, "high": 0.1, "low": 0.02}
        for form in FORMS:
            assert (tmp_path / "out" / f"fast-ensemble-members.{form}").stat().st_size > 0
        once.clear()
        assert told_by(*words) == told
        assert once == []
        other = run(*words, "--high", 0.2)
        assert "cycles.high: 0.1 -> 0.2" in other.stderr

    def test_it_lies_beside_a_saved_model_and_the_chart_shows_the_cycles(self, ends, tmp_path):
        assert Ensembling(ends[0]).directory.name == "end-0-fast-ensemble"
        cycles, fit = Cycles(members=1, length=2, high=0.1, low=0.05), FitConfig(max_batches=1)
        told = view_fast_ensemble(Ensembling(ends[1], cycles, fit, out=tmp_path / "out"))
        _, rates = ensemble_chart(told.result).panels
        (line,) = rates.lines
        assert (line.y[0], line.y[-1]) == (0.1, 0.05)
        assert list(line.y) == sorted(line.y, reverse=True)

    def test_wrong_cycles(self, ends):
        assert "0 < low <= high" in run("fast-ensemble", ends[0], "--low", 1).stderr
        assert "even number of epochs" in run("fast-ensemble", ends[0], "--length", 3).stderr


class TestLeastSquares:
    def test_simulated_beside_exact_and_more_features_are_added(self, tmp_path, once):
        words = ("least-squares", "--samples", 20, "--draws", 200, "--noise", 0.5, "--out", tmp_path / "out")
        told = told_by(*words, "--features", "5,20,60")
        assert [row["features"] for row in told["rows"]] == [5, 20, 60]
        for row in told["rows"]:
            if row["features"] != 20:
                assert row["exact"] == variance_risk(20, row["features"], 0.5) + bias_risk(20, row["features"])
                assert abs(row["risk"] - row["exact"]) < 4 * row["error"]
            assert row["ridge"] < row["risk"]
        assert told["rows"][1]["exact"] is None
        once.clear()
        more = told_by(*words, "--features", "5,10,20,60")
        assert once == ["features-10"]
        assert [row for row in more["rows"] if row["features"] != 10] == told["rows"]
        for form in FORMS:
            assert (tmp_path / "out" / f"least-squares-risk.{form}").stat().st_size > 0
        assert "infinite" in run(*words, "--features", "20").output

    def test_the_chart_leaves_a_gap_where_the_risk_is_infinite(self, tmp_path):
        told = view_least_squares(Regressing(4, (2, 4, 9), draws=2, out=tmp_path / "out"))
        exact, *_ = risk_chart(told.result).panels[0].lines
        assert [math.isnan(value) for value in exact.y] == [False, True, False]

    @pytest.mark.parametrize("wrong", [{"features": ()}, {"features": (0,)}, {"draws": 1}, {"noise": -1.0}, {"signal": 0.0}])
    def test_wrong_numbers(self, tmp_path, wrong):
        with pytest.raises(MicrogliaError, match="Least squares takes"):
            view_least_squares(Regressing(**wrong, out=tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_every_file_of_the_studies_is_imported_by_a_command():
    """No code is out of reach: what no command imports is neither run nor seen."""
    rooms = ", ".join(f"microglia.cli.{name}" for name in ("studies", "commands", "sweeping", "evidence"))
    code = f"import json, sys, {rooms}; print(json.dumps(list(sys.modules)))"
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr
    root = Path(studies.__file__).parent
    names = {".".join(("microglia.studies", *path.relative_to(root).with_suffix("").parts)) for path in root.rglob("*.py")}
    assert {name.removesuffix(".__init__") for name in names} - set(json.loads(done.stdout.splitlines()[-1])) == set()


@pytest.mark.parametrize("name", ["tickets", "instability"])
def test_a_training_without_a_model_is_one_sentence_with_an_example(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for words in ((), ("--data", "digits", "--density", "0.5"), ("train.epochs=2",)):
        outcome = run(name, *words)
        assert outcome.exit_code == 1
        assert outcome.stderr.count("\n") == 1
        assert "Which model is to be trained?" in outcome.stderr
        assert studies.every_study()[name].example in outcome.stderr
    assert list(tmp_path.iterdir()) == []
