"""Files from elsewhere: whatever they name, nothing of it is imported or run unless the caller says so."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import microglia
from microglia.cli.app import app
from microglia.core.errors import CheckpointError, FileError
from microglia.storage import archive
from microglia.storage.changes import decode, replay
from microglia.zoo import load_checkpoint
from microglia.zoo.trust import require_known, trusting

LYING = """
from pathlib import Path
Path("imported").write_text("")
from torch import nn
def make(classes=10, shape=(1, 8, 8)):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
"""
REMOTE = "from pathlib import Path\nPath('imported').write_text('')\nfrom transformers import PretrainedConfig as Remote\n"
ATTEMPTS = {
    "os:system": ("os:system", {"command": "touch imported"}),
    "shutil:rmtree": ("shutil:rmtree", {"path": "precious"}),
    "a module of the working directory": ("lying:make", {}),
    "builtins": ("builtins:exec", {}),
    "a folder of transformers": ("hf:folder", {"trust_remote_code": True}),
    "a folder of transformers by a path": ("hf:./folder", {}),
    "remote code of the hub": ("hf:someone/model", {"trust_remote_code": True}),
    "a folder of timm": ("timm:local-dir:folder", {}),
    "the hub through timm": ("timm:hf-hub:someone/model", {}),
    "a file through timm": ("timm:resnet18", {"checkpoint_path": "folder/model.pth"}),
    "a file through torchvision": ("torchvision:resnet18", {"weights": "folder/model.pth"}),
    "an option of the wrong kind": ("timm:resnet18", {"pretrained": "folder/model.pth"}),
    "a name with a line break": ("hf:someone/model\n", {}),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("lying", None)
    (tmp_path / "lying.py").write_text(LYING)
    (tmp_path / "precious").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "remote.py").write_text(REMOTE)
    config = {"auto_map": {"AutoConfig": "remote.Remote"}, "model_type": "foreign"}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    return tmp_path


def saved(place: Path, name: str, options: dict[str, object]) -> Path:
    directory = microglia.save(microglia.tasks.build("conv-2", classes=10, shape=(1, 8, 8)), place / "saved")
    plan = json.loads((directory / "plan.json").read_text())
    plan["source"] = {"name": name, "classes": 10, "shape": [1, 8, 8], "options": options}
    (directory / "plan.json").write_text(json.dumps(plan))
    return directory


def ran(place: Path, name: str) -> Path:
    microglia.save(microglia.tasks.build("conv-2", classes=10, shape=(1, 8, 8)), place / "run" / "model")
    (place / "run" / "recipe.yaml").write_text(yaml.safe_dump({"model": name, "data": "digits"}))
    return place / "run"


def untouched(place: Path) -> bool:
    return not (place / "imported").exists() and (place / "precious").is_dir() and "lying" not in sys.modules


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_load_runs_nothing_that_a_saved_folder_names(place: Path, attempt: str) -> None:
    name, options = ATTEMPTS[attempt]
    with pytest.raises(FileError, match="trust") as refused:
        microglia.load(saved(place, name, options))
    assert repr(name) in str(refused.value)
    assert untouched(place)


@pytest.mark.parametrize("command", ["eval", "measure", "report", "surface", "shifts", "shrink", "routes"])
@pytest.mark.parametrize("name", ["os:system", "lying:make", "hf:folder", "timm:local-dir:folder"])
def test_no_command_runs_what_a_directory_names(place: Path, command: str, name: str) -> None:
    for target in (ran(place, name), saved(place, name, {})):
        shown = CliRunner().invoke(app, [command, str(target)])
        assert shown.exit_code == 1
        assert shown.output.startswith("error:")
        assert untouched(place)


def test_no_command_of_two_or_of_recipes_runs_what_a_file_names(place: Path) -> None:
    run = ran(place, "lying:make")
    other = shutil.copytree(run, place / "other")
    (place / "sweep.yaml").write_text(yaml.safe_dump({"base": {"model": "lying:make"}, "grid": {"seed": [0]}}))
    recipe = str(run / "recipe.yaml")
    for words in (
        ["connect", str(run), str(other)],
        ["prune", "--recipe", recipe],
        ["tickets", "--recipe", recipe, "--density", "0.5"],
        ["instability", "--recipe", recipe],
        ["instability", "--masks", str(run)],
        ["sweep", "sweep.yaml"],
    ):
        shown = CliRunner().invoke(app, words)
        assert shown.exit_code == 1, shown.output
        assert "'lying:make'" in shown.output
        assert "--trust" in shown.output
        assert untouched(place)


def test_data_of_a_foreign_recipe_is_no_local_folder_of_the_hub_library(place: Path) -> None:
    run = ran(place, "conv-2")
    (run / "recipe.yaml").write_text(yaml.safe_dump({"model": "conv-2", "data": "hf:folder"}))
    shown = CliRunner().invoke(app, ["eval", str(run)])
    assert shown.exit_code == 1
    assert "--trust" in shown.output


def test_a_checkpoint_that_a_foreign_recipe_names_is_read_without_running_it(place: Path) -> None:
    class Touch:
        def __reduce__(self) -> object:
            return Path.touch, (Path("imported"),)

    torch.save({"state_dict": Touch()}, place / "bad.pth")
    run = ran(place, "conv-2")
    (run / "recipe.yaml").write_text(yaml.safe_dump({"model": "conv-2", "data": "digits", "checkpoint": "bad.pth"}))
    shown = CliRunner().invoke(app, ["eval", str(run)])
    assert shown.exit_code == 1
    assert untouched(place)


def test_a_model_of_the_users_own_works_when_it_is_typed_passed_or_trusted(place: Path) -> None:
    quick = ["train.epochs=1", "dense.epochs=1", "measure.latency=false", "--density", "0.5"]
    first = CliRunner().invoke(app, ["prune", "lying:make", *quick, "--out", "mine", "--json"])
    assert first.exit_code == 0, first.output
    assert CliRunner().invoke(app, ["prune", "lying:make", *quick, "--out", "mine", "--json"]).exit_code == 0
    refused = CliRunner().invoke(app, ["eval", "mine"])
    assert refused.exit_code == 1
    assert "'lying:make'" in refused.output
    assert CliRunner().invoke(app, ["eval", "mine", "--trust", "--json"]).exit_code == 0
    with pytest.raises(FileError, match="trust=True"):
        microglia.load("mine/model")
    import lying  # type: ignore[import-not-found]

    passed, trusted = microglia.load("mine/model", lying.make()), microglia.load("mine/model", trust=True)
    assert all(torch.equal(v, trusted.state_dict()[k]) for k, v in passed.state_dict().items())


def test_plain_names_with_plain_options_need_no_trust_and_trust_ends_with_its_block() -> None:
    for name, options in (
        ("conv-2", {}), ("wrn-16-1", {"dropout": 0.1}), ("timm:resnet18.a1_in1k", {"pretrained": True}),
        ("torchvision:resnet18", {}), ("hf:microsoft/resnet-18", {"pretrained": False}), ("timm:vit_tiny", {"drop_rate": 0}),
    ):  # fmt: skip
        require_known(name, options, "plan.json")
    with trusting():
        require_known("own:make", {}, "plan.json")
    with pytest.raises(FileError, match="'own:make'"):
        require_known("own:make", {}, "plan.json")


@pytest.mark.parametrize("field", ["classes", "shape", "name", "options"])
def test_sizes_are_held_against_the_weights_before_anything_is_built(
    place: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(place, "conv-2", {})
    huge = {"classes": 10**9, "shape": [1, 4000, 4000], "name": "wrn-1000006-1", "options": {"width": 10**9}}
    plan = json.loads((directory / "plan.json").read_text())
    plan["source"][field] = huge[field]
    (directory / "plan.json").write_text(json.dumps(plan))
    built: list[str] = []

    def build(*args: object, **options: object) -> torch.nn.Module:
        built.append(torch.get_default_device().type)
        return microglia.zoo.build(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(archive, "build", build)
    with pytest.raises(FileError):
        microglia.load(directory)
    assert "cpu" not in built  # without memory at most


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "[]", "null"])
def test_json_of_any_depth_and_length_ends_in_a_sentence(place: Path, text: str) -> None:
    directory = saved(place, "conv-2", {})
    (directory / "plan.json").write_text(text)
    with pytest.raises(FileError):
        microglia.load(directory)


@pytest.mark.parametrize("version", [True, 1.5, 0, -1, "1", None, 2])
def test_versions_are_whole_numbers_that_exist(place: Path, version: object) -> None:
    directory = saved(place, "conv-2", {})
    plan = {**json.loads((directory / "plan.json").read_text()), "version": version}
    (directory / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(FileError, match="version"):
        microglia.load(directory)


class Pair(torch.nn.Module):
    """A size written into the forward, and an input by name: it comes back as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 6), torch.nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu().unsqueeze(-1).expand(-1, 6, 2).reshape(-1, 12))


@pytest.mark.parametrize("name", ["x=open('imported', 'w')", "class", "other"])
def test_names_that_enter_generated_source_are_those_of_the_forward(place: Path, name: str) -> None:
    small = microglia.prune_channels(Pair(), {"x": torch.ones(2, 4)}, microglia.Budget(flops=0.7), round_to=1)
    plan = microglia.graph.plan_of(small).to_dict()
    assert plan["graphs"][""]["kwargs"]
    plan["graphs"][""]["kwargs"] = {name: plan["graphs"][""]["kwargs"]["x"]}
    with pytest.raises(FileError, match="does not take"):
        replay(Pair(), decode({"shrunk": plan}, {}))
    assert untouched(place)


@pytest.mark.parametrize(
    "changed", [{"training": 0}, {"__class__": 1}, {"groups": "2"}, {"groups": [1, 1]}, {"forward": 1}, {"padding": 1}]
)
def test_only_sizes_that_a_cut_notes_are_set(changed: dict[str, object]) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))
    with pytest.raises(FileError):
        replay(model, decode({"shrunk": {"kind": "module", "kept": {}, "attributes": {"0": changed}}}, {}))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_of_a_checkpoint_that_are_not_finite_are_named(place: Path, value: float) -> None:
    model = torch.nn.Linear(2, 2)
    torch.save({"weight": torch.full((2, 2), value), "bias": torch.zeros(2)}, place / "bad.pth")
    before = model.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"infinite or not a number: weight"):
        load_checkpoint(model, place / "bad.pth")
    assert torch.equal(before, model.weight)


@pytest.mark.parametrize("damage", ["plan.json", "model.safetensors", "both"])
def test_a_finished_run_whose_model_is_damaged_is_mended(place: Path, damage: str) -> None:
    training = {"epochs": 1, "batch_size": 512}
    recipe = microglia.lab.recipe.resolve(
        {"model": "conv-2", "prune": {"density": 0.5}, "dense": training, "train": training, "measure": {"latency": False}}
    )
    microglia.execute(recipe, place / "done")
    right = microglia.load(place / "done" / "model").state_dict()
    for name in ("plan.json", "model.safetensors") if damage == "both" else (damage,):
        (place / "done" / "model" / name).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="made again"):
        microglia.execute(recipe, place / "done")
    assert all(torch.equal(value, right[name]) for name, value in microglia.load(place / "done" / "model").state_dict().items())


def test_a_sweep_of_a_model_of_the_users_own_runs_when_it_is_trusted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")]))
    training = {"epochs": 1, "batch_size": 512}
    base = {
        "model": "lying:make",
        "dense": training,
        "train": training,
        "measure": {"latency": False},
        "prune": {"density": 0.5},
    }
    (place / "sweep.yaml").write_text(yaml.safe_dump({"base": {**base, "prune": {"density": 0.5}}, "grid": {"seed": [0]}}))
    shown = CliRunner().invoke(app, ["sweep", "sweep.yaml", "--out", "swept", "--trust"])
    assert shown.exit_code == 0, shown.output
    assert (place / "swept" / "seed-0" / "result.json").is_file(), (place / "swept" / "seed-0" / "log.txt").read_text()
