"""The device is `auto` by default, and a run goes on where it began."""

import json
from dataclasses import replace

import pytest
import yaml

from microglia.cli.commands import _own_directory
from microglia.core.errors import MicrogliaError
from microglia.lab.execute import execute
from microglia.lab.recipe import as_dict, begun, resolve

TINY = {
    "model": "lenet-300-100",
    "data": "digits",
    "prune": {"density": 0.2},
    "dense": {"epochs": 1, "max_batches": 2},
    "train": {"epochs": 1, "max_batches": 2},
    "measure": {"latency": False},
    "threads": 1,
}


def test_the_default():
    assert resolve({}).device == "auto"
    assert resolve({"device": "cpu"}).device == "cpu"


def test_a_finished_run_of_the_time_before_auto_is_found_again(tmp_path):
    first = execute(resolve({**TINY, "device": "cpu"}), tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["device"] == "cpu"
    assert execute(resolve(TINY), tmp_path / "run") == json.loads(json.dumps(first))


def test_a_run_that_was_interrupted_goes_on_where_it_began(tmp_path):
    """The command of version 0.1, without --device, wrote ``device: cpu`` and has to fit its directory."""
    recipe = resolve(TINY)
    for stored, device in (("cpu", "cpu"), ("cuda", "cuda"), ("auto", "auto"), ("tpu", "auto")):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**as_dict(recipe), "device": stored}))
        assert begun(recipe, tmp_path).device == device
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"command": "tickets", "recipe": {"device": "cpu"}}))
    assert begun(recipe, tmp_path).device == "cpu"


@pytest.mark.parametrize("text", ["[1, 2]", "recipe: 3", "{", "device: [cpu]"])
def test_a_damaged_file_changes_nothing(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    assert begun(resolve(TINY), tmp_path) == resolve(TINY)
    assert begun(resolve(TINY), tmp_path / "nowhere") == resolve(TINY)


def test_another_device_that_was_named_is_still_another_recipe(tmp_path):
    execute(resolve(TINY), tmp_path / "run")
    with pytest.raises(MicrogliaError, match="device: 'auto' -> 'cpu'"):
        execute(resolve({**TINY, "device": "cpu"}), tmp_path / "run")


def test_the_directory_of_a_command_is_the_one_it_had_before_auto():
    recipe = resolve(TINY)
    assert _own_directory(recipe) == _own_directory(replace(recipe, device="cpu"))
    assert _own_directory(recipe) != _own_directory(replace(recipe, device="cuda"))
