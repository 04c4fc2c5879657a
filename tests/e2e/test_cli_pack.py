"""A small file from the command line: `prune --method deep-compression`, `pack`, `unpack`, `inspect`, `eie`."""

import json

import pytest
import torch

import microglia as mg
from commands import TINY, microglia, refused


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


def good(outcome):
    assert outcome.status == 0, outcome
    assert "Traceback" not in outcome.err
    return outcome.out


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A finished run of Deep Compression, and what it printed."""
    folder = tmp_path_factory.mktemp("compressed")
    words = ("prune", *TINY, "--method", "deep-compression", "prune.bits=4", "prune.share.epochs=1")
    return folder / "run", good(microglia(*words, "--out", folder / "run", folder=folder / "work"))


def test_the_run_names_the_bytes_of_its_file(compressed):
    run, printed = compressed
    size = (run / "model.mgpack").stat().st_size
    assert f"packed file model.mgpack: {size:,} bytes" in " ".join(printed.split())
    assert json.loads((run / "result.json").read_text())["packed"]["bytes"] == size


def test_inspect_shows_layers_for_people_and_programs(work, compressed):
    file = compressed[0] / "model.mgpack"
    shown = good(microglia("inspect", file, folder=work))
    assert "fc1.weight" in shown
    assert f"{file.stat().st_size:,} bytes" in shown
    told = json.loads(good(microglia("inspect", file, "--json", folder=work)))
    assert told["bytes"] == file.stat().st_size
    assert {e["name"]: e["form"] for e in told["entries"]}["fc1.weight"] == "shared"


def test_unpack_makes_a_model_that_other_commands_take(work, compressed, tmp_path):
    run = compressed[0]
    assert str(tmp_path / "m") in good(microglia("unpack", run / "model.mgpack", "--out", tmp_path / "m", folder=work))
    one, other = mg.load(run / "model").state_dict(), mg.load(tmp_path / "m").state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    ours = json.loads(good(microglia("eval", tmp_path / "m", "--json", folder=work)))
    assert ours == json.loads(good(microglia("eval", run, "--json", folder=work)))


def test_pack_a_run_as_it_is_and_rounded(work, compressed, tmp_path):
    run, sizes = compressed[0], {}
    for name, words in {
        "exact": (),
        "rounded": ("--bits", "3"),
        "mixed": ("--bits", "fc3=2,*=3"),
        "best": ("--bits", "3", "--exact"),
    }.items():
        told = json.loads(good(microglia("pack", run, *words, "--out", tmp_path / name, "--json", folder=work)))
        assert told["file"] == str(tmp_path / name)
        sizes[name] = told["bytes"]
    assert sizes["exact"] == (run / "model.mgpack").stat().st_size
    assert sizes["mixed"] < sizes["rounded"] < sizes["exact"]
    assert sizes["rounded"] < sizes["best"]  # its codes are used more evenly, and take more bits


def test_pack_and_prune_for_a_number_of_bytes(work, compressed, tmp_path):
    told = json.loads(good(microglia("pack", compressed[0], "--bytes", "7000", "--out", tmp_path / "p", "--json", folder=work)))
    assert 5700 < told["bytes"] == (tmp_path / "p").stat().st_size <= 7000
    words = ("prune", *TINY, "--method", "deep-compression", "--density", "0.1", "prune.share.epochs=1")
    told = json.loads(
        good(microglia(*words, "--within", "100", "prune.rounds=1", "--out", tmp_path / "r", "--json", folder=work))
    )
    assert told["asked"]["within"] == 100
    assert [one["bytes"] for one in told["packed"]["rounds"]] == [told["packed"]["bytes"]]


def test_eie_shows_cycles_and_energy(work, compressed, tmp_path):
    file = compressed[0] / "model.mgpack"
    assert "4 elements at 800 MHz" in " ".join(good(microglia("eie", file, "--elements", "4", folder=work)).split())
    told = json.loads(good(microglia("eie", file, "--elements", "4", "--activations", "1", "--json", folder=work)))["layers"]
    assert [row["layer"] for row in told] == ["fc1.weight", "fc2.weight", "fc3.weight", "all"]
    assert told[-1]["cycles"] == sum(row["cycles"] for row in told[:-1])
    assert all(
        row["ideal"] <= row["cycles"] and 0 < row["balance"] <= 1 and row["energy"] < row["dense_energy"] for row in told
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("pack", "{run}", "--bits", "many"), "The bits are a number"),
        (("pack", "{run}", "--bits", "9"), "1 to 8 bits"),
        (("pack", "{run}", "--bits", "fc9=3"), "meets no layer"),
        (("pack", "{run}", "--bits", "3", "--initial", "forgy"), "forgy"),
        (("pack", "{run}", "--bits", "3", "--bytes", "4000"), "leave bits out"),
        (("pack", "{run}", "--bytes", "100"), "too small"),
        (("pack", "nowhere"), "nowhere"),
        (("unpack", "{run}/result.json"), "is not a packed model"),
        (("inspect", "{run}/missing"), "Cannot read"),
    ],
)
def test_wrong_words_end_in_one_sentence(work, compressed, words, text):
    refused(microglia(*(word.format(run=compressed[0]) for word in words), folder=work), text)
