"""Runs that start from the same dense network train it once, and end in the bits they would have had alone."""

import fcntl
import json
import threading

import pytest
import torch

from microglia.lab.execute import execute
from microglia.lab.recipe import as_dict, resolve, start_of
from microglia.storage.files import read_state
from microglia.storage.run import Run

BASE = {
    "model": "lenet-5",
    "data": "digits",
    "dense": {"epochs": 1, "batch_size": 256},
    "train": {"epochs": 1, "batch_size": 256},
    "measure": {"latency": False},
    "device": "cpu",
}
MASKS = {**BASE, "method": "magnitude", "prune": {"density": 0.3}}
CHANNELS = {**BASE, "method": "channels", "prune": {"flops": 0.5}}


def rows(directory, stage):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == stage]


def weights(directory):
    return (directory / "model" / "model.safetensors").read_bytes()


def test_the_second_run_takes_the_dense_network_of_the_first_and_ends_in_the_same_bits(tmp_path, monkeypatch):
    execute(resolve(MASKS), tmp_path / "masks", starts=tmp_path / "starts")
    alone = execute(resolve(CHANNELS), tmp_path / "alone")
    trained = []
    monkeypatch.setattr("microglia.methods.procedure.fit", spy(trained))
    shared = execute(resolve(CHANNELS), tmp_path / "shared", starts=tmp_path / "starts")
    assert trained == ["train"]
    assert shared["pruned"] == alone["pruned"]
    assert weights(tmp_path / "shared") == weights(tmp_path / "alone")
    mine, theirs = rows(tmp_path / "shared", "dense"), rows(tmp_path / "masks", "dense")
    assert len(mine) == 1
    assert mine == theirs


def test_tickets_have_a_dense_network_of_their_own(tmp_path):
    """It is trained as every level is, so that what was observed of another run's dense network is not about it."""
    own = {**BASE, "model": "lenet-300-100", "train": {"epochs": 1, "lr": 0.5}, "prune": {"density": 0.5}}
    execute(resolve({**own, "method": "magnitude"}), tmp_path / "masks", starts=tmp_path / "starts")
    tickets = resolve({**own, "method": "tickets-oneshot"})
    alone = execute(tickets, tmp_path / "alone")
    assert execute(tickets, tmp_path / "shared", starts=tmp_path / "starts")["dense"] == alone["dense"]


def spy(trained):
    from microglia.train.fit import fit

    def watched(*arguments, title, **settings):
        trained.append(title)
        return fit(*arguments, title=title, **settings)

    return watched


@pytest.mark.parametrize("change", [{"seed": 1}, {"dense": {"epochs": 2, "batch_size": 256}}, {"model": "lenet-300-100"}])
def test_another_start_is_another_dense_network(change):
    assert start_of(as_dict(resolve({**MASKS, **change}))) != start_of(as_dict(resolve(MASKS)))


def test_what_follows_the_dense_network_does_not_count():
    other = {**MASKS, "method": "smart", "train": {"epochs": 3}, "measure": {"latency": True}}
    assert start_of(as_dict(resolve(other))) == start_of(as_dict(resolve(CHANNELS))) == start_of(as_dict(resolve(MASKS)))


def run_of(directory, shared):
    run = Run(directory)
    run.shared = shared
    return run


def test_other_stages_are_never_shared(tmp_path):
    for name in ("a", "b"):
        run_of(tmp_path / name, tmp_path / "shared").stage("train", lambda progress, name=name: {"made by": name})
    assert read_state(tmp_path / "b" / "stages" / "train.safetensors") == {"made by": "b"}


def test_a_stage_that_another_run_works_on_is_waited_for(tmp_path):
    (tmp_path / "shared").mkdir()
    run, got = run_of(tmp_path / "b", tmp_path / "shared"), []
    with (tmp_path / "shared" / ".dense.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=lambda: got.append(run.stage("dense", lambda progress: {"made by": "b"})))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert got == []
        run_of(tmp_path / "a", None).stage("dense", lambda progress: {"made by": "a"})
        (tmp_path / "a" / "stages" / "dense.safetensors").rename(tmp_path / "shared" / "dense.safetensors")
    waiting.join(10)
    assert got == [{"made by": "a"}]


def test_a_damaged_start_is_made_again(tmp_path):
    run_of(tmp_path / "a", tmp_path / "shared").stage("dense", lambda progress: {"w": torch.ones(3)})
    (tmp_path / "shared" / "dense.safetensors").write_bytes(b"\x00" * 40)
    with pytest.warns(UserWarning, match="computed again"):
        state = run_of(tmp_path / "b", tmp_path / "shared").stage("dense", lambda progress: {"w": torch.zeros(3)})
    assert torch.equal(state["w"], torch.zeros(3))
    assert torch.equal(read_state(tmp_path / "shared" / "dense.safetensors")["w"], torch.zeros(3))
