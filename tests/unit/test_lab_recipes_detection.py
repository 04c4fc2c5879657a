"""The recipes of detection that are shipped, and the kind of task that follows from a model's name."""

from pathlib import Path

import pytest

from microglia.core.errors import MicrogliaError
from microglia.lab.recipe import as_dict, method_config, read_yaml, resolve
from microglia.methods import methods
from microglia.tasks.detection import DetectionOptions
from microglia.zoo.yolov5 import SCALES

ROOT = Path(__file__).parents[2] / "recipes"
ROWS = sorted((ROOT / "smart").glob("yolov5*.yaml"))
WARM = {"smart": 3, "pdp": 0, "pas": 3, "awg": 3, "acdc": 0}


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_rows_of_yolov5_say_what_the_paper_says(path):
    recipe = resolve(read_yaml(path))
    assert recipe.task["kind"] == "detection"
    assert (recipe.model, recipe.task["activation"], recipe.task["size"]) == ("yolov5m", "relu", 640)
    assert path.stem.removeprefix("yolov5m_coco").strip("_") == ("" if recipe.method == "smart" else recipe.method)
    assert recipe.train.warmup_epochs == WARM[recipe.method]
    assert recipe.train.momentum == (0.9 if recipe.method == "pas" else 0.937)
    assert (recipe.train.schedule, recipe.train.no_decay) == ("linear", ("norm", "bias"))
    config = method_config(recipe)
    assert tuple(config.exclude) == ("heads.*",)
    assert config.pattern == "block:16x8"
    if recipe.method in ("awg", "acdc"):
        assert config.max_sparsity == 0.98
    assert resolve(as_dict(recipe)) == recipe


def test_every_rival_has_a_row():
    assert len(ROWS) == len(WARM)


@pytest.mark.parametrize("path", sorted((ROOT / "detection").glob("*.yaml")), ids=lambda path: path.stem)
def test_scalings_to_two_cores_are_valid(path):
    recipe = resolve(read_yaml(path))
    assert recipe.data == recipe.task["data"] == "bccd"
    assert recipe.task["size"] == 320
    assert recipe.method in methods
    config = method_config(recipe)
    assert (config.flops is not None) == (config.pattern == "channel")  # channels are compared at equal operations


def test_the_model_says_the_kind():
    recipe = resolve({"model": "yolov5n", "data": "bccd"})
    assert recipe.task == {"kind": "detection", **_plain(DetectionOptions(data="bccd"))}
    assert resolve({"model": "resnet20"}).task is None
    assert resolve({"model": "mine.models:net", "task": "detection", "data": "cells"}).data == "cells"
    assert {f"yolov5{size}" for size in SCALES} == {f"yolov5{size}" for size in "nsmlx"}


def _plain(options):
    from dataclasses import asdict

    return asdict(options)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"model": "yolov5n", "task": {"kind": "detection", "sizes": 1}}, r"task\.sizes|sizes"),
        ({"model": "yolov5n", "task": {"kind": "detection", "augment": "all"}}, "augment"),
        ({"model": "yolov5n", "image_size": 320}, "image_size is a field of the task classification"),
        ({"model": "yolov5n", "data": "a", "task": {"kind": "detection", "data": "b"}}, "data"),
    ],
)
def test_wrong_tasks_are_refused_in_one_sentence(source, told):
    with pytest.raises(MicrogliaError, match=told):
        resolve(source)
