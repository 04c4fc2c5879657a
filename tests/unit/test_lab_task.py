"""The task of a recipe: the old fields, a kind by name, a kind from outside, a function of one's own; identity and trust."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.core.errors import FileError, MicrogliaError
from microglia.lab.execute import make_task
from microglia.lab.recipe import as_dict, resolve
from microglia.report.records import parse
from microglia.report.rows import groups
from microglia.tasks.kinds import kind, kinds
from microglia.zoo.trust import needs_trust, require_known_recipe, trusting

FAST = {"epochs": 1, "batch_size": 4}


def regression(inputs: int = 3, *, model: str = "small", seed: int = 0) -> mg.Task:
    """Returns the task of adding up numbers."""
    x = torch.randn(24, inputs, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))

    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            width = 16 if model == "small" else 64
            return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 1))

    metrics = {"error": mg.tasks.mean_metric(lambda o, t: (o - t).abs().flatten(), better="lower", unit="")}
    source = mg.tasks.loaders(train=data, validation=data, test=data)
    return mg.Task(
        f"sum of {inputs}", build, source, nn.functional.mse_loss, metrics, torch.zeros(1, inputs), kind="regression"
    )


def fixed() -> mg.Task:
    """A task that brings its model."""
    return regression()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ModuleType("owntasks")
    made.sums, made.nothing, made.fixed = regression, lambda: 3, fixed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "owntasks", made)


def test_the_options_of_classification_are_the_recipes_old_fields() -> None:
    old = resolve({"model": "lenet-300-100", "data": "digits", "label_smoothing": 0.1})
    for task in (
        {"kind": "classification", "data": "digits", "label_smoothing": 0.1},
        {"data": "digits", "label_smoothing": 0.1},
    ):
        assert resolve({"model": "lenet-300-100", "task": task}) == old
    assert resolve({"task": "classification"}) == resolve({})
    assert not {"task", "task_options"} & set(as_dict(old))  # so that run directories of version 0.1.0 go on
    assert make_task(old).training_loss is not None


def test_a_recipe_gives_its_model_options_which_its_saved_model_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"model": "resnet20", "model_options": {"width": 4}, "data": "digits", "measure": {"latency": False}}
    source |= {
        "dense": FAST | {"max_batches": 1},
        "train": FAST | {"max_batches": 1, "distill": 0.0},
        "prune": {"density": 0.5},
    }
    recipe = resolve(source)
    assert "model_options" not in as_dict(resolve({}))  # so that earlier run directories go on
    assert as_dict(recipe)["model_options"] == {"width": 4}
    assert resolve({"task": {"kind": "classification", "model_options": {"width": 4}}}).model_options == {"width": 4}
    mg.execute(recipe, tmp_path / "run")
    saved = mg.load(tmp_path / "run" / "model")
    assert saved.conv1.out_channels == 4
    with monkeypatch.context() as patch:  # initial weights are never a checkpoint's
        built: list[dict[str, Any]] = []
        patch.setattr(
            "microglia.tasks.classification.build_noted", lambda *_, **options: built.append(options) or nn.Identity()
        )
        task = mg.tasks.image_task("timm:resnet18", "digits", model_options={"pretrained": True, "drop_rate": 0.1})
        task.build()
        assert task.pretrained
        assert task.fresh is not None
        task.fresh(0)
    assert [options.get("pretrained") for options in built] == [True, None]
    assert all(options["drop_rate"] == 0.1 for options in built)
    with pytest.raises(MicrogliaError, match="widht"):
        make_task(resolve({**source, "model_options": {"widht": 4}})).build()


def test_a_task_of_ones_own_runs_and_its_run_goes_on(module: None, tmp_path: Path) -> None:
    source = {"task": "owntasks:sums", "task_options": {"inputs": 5}, "method": "magnitude", "prune": {"density": 0.5}}
    source |= {"dense": FAST, "train": {**FAST, "distill": 0.0}, "measure": {"latency": False}, "seed": 3}
    recipe = resolve(source)
    assert (recipe.model, recipe.data, recipe.task) == ("owntasks:sums",) * 3
    result = mg.execute(recipe, tmp_path / "run")
    assert (result["task"], result["headline"]) == ("sum of 5", "error")
    assert set(result["pruned"]["metrics"]) == {"error"}
    assert result["masks"]["kept"] == pytest.approx(0.5 * result["masks"]["total"], abs=1)
    again = resolve(as_dict(recipe))  # as a directory keeps it
    assert as_dict(again) == as_dict(recipe)
    assert mg.execute(again, tmp_path / "run") == result


def test_the_recipes_seed_and_model_reach_the_function(module: None) -> None:
    one, other = (make_task(resolve({"task": "owntasks:sums", "seed": s})).build() for s in (0, 1))
    assert not torch.equal(one[0].weight, other[0].weight)  # type: ignore[index]
    wide = make_task(resolve({"task": "owntasks:sums", "model": "wide"})).build()
    assert wide[0].weight.shape == (64, 3)  # type: ignore[index]


@dataclass(frozen=True)
class Sums:
    inputs: int = 4
    data: str = "numbers"


@pytest.fixture
def sums() -> Any:
    @kind("sums", Sums)
    def make(model: str, options: Sums, *, checkpoint: str | None, seed: int) -> mg.Task:
        return regression(options.inputs, model=model, seed=seed)

    yield make
    del kinds._items["sums"]


def test_a_kind_from_outside_has_its_options_checked_and_filled_in(sums: Any, tmp_path: Path) -> None:
    recipe = resolve({"model": "small", "task": {"kind": "sums", "inputs": 2}, "dense": FAST, "train": FAST | {"distill": 0}})
    assert recipe.task == {"kind": "sums", "inputs": 2, "data": "numbers"}
    assert recipe.data == "numbers"
    assert resolve(as_dict(recipe)) == recipe
    assert make_task(recipe).name == "sum of 2"
    with pytest.raises(MicrogliaError, match=r"task\.inputs: Input should be a valid integer"):
        resolve({"task": {"kind": "sums", "inputs": "many"}})


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"task": {"kind": "sum"}}, "no kind of task named 'sum'.*classification"),
        ({"task": "clasification"}, "Did you mean 'classification'"),
        ({"task": {"kind": "classification", "crop": 3}}, r"task\.crop: there is no such field"),
        ({"task": {"data": "mnist"}, "data": "digits"}, "data is given twice"),
        ({"task": ["classification"]}, "The task is a mapping"),
        ({"task_options": {"a": 1}}, "task_options are the keywords"),
        ({"task": {"kind": "classification"}, "task_options": {"a": 1}}, "task_options are the keywords"),
        ({"task": "owntasks:sums", "image_size": 32}, "image_size is a field of the task classification.*task_options"),
        ({"task": "owntasks:sums", "data": "cifar10"}, "data is a field of the task classification"),
    ],
)
def test_a_wrong_task_is_refused_in_a_sentence(source: dict[str, Any], said: str) -> None:
    with pytest.raises(MicrogliaError, match=said):
        resolve(source)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            {"task": "owntasks:sums", "task_options": {"inptus": 3}},
            r"owntasks:sums\(inputs: 'int' = 3.*unexpected keyword.*inptus",
        ),
        ({"task": "owntasks:nothing"}, "returned int; a function named as task returns a microglia.Task"),
        ({"task": "owntasks:smus"}, "no owntasks task named 'smus'. Did you mean 'sums'"),
        ({"task": "nowhere:task"}, "no module 'nowhere' for the task"),
        ({"task": "owntasks:fixed", "model": "resnet20"}, "brings its model; leave out the model 'resnet20'"),
    ],
)
def test_a_wrong_function_is_refused_in_a_sentence(module: None, source: dict[str, Any], said: str) -> None:
    with pytest.raises(MicrogliaError, match=said):
        make_task(resolve(source))


@pytest.mark.parametrize(
    "recipe",
    [
        {"task": "evil:make"},
        {"task": "evil:make", "model": "evil:make"},
        {"task": {"kind": "classification", "data": "hf:./folder/../other"}, "model": "conv-2"},
        {"task": "mine:make", "model": "evil:make"},
        {"model": "hf:someone/net", "model_options": {"trust_remote_code": True}},
    ],
)
def test_a_file_may_name_no_task_that_runs_code(recipe: dict[str, Any]) -> None:
    assert needs_trust(recipe)
    with pytest.raises(FileError, match="--trust"):
        require_known_recipe(recipe, "recipe.yaml")
    with trusting():
        require_known_recipe(recipe, "recipe.yaml")
    assert not needs_trust({"task": {"kind": "classification", "data": "digits"}, "model": "conv-2"})
    assert "evil" not in sys.modules


@pytest.mark.parametrize(("unit", "scale"), [("%", 100.0), ("", 1.0), (None, 100.0)])
def test_a_report_reads_the_unit_of_the_headline_and_guesses_it_in_old_results(unit: str | None, scale: float) -> None:
    path = Path(__file__).parent.parent / "fixtures" / "0.1.0" / "runs" / "masked" / "result.json"
    content = json.loads(path.read_text())
    record = parse({**content, **({} if unit is None else {"units": {content["headline"]: unit}})})
    assert record.units.get("accuracy") == unit
    (group,) = groups([record])
    assert group.scale == scale
