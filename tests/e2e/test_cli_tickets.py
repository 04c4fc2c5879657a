"""`microglia tickets`, `instability` and pruning at initialization as a user runs them, on real digits."""

import csv
import json

import pytest

from commands import microglia, refused, start

SMALL = ("lenet-300-100", "train.epochs=3", "train.max_batches=8", "train.batch_size=32", "train.lr=0.1", "threads=1")
FORMS = ("csv", "html", "json", "png", "svg")


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


def good(outcome):
    assert outcome.status == 0, outcome
    assert "Traceback" not in outcome.err
    return outcome.out


def times(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*.safetensors")}


def test_tickets_are_found_compared_drawn_and_never_trained_twice(work, tmp_path):
    words = ("tickets", *SMALL, "--density", "0.64", "--seeds", "2", "--out", tmp_path / "t", "prune.scope=layer")
    out = good(microglia(*words, folder=work))
    assert "Tickets at 21 % beat other initial weights" in " ".join(out.replace("│", " ").split())
    for form in FORMS:
        assert (tmp_path / "t" / f"tickets-levels.{form}").stat().st_size > 0
    before = times(tmp_path / "t")
    told = json.loads(good(microglia(*words, "--json", folder=work)))
    assert times(tmp_path / "t") == before
    assert {(row["arm"], row["level"]) for row in told["rows"]} == {
        ("dense", 0),
        *((arm, level) for arm in ("iterative", "oneshot", "reinit", "shuffle") for level in (1, 2)),
    }
    assert {row["seed"] for row in told["rows"]} == {0, 1}
    own = {(row["arm"], row["level"]): row for row in told["rows"] if row["seed"] == 0}
    assert own["oneshot", 1]["test"] == own["iterative", 1]["test"]  # the first level is found at once either way
    assert all(row["kept"] == round(50200 * 0.8 ** row["level"]) for row in told["rows"])
    assert all(row["n"] == 2 for row in told["summary"])
    with (tmp_path / "t" / "tickets-levels.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(told["summary"]) == 9
    refused(microglia("report", tmp_path / "t", "--out", tmp_path / "r", folder=work), "figures of its own")


def test_instability_of_a_ticket_beside_the_dense_network(work, tmp_path):
    ticket = ("prune", *SMALL, "--method", "tickets", "--density", "0.64", "dense.epochs=0", "measure.latency=false")
    good(microglia(*ticket, "--out", tmp_path / "ticket", folder=work))
    words = ("instability", "--masks", tmp_path / "ticket", "--at", "0,3", "--points", "3", "--recalibrate", "0")
    told = json.loads(good(microglia(*words, "--out", tmp_path / "i", "--json", folder=work)))
    by_name = {(row["network"], row["epoch"]): row for row in told["rows"]}
    assert set(by_name) == {("dense", 0), ("dense", 3), ("masked", 0), ("masked", 3)}
    assert by_name["dense", 3]["instability"] == {"train": 0, "test": 0}
    assert by_name["masked", 0]["density"] == pytest.approx(0.64, abs=1e-4)
    assert told["stable_from"]["dense"] is not None
    for form in FORMS:
        assert (tmp_path / "i" / f"instability-lines.{form}").stat().st_size > 0
    out = good(microglia(*words, "--out", tmp_path / "i", folder=work))
    assert "dense: stable from epoch" in out
    other = tuple("4" if word == "3" else word for word in words)
    refused(microglia(*other, "--out", tmp_path / "i", folder=work), "run of another recipe", "points: 3 -> 4")


def test_masks_are_found_for_every_seed_and_epoch_and_a_killed_search_goes_on(work, tmp_path):
    words = ("instability", *SMALL, "--density", "0.64", "--at", "0,2", "--seeds", "2", "--points", "3", "--recalibrate", "0")
    killed = start(*words, "--out", tmp_path / "killed", "--json", folder=work)
    killed.wait_for(tmp_path / "killed" / "seed-1" / "stages" / "imp-2-level-01.safetensors")
    killed.kill()
    told = json.loads(good(microglia(*words, "--out", tmp_path / "killed", "--json", folder=work)))
    whole = json.loads(good(microglia(*words, "--out", tmp_path / "whole", "--json", folder=work)))
    assert {**told, "pictures": None} == {**whole, "pictures": None}
    assert set(told["stable_from"]) == {"dense", "imp", "random"}
    assert all(row["n"] == 2 for row in told["summary"])
    assert len({row["masks"] for row in told["rows"] if row["network"] == "imp"}) == 4
    out = good(microglia(*words, "--out", tmp_path / "whole", folder=work))
    assert "imp, 64 %" in out
    assert "random, 64 %" in out


def test_synflow_shows_what_is_on_a_path(work, tmp_path):
    words = ("prune", *SMALL, "--method", "synflow", "--density", "0.01", "dense.epochs=0", "measure.latency=false")
    result = json.loads(good(microglia(*words, "--out", tmp_path / "s", "--json", folder=work)))
    assert result["masks"]["kept"] == 502
    assert result["initialization"]["emptied"] == []
    assert 480 < result["initialization"]["effective"] <= 502  # units fed by their bias alone lie on no path


WRONG = {
    "no density": (("tickets", *SMALL), "--density", "0.035"),
    "unknown arm": (("tickets", *SMALL, "--density", "0.8", "--arms", "oneshot,lucky"), "oneshot", "lucky"),
    "another method": (("tickets", *SMALL, "--density", "0.8", "method=magnitude"), "'tickets'"),
    "epochs that are no numbers": (("instability", *SMALL, "--at", "early"), "whole numbers", "early"),
    "an epoch after the end": (("instability", *SMALL, "--at", "0,9"), "0 to 3"),
    "masks of nothing": (("instability", "--masks", "nowhere"), "nowhere"),
    "masks given and found": (("instability", "--masks", "nowhere", "--density", "0.5"), "--masks or --density"),
    "masks found for the last epoch": (("instability", *SMALL, "--density", "0.5", "--at", "0,3"), "at most 2 of 3"),
    "masks found by another method": (
        ("instability", *SMALL, "--density", "0.5", "--at", "0", "method=magnitude"),
        "method imp",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input_ends_in_a_sentence(work, case):
    words, *expected = WRONG[case]
    refused(microglia(*words, folder=work), *expected)
