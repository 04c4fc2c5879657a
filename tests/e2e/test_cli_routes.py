"""`microglia routes` and `microglia shifts` as a user runs them, on one small dynamically pruned run."""

import json

import pytest

from commands import microglia, refused

WORDS = ("lenet-5", "--data", "digits", "--method", "ftwt", "--flops", "0.5")
WORDS += ("dense.epochs=1", "train.epochs=1", "measure.latency=false", "threads=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    outcome = microglia("prune", *WORDS, "--out", folder / "run", "--json", folder=folder / "work")
    assert outcome.status == 0, outcome.err
    return folder / "run", json.loads(outcome.out)


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


def test_routes_prints_tables_and_keeps_pictures(run, work):
    directory, result = run
    outcome = microglia("routes", directory, folder=work)
    assert outcome.status == 0, outcome.err
    for row in result["routes"]["layers"]:
        assert row["layer"] in outcome.out
    assert f"{100 * result['routes']['honest']['mean']:.2f}" in outcome.out
    assert f"{100 * result['estimate']['honest']:.2f}" in outcome.out
    for name in ("core", "heat", "classes"):
        assert f"Picture: {directory / 'routes' / f'test-{name}.png'}" in outcome.out
        assert (directory / "routes" / f"test-{name}.svg").is_file()
    told = json.loads(microglia("routes", directory, "--json", folder=work).out)
    assert told["honest"] == result["routes"]["honest"]


def test_shifts_prints_a_column_for_each_run(run, work):
    words = ("shifts", run[0], "resnet8", "--severity", "1,5", "--limit", "50")
    outcome = microglia(*words, folder=work)
    assert outcome.status == 0, outcome.err
    found = json.loads(microglia(*words, "--json", folder=work).out)
    assert [one["name"] for one in found["runs"]] == ["run", "resnet8"]
    for one in found["runs"][0]["results"]:
        assert f"{100 * one['accuracy']:.2f} ({100 * one['macs']['mean']:.1f})" in outcome.out
    assert "noise 5" in outcome.out
    assert "blur 3" not in outcome.out


def test_wrong_requests_end_in_one_sentence(run, work, tmp_path):
    refused(microglia("routes", "resnet8", folder=work), "resnet8 has no gates", "--method ftwt")
    refused(microglia("routes", run[0], "--split", "all", folder=work), "train, validation or test; got 'all'")
    refused(microglia("routes", run[0], "--layer", "conv", folder=work), "no gated layer named 'conv'", "'conv1'")
    refused(microglia("routes", run[0], "--device", "tpu", folder=work), "cpu, cuda or auto; got 'tpu'")
    refused(microglia("shifts", run[0], "--severity", "1-3", folder=work), "such as 1,3,5; got '1-3'")
    refused(microglia("shifts", run[0], "--severity", "0", folder=work), "from 1 (mild) to 5", "is 0")
    refused(microglia("shifts", run[0], "--limit", "0", folder=work), "at least 1; got 0")
    (tmp_path / "empty").mkdir()
    refused(microglia("shifts", run[0], tmp_path / "empty", folder=work), "neither a run directory")
