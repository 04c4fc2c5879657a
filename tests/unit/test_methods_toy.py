"""A method from outside the package: registered, and known to recipes, runs, reports and the command line without an edit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import microglia as mg
from microglia.cli.app import app
from microglia.core.layers import prunable_layers
from microglia.core.patterns import Block, Unstructured
from microglia.lab.recipe import resolve, schema
from microglia.methods import MethodConfig, Takes, method, methods
from microglia.methods.procedure import change, dense_model, observe, train
from microglia.methods.what import NAMES
from microglia.report.write import report
from microglia.storage.run import Run
from microglia.tasks import build

WORDS = [
    "--method",
    "every-other",
    "--density",
    "0.5",
    "dense.epochs=1",
    "train.epochs=1",
    "measure.latency=false",
    "threads=1",
]


@dataclass(frozen=True)
class EveryOtherConfig(MethodConfig):
    """Keeps weights at regular distances.

    Attributes:
        first: Place of the first one that stays.
    """

    takes: ClassVar[Takes] = Takes(
        fields=("density", "exclude"),
        patterns={Unstructured: "masked", Block: "masked"},
        why={"score": "it looks at no weight"},
    )
    first: int = 0


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    @method("every-other", EveryOtherConfig)
    def every_other(task: mg.Task, run: Run, config: EveryOtherConfig) -> nn.Module:
        """Keep every so manieth weight, train."""
        model = dense_model(task, run, config.dense)

        def prune(progress: object) -> None:
            assert config.density is not None
            step = round(1 / config.density)
            kept = {n: torch.arange(layer.raw.numel()) % step == config.first for n, layer in prunable_layers(model).items()}
            mg.mask(model, {n: kept[n].view(layer.shape) for n, layer in prunable_layers(model).items()})

        change(run, "prune", model, prune)
        observe(task, run, "before", model)
        train(task, run, "train", model, config.train)
        return model

    yield
    del methods._items["every-other"], NAMES[EveryOtherConfig]


def test_it_runs_through_execute_and_report(tmp_path: Path) -> None:
    short = {"dense": {"epochs": 1}, "train": {"epochs": 1}, "measure": {"latency": False}, "threads": 1}
    recipe = resolve({"model": "lenet-300-100", "method": "every-other", "prune": {"density": 0.5, "first": 1}, **short})
    assert recipe.prune.keys() == {"density", "exclude", "pattern", "first"}
    result = mg.execute(recipe, tmp_path / "runs" / "toy")
    assert result["masks"]["kept"] * 2 == result["masks"]["total"]
    assert mg.execute(recipe, tmp_path / "runs" / "toy") == json.loads((tmp_path / "runs" / "toy" / "result.json").read_text())
    report([tmp_path / "runs"], tmp_path / "report")
    tables = (tmp_path / "report" / "results.md").read_text()
    assert "every-other" in tables
    assert f"{result['pruned']['metrics']['accuracy'] * 100:.2f}" in tables


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_the_command_line_prunes_with_it(tmp_path: Path) -> None:
    outcome = invoke("prune", "lenet-300-100", *WORDS, "--out", str(tmp_path / "run"))
    assert outcome.exit_code == 0, outcome.output
    assert "every-other, unstructured, global" in outcome.output
    assert mg.load(tmp_path / "run" / "model", build("lenet-300-100", classes=10, shape=(1, 8, 8))) is not None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("prune.score=random",), "The method 'every-other' does not take score: it looks at no weight."),
        (("--layers", "fc1"), "The method 'every-other' takes exclude, and not layers."),
        (("--pattern", "nm:2:4"), "its pattern is unstructured or block:OUTxIN, not nm:2:4."),
        (("prune.last=3",), "last: there is no such field"),
    ],
)
def test_the_command_line_refuses_what_it_does_not_take(words: tuple[str, ...], text: str, tmp_path: Path) -> None:
    outcome = invoke("prune", "lenet-300-100", *WORDS, *words, "--out", str(tmp_path / "run"))
    assert outcome.exit_code != 0
    assert text in " ".join(outcome.output.replace("│", " ").split())


def test_the_command_line_lists_what_it_takes() -> None:
    row = json.loads(invoke("methods", "--json").stdout)["methods"]["every-other"]
    assert row["description"] == "Keep every so manieth weight, train."
    assert row["defaults"] == {"density": None, "pattern": "unstructured", "exclude": [], "first": 0}
    assert row["patterns"] == "unstructured or block:OUTxIN"
    assert list(schema("every-other")["properties"]["prune"]["properties"]) == list(row["defaults"])
    printed = json.loads(invoke("recipe", "method=every-other", "--schema").stdout)
    assert list(printed["properties"]["prune"]["properties"]) == list(row["defaults"])
