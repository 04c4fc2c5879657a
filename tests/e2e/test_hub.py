"""A push to a hub and a load from it, through a stand-in of its API that is a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import microglia as mg
from microglia.cli.app import app
from microglia.core.errors import FileError
from microglia.lab.recipe import resolve

SERVER = Path(__file__).parent.parent / "hub_server.py"
TRAINING = {"epochs": 1, "max_batches": 2}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("hub")
    with subprocess.Popen([sys.executable, SERVER, folder], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip(), folder
        server.terminate()


@pytest.fixture
def hub(served: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-in's repositories; the hub's own cache is empty."""
    monkeypatch.setenv("HF_ENDPOINT", served[0])
    monkeypatch.setenv("HF_TOKEN", "good")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the stand-in has the older storage
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of the hub's client
    (served[1] / "asked.txt").write_text("")
    return served[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "a"
    recipe = {"model": "conv-2", "prune": {"density": 0.5}, "dense": TRAINING, "train": TRAINING}
    mg.execute(resolve({**recipe, "measure": {"latency": False}}), directory)
    return directory


def test_a_run_comes_back_bit_for_bit(hub: Path, run: Path) -> None:
    done = CliRunner().invoke(app, ["push", str(run), "me/conv-2-half", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["commit"].endswith(f"/me/conv-2-half/commit/{'a' * 40}")
    again, here = mg.load("hub:me/conv-2-half"), mg.load(run / "model")
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(again.state_dict().values(), here.state_dict().values(), strict=True)
    )
    assert {path.name for path in (hub / "me" / "conv-2-half").iterdir()} == {
        "README.md", "model.safetensors", "plan.json", "result.json"
    }  # fmt: skip
    (hub / "asked.txt").write_text("")
    mg.load("hub:me/conv-2-half@main")
    assert "GET model.safetensors" not in (hub / "asked.txt").read_text(), "the second load takes the weights from the cache"


def test_the_card_says_what_the_result_says(hub: Path, run: Path) -> None:
    mg.push(run, "me/card")
    card, result = (hub / "me" / "card" / "README.md").read_text(), json.loads((run / "result.json").read_text())
    assert card.startswith("---\nlibrary_name: microglia\n")
    assert 'mg.load("hub:me/card")' in card
    assert f"{100 * result['pruned']['metrics']['accuracy']:.2f} %" in card
    assert f"{result['saved']:,}" in card
    assert "density: 0.5" in card


def test_a_model_of_one_s_own_class_is_loaded_into_a_fresh_one(hub: Path) -> None:
    class Own(torch.nn.Sequential):
        def __init__(self) -> None:
            super().__init__(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    model = Own()
    mg.push(model, "me/own")
    assert 'mg.load("hub:me/own", fresh)' in (hub / "me" / "own" / "README.md").read_text()
    assert torch.equal(mg.load("hub:me/own", Own())[0].weight, model[0].weight)
    with pytest.raises(FileError, match="does not say how to build its Own"):
        mg.load("hub:me/own")


def test_code_and_pickles_are_not_fetched(hub: Path, run: Path) -> None:
    mg.push(run, "me/mixed")
    (hub / "me" / "mixed" / "modeling.py").write_text("raise SystemExit('this code ran')")
    (hub / "me" / "mixed" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.warns(UserWarning, match=r"me/mixed also holds code or pickles \(modeling.py\); they are neither"):
        mg.load("hub:me/mixed")
    assert "modeling.py" not in (hub / "asked.txt").read_text()
    assert "pytorch_model.bin" not in (hub / "asked.txt").read_text()
    foreign = hub / "me" / "foreign"
    foreign.mkdir()
    (foreign / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FileError, match=r"holds no model of this library: plan.json and model.safetensors missing; its code"):
        mg.load("hub:me/foreign")
    assert "pytorch_model.bin" not in (hub / "asked.txt").read_text()


def test_wrong_input_is_one_sentence(hub: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileError, match="named as hub:OWNER/NAME"):
        mg.load("hub:nobody")
    with pytest.raises(FileError, match="named as OWNER/NAME"):
        mg.push(run, "nobody")
    with pytest.raises(FileError, match="holds no saved model"):
        mg.push(tmp_path, "me/nothing")
    with pytest.raises(FileError, match="The hub has no repository me/nothing that you may see"):
        mg.load("hub:me/nothing")
    monkeypatch.setenv("HF_TOKEN", "bad")
    with pytest.raises(FileError, match="The hub refused me/secret"):
        mg.push(run, "me/secret")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FileError, match="The hub cannot be reached"):
        mg.push(run, "me/unreachable")
    with pytest.raises(FileError, match="The hub cannot be reached, and me/unreachable was not fetched before"):
        mg.load("hub:me/unreachable")


@pytest.mark.parametrize("name", ["me/a--b", "me/a..b", "-me/a", "../a"])
def test_a_name_that_the_hub_does_not_take_is_refused_in_a_sentence(hub: Path, run: Path, name: str) -> None:
    with pytest.raises(FileError, match="The hub takes no name such as"):
        mg.load(f"hub:{name}")
    with pytest.raises(FileError, match="The hub takes no name such as"):
        mg.push(run, name)


def test_a_revision_that_is_not_there_is_named(hub: Path, run: Path) -> None:
    mg.push(run, "me/revised")
    with pytest.raises(FileError, match="me/revised has no such branch, tag or commit: check what stands after @"):
        mg.load("hub:me/revised@v7")


def test_a_full_disk_is_not_taken_for_a_network_that_is_away(hub: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mg.push(run, "me/large")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(FileError, match=r"The files of me/large cannot be kept here: No space left on device\."):
        mg.load("hub:me/large")


def test_a_push_leaves_no_file_of_an_earlier_one(hub: Path, run: Path) -> None:
    mg.push(run, "me/twice")
    (hub / "me" / "twice" / "acceleration.json").write_text("{}")
    (hub / "me" / "twice" / "notes.txt").write_text("the owner's own file")
    mg.push(torch.nn.Linear(2, 2), "me/twice")
    assert {path.name for path in (hub / "me" / "twice").iterdir()} == {
        "README.md", "model.safetensors", "plan.json", "notes.txt"
    }  # fmt: skip


def test_a_card_refuses_a_result_of_another_kind(hub: Path) -> None:
    with pytest.raises(FileError, match=r"The result of a card is that of microglia.execute.*'pruned'"):
        mg.push(torch.nn.Linear(2, 2), "me/other", result={"accuracy": 0.9})
    assert not (hub / "me" / "other").exists()


def test_without_a_network_the_cache_serves(hub: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mg.push(run, "me/cached")
    mg.load("hub:me/cached")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert isinstance(mg.load("hub:me/cached"), torch.nn.Module)
