"""`microglia surface` and `microglia descent` as a user runs them, on small networks of real digits."""

import csv
import json

import pytest
import torch

import microglia as mg
from commands import TINY, microglia, refused
from microglia.studies.descent.study import interior_peak
from microglia.studies.space.points import point_of
from microglia.studies.space.trajectory import keep_place

FORMS = ("csv", "html", "json", "png", "svg")
SMALL = ("--side", "3", "--limit", "1")


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, pruned to a fifth of its weights."""
    folder = tmp_path_factory.mktemp("run")
    outcome = microglia("prune", *TINY, "--out", folder / "run", "--json", folder=folder / "work")
    assert outcome.status == 0, outcome.err
    return folder / "run", json.loads(outcome.out)


def good(outcome):
    assert outcome.status == 0, outcome
    assert "Traceback" not in outcome.err
    return outcome.out


def test_surface_of_a_run_is_drawn_and_goes_on_where_it_was(run, work):
    directory, result = run
    out = good(microglia("surface", directory, "--side", "5", "--split", "test", folder=work))
    assert "lenet-300-100 on digits: test loss, 5 x 5 places" in out
    for name in ("plane", "line"):
        assert f"Picture: {directory / 'surface' / f'surface-{name}.png'}" in out
        for form in FORMS:
            assert (directory / "surface" / f"surface-{name}.{form}").stat().st_size > 0
    stages = directory / "surface" / "stages"
    assert sorted(path.name for path in stages.iterdir()) == ["line.safetensors", *(f"row-00{n}.safetensors" for n in range(5))]
    times = {path: path.stat().st_mtime_ns for path in stages.iterdir()}
    pictures = [directory / "surface" / name for name in ("surface-plane.csv", "surface-line.png")]
    before = [path.read_bytes() for path in pictures]
    (stages / "row-003.safetensors").unlink()  # as if it had been killed before
    (directory / "surface" / "result.json").unlink()
    told = json.loads(good(microglia("surface", directory, "--side", "5", "--split", "test", "--json", folder=work)))
    assert [path.name for path, time in times.items() if path.stat().st_mtime_ns != time] == ["row-003.safetensors"]
    assert before == [path.read_bytes() for path in pictures]
    assert told == json.loads((directory / "surface" / "result.json").read_text())
    assert told["center"]["accuracy"] == result["pruned"]["metrics"]["accuracy"]
    assert told["center"]["loss"] == pytest.approx(result["pruned"]["metrics"]["loss"], rel=1e-5)
    assert told["axis"] == [-1, -0.5, 0, 0.5, 1]
    assert told["plane"]["loss"][2][2] == told["center"]["loss"] == told["line"][4]["loss"]
    assert told["plane"]["loss"][2][4] == told["line"][-1]["loss"]  # the line is the middle of the plane
    with (directory / "surface" / "surface-plane.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 25
    assert [float(row["loss"]) for row in rows[:5]] == told["plane"]["loss"][0]


def test_surface_of_a_saved_model_and_of_a_name(run, work, tmp_path):
    words = ("surface", run[0] / "model", *SMALL, "--seed", "1", "--out", tmp_path / "one", "--json")
    told = json.loads(good(microglia(*words, folder=work)))
    assert abs(told["cosine"]) < 0.1
    assert told["center"]["accuracy"] > 0.8
    out = good(microglia("surface", "lenet-300-100", *SMALL, "--normalization", "layer", "--trajectory", folder=work))
    assert "layer-normalized" in out
    assert "keeps no trajectory of its training" in out
    assert "measure.trajectory=true" in out
    assert (work / "runs" / "surface-lenet-300-100-digits" / "surface-plane.svg").is_file()


def test_the_plane_of_a_training(run, work, tmp_path):
    model = mg.fold(mg.load(run[0] / "model", mg.tasks.build("lenet-300-100", shape=(1, 8, 8))))
    end = point_of(model)
    generator = torch.Generator().manual_seed(0)
    for number, share in enumerate((1.0, 0.5, 0.2, 0.0)):
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(end[name] * (1 - share) + 0.1 * share * noise)
        keep_place(run[0] / "trajectory", number, model)
    words = ("surface", run[0], *SMALL, "--trajectory", "--out", tmp_path / "some", "--json")
    told = json.loads(good(microglia(*words, folder=work)))
    assert told["notes"] == []
    assert told["trajectory"]["places"][-1] == pytest.approx([0, 0], abs=1e-6)
    assert max(abs(x) for x, _ in told["trajectory"]["places"]) == pytest.approx(1 / 1.1)
    assert 0.5 < sum(told["trajectory"]["explained"]) <= 1 + 1e-9
    assert told["cosine"] == pytest.approx(0, abs=1e-6)


def test_descent_over_widths_adds_to_what_is_there(work, tmp_path):
    words = ("descent", "--steps", "20", "--batch-size", "64", "--lr", "0.01", "--noise", "0.2", "--out", tmp_path / "widths")
    out = good(microglia(*words, "--widths", "4,1", folder=work))
    assert "mlp on digits: 20 steps each, label noise 20 %" in out
    assert "Nothing fits to 1 % training error." in out
    assert f"Picture: {tmp_path / 'widths' / 'descent-width.png'}" in out
    stages = tmp_path / "widths" / "stages"
    times = {path: path.stat().st_mtime_ns for path in stages.iterdir()}
    assert len(times) == 2
    told = json.loads(good(microglia(*words, "--widths", "1,2,4", "--json", folder=work)))
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert [row["width"] for row in told["rows"]] == [1, 2, 4]
    assert told["over"] == "width"
    assert told["chance"] == pytest.approx(0.9)
    for form in FORMS:
        assert (tmp_path / "widths" / f"descent-width.{form}").stat().st_size > 0
    refused(microglia(*words, "--steps", "30", folder=work), "run of another recipe", "steps: 20 -> 30", "Give --out another")


def test_descent_over_samples(work):
    words = ("descent", "--samples", "10,300", "--width", "8", "--steps", "60", "--lr", "0.02", "--noise", "0", "--json")
    told = json.loads(good(microglia(*words, folder=work)))
    assert [(row["width"], row["samples"]) for row in told["rows"]] == [(8, 10), (8, 300)]
    assert told["over"] == "samples"
    assert told["capacity"] >= 10
    (directory,) = (work / "runs").iterdir()
    assert directory.name.startswith("descent-mlp-digits-")
    assert (directory / "descent-samples.html").is_file()


def test_peaks_are_inside():
    def found(*errors):
        peak = interior_peak([{"width": number, "test_error": error} for number, error in enumerate(errors)])
        return peak and (peak["width"], round(peak["height"], 6))

    assert found(0.9, 0.3, 0.5, 0.2) == (2, 0.2)
    assert found(0.2, 0.6, 0.5) == (1, 0.1)
    assert found(0.9, 0.5, 0.2) is None
    assert found(0.2, 0.2, 0.2) is None
    assert found(0.5) is None


WRONG = {
    "even side": (("surface", "lenet-300-100", "--side", "4"), "odd number", "got 4"),
    "range": (("surface", "lenet-300-100", "--range", "0"), "above 0; got 0.0"),
    "normalization": (("surface", "lenet-300-100", "--normalization", "row"), "filter, layer, weight or none; got 'row'"),
    "limit": (("surface", "lenet-300-100", "--limit", "0"), "at least 1; got 0"),
    "split": (("surface", "lenet-300-100", "--split", "all"), "train, validation or test; got 'all'"),
    "target": (("surface", "lenet-301"), "lenet-301", "lenet-300-100"),
    "widths": (("descent", "--widths", "1-4"), "such as 1,2,4,8; got '1-4'"),
    "no width": (("descent", "--widths", "0,1"), "at least 1", "'0,1'"),
    "both": (("descent", "--widths", "1,2", "--samples", "10,20"), "One of them varies at a time"),
    "one width": (("descent", "--widths", "1,2", "--width", "1", "--samples", "10"), "not both"),
    "width": (("descent", "--width", "1"), "--widths 1,2,4"),
    "noise": (("descent", "--noise", "1.2"), "in [0, 1]; got 1.2"),
    "samples": (("descent", "--samples", "10,99999"), "1294 training images; asked for 99999"),
    "family": (("descent", "--family", "conv-2"), "no option 'width'"),
    "optimizer": (("descent", "--optimizer", "lbfgs"), "adam or sgd"),
    "divergence": (("descent", "--optimizer", "sgd", "--lr", "1e30", "--widths", "4"), "smaller lr"),
    "data": (("descent", "--data", "digit"), "digits"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_end_in_one_sentence(work, case):
    words, *texts = WRONG[case]
    refused(microglia(*words, folder=work), *texts)


@pytest.mark.parametrize("name", ["surface", "descent"])
def test_help(work, name):
    assert "--out" in good(microglia(name, "--help", folder=work))
