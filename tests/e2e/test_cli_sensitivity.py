"""`microglia sensitivity` and `--scope sensitivity:FILE` as a user runs them, on real digits."""

import json

import pytest

from commands import TINY, microglia, refused, start

PLACES = ("--densities", "0.5,0.2,0.05", "--device", "cpu")


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that kept everything: a trained network."""
    folder = tmp_path_factory.mktemp("run")
    words = [word if word != "0.2" else "1.0" for word in TINY]
    outcome = microglia("prune", *words, "--out", folder / "run", folder=folder / "work")
    assert outcome.status == 0, outcome.err
    return folder / "run"


def test_measured_drawn_and_pruned_by(run, work):
    outcome = microglia("sensitivity", run, *PLACES, folder=work)
    assert outcome.status == 0, outcome
    assert "lenet-300-100 on digits: validation accuracy" in " ".join(outcome.out.split())
    assert f"Scope: sensitivity:{run / 'sensitivity' / 'sensitivity.json'}" in outcome.out
    for name in ("map", "curves"):
        assert f"Picture: {run / 'sensitivity' / f'sensitivity-{name}.png'}" in outcome.out
        assert (run / "sensitivity" / f"sensitivity-{name}.html").stat().st_size > 0
    again = microglia("sensitivity", run, *PLACES, "--json", folder=work)
    told = json.loads(again.out)
    assert told == json.loads((run / "sensitivity" / "result.json").read_text())
    assert [len(row["places"]) for row in told["layers"]] == [3, 3, 3]
    scope = ("--scope", f"sensitivity:{run}")
    outcome = microglia("prune", *TINY, *scope, "--out", work / "pruned", "--json", folder=work)
    assert outcome.status == 0, outcome
    result = json.loads(outcome.out)
    assert result["masks"]["kept"] / result["masks"]["total"] == pytest.approx(0.2, abs=1e-4)
    assert len({round(density, 3) for density in result["densities"].values()}) > 1


def test_killed_and_started_again_it_ends_in_the_same_bytes(run, work, tmp_path):
    words = ("sensitivity", run, *PLACES, "--seed", "1")
    assert microglia(*words, "--out", tmp_path / "whole", folder=work).status == 0
    started = start(*words, "--out", tmp_path / "killed", folder=work)
    started.wait_for(tmp_path / "killed" / "stages" / "layer-000.safetensors")
    started.kill()
    assert not (tmp_path / "killed" / "result.json").exists()
    assert microglia(*words, "--out", tmp_path / "killed", folder=work).status == 0
    for name in ("sensitivity.json", "sensitivity-map.csv", "sensitivity-map.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--densities", "half"), "The densities are fractions such as 0.5,0.2,0.1; got 'half'."),
        (("--split", "test"), "validation or train, and not test"),
        (("--pattern", "block:0x4"), "block"),
        (("--layers", "conv7"), "meets no layer"),
    ],
)
def test_wrong_input_is_one_sentence(run, work, words, sentence):
    refused(microglia("sensitivity", run, *words, "--out", work / "no", folder=work), sentence)


@pytest.mark.parametrize(
    ("scope", "sentence"),
    [
        ("sensitivity:nothing.json", "There is no file nothing.json; `microglia sensitivity` writes one."),
        ("sensitivity", "There is no scope named 'sensitivity'. Did you mean 'sensitivity:FILE'"),
        ("sensitivity:{run}/result.json", "is not a file of this library; expected microglia.sensitivity"),
    ],
)
def test_a_wrong_scope_is_one_sentence_before_anything_is_trained(run, work, scope, sentence):
    words = ("prune", *TINY, "--scope", scope.format(run=run), "--out", work / "no")
    refused(microglia(*words, folder=work), sentence)
    assert not (work / "no" / "stages" / "dense.safetensors").exists()
