"""`microglia connect` as a user runs it, on two tiny runs of different seeds."""

import json
from dataclasses import replace

import pytest
import torch

from commands import microglia, refused, start
from microglia.studies.connect.study import TRAINING, Connecting, connect

WORDS = ("lenet-300-100", "--data", "digits", "--density", "0.5", "dense.epochs=6", "dense.lr=0.1", "dense.batch_size=64")
WORDS += ("train.epochs=1", "measure.latency=false", "threads=1")
CONNECT = ("--epochs", "8", "--lr", "0.05", "--points", "9")
PATHS = ("line", "curve")


def one_thread():
    """Sums over several threads round otherwise, and tests in parallel have other numbers of them than a command."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        outcome = microglia("prune", *WORDS, "--seed", seed, "--out", folder / f"run{seed}", folder=folder / "work")
        assert outcome.status == 0, outcome.err
    return folder / "run0", folder / "run1"


@pytest.fixture(scope="module")
def connected(runs, tmp_path_factory):
    """What a command tells that was killed while it trained the curve, and started again."""
    folder = tmp_path_factory.mktemp("connected")
    words = ("connect", *runs, *CONNECT, "--plane", "3", "--ensemble", "--out", folder / "out")
    command = start(*words, folder=folder / "work", prepare=one_thread)
    command.wait_for(folder / "out" / "stages" / "curve.partial.safetensors")
    assert command.kill().status != 0
    assert not (folder / "out" / "result.json").exists()
    outcome = microglia(*words, "--json", folder=folder / "work", prepare=one_thread)
    assert outcome.status == 0, outcome.err
    return words, folder / "out", json.loads(outcome.out)


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


def test_connect_tells_both_paths_and_draws_them(runs, connected):
    _, out, told = connected
    assert told["task"] == "lenet-300-100 on digits"
    assert [end["target"] for end in told["ends"]] == [str(run) for run in runs]
    for path in PATHS:
        assert len(told[path]["ts"]) == len(told[path]["lengths"]) == len(told[path]["values"]["test_loss"]) == 9
        assert told[path]["summary"]["train_loss"]["max"] == max(told[path]["values"]["train_loss"])
        for number, end in ((0, told["ends"][0]), (-1, told["ends"][1])):  # no batch norm here: the ends are the networks
            assert told[path]["values"]["test_error"][number] == end["test_error"]
    assert told["line"]["lengths"][-1] == pytest.approx(told["distance"], rel=1e-5)
    assert told["curve"]["lengths"][-1] > told["distance"]
    assert told["below"]["train_loss"]
    assert told["below"]["test_loss"]
    assert [row["epoch"] for row in told["curve"]["training"]] == list(range(1, 9))
    assert "different masks" in told["notes"][0]
    assert len(told["ensemble"]["pair"]) == 9
    first, bend, second = told["plane"]["places"]
    assert [*first, bend[1], *second] == pytest.approx([0, 0, 1, 1, 0], abs=1e-9)
    for name in ("profile", "plane"):
        for form in ("png", "svg", "html", "json", "csv"):
            assert (out / f"connect-{name}.{form}").stat().st_size > 0
    assert len((out / "connect-profile.csv").read_text().splitlines()) == 1 + 2 * 9
    assert len((out / "connect-plane.csv").read_text().splitlines()) == 1 + 9
    assert (out / "metrics.jsonl").read_text().count('"stage": "curve"') == 8


def test_a_finished_connection_is_told_again(connected, work):
    words, out, told = connected
    before = (out / "result.json").read_bytes()
    outcome = microglia(*words, folder=work)
    assert outcome.status == 0, outcome.err
    for name in ("line", "curve"):
        assert f"{told[name]['summary']['test_loss']['max']:.4f}" in outcome.out
    assert "The curve's largest value is below the line's in: train loss" in outcome.out
    assert f"Picture: {out / 'connect-profile.png'}" in outcome.out
    assert (out / "result.json").read_bytes() == before
    refused(microglia(*words, "--seed", "1", folder=work), "another recipe", "seed: 0 -> 1")


def test_a_killed_connection_goes_on_to_the_same_numbers(runs, connected):
    _, _, told = connected
    fit = replace(TRAINING, epochs=8, lr=0.05)
    threads = torch.get_num_threads()
    one_thread()
    whole = connect(Connecting((str(runs[0]), str(runs[1])), fit=fit, points=9))
    torch.set_num_threads(threads)
    assert told["line"] == whole["line"]
    assert told["curve"]["values"] == whole["curve"]["values"]


def test_the_line_alone_needs_no_training(runs, work):
    outcome = microglia("connect", *runs, "--curve", "none", "--points", "3", "--limit", "1", "--json", folder=work)
    assert outcome.status == 0, outcome.err
    told = json.loads(outcome.out)
    assert (told["curve"], told["below"], told["plane"], told["ensemble"]) == (None, None, None, None)
    assert told["line"]["summary"]["test_loss"]["barrier"] > 0
    assert (work / told["pictures"][0]).is_file()  # in runs/ by default


def test_wrong_requests_end_in_one_sentence(runs, work, tmp_path):
    first = runs[0]
    refused(microglia("connect", first, "conv-2", folder=work), "The two networks differ", "one architecture")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text("model: lenet-300-100\n")
    refused(microglia("connect", first, tmp_path / "begun", folder=work), "no model yet", "start it again")
    refused(microglia("connect", *runs, "--epochs", "-1", folder=work), "epochs must be at least 0; got -1")
