"""Options of `prune` that a method or a task declares: listed, read, refused, and taken from a method of another package."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from typer.testing import CliRunner

from microglia.cli import commands
from microglia.cli.app import app
from microglia.cli.fields import asked_of
from microglia.core.patterns import Unstructured
from microglia.lab.recipe import is_setting
from microglia.methods import MethodConfig, Takes, method, methods
from microglia.methods.what import NAMES
from microglia.tasks.kinds import kind, kinds

MODULE = '''
"""A method of another package, in a module that the command line imports."""
from dataclasses import dataclass
from typing import ClassVar

import torch

import microglia as mg
from microglia.core.layers import prunable_layers
from microglia.core.patterns import Unstructured
from microglia.methods import MethodConfig, Takes, method
from microglia.methods.procedure import observe


@dataclass(frozen=True)
class FirstConfig(MethodConfig):
    """Keeps the first weights of every layer.

    Attributes:
        its_field: How many weights stay.
        drop: Whether nothing stays in a bias, which is no [pruned] weight.
    """

    takes: ClassVar[Takes] = Takes(fields=("density",), patterns={Unstructured: "masked"})
    its_field: int = 1
    drop: bool = False


@method("first-weights", FirstConfig)
def first_weights(task, run, config):
    """Keep the first weights."""
    model = task.build()
    observe(task, run, "dense", model)
    layers = prunable_layers(model)
    kept = {name: torch.arange(layer.raw.numel()).view(layer.shape) < config.its_field for name, layer in layers.items()}
    mg.mask(model, kept)
    return model
'''


def run(*words: object) -> Any:
    environment = {"COLUMNS": "200", "TERM": "dumb"}
    return CliRunner().invoke(app, list(map(str, words)), env=environment, prog_name="microglia")


def test_a_method_from_outside_adds_its_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_first.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MICROGLIA_IMPORT", "")
    words = ("--import", "toy_first", "prune", "lenet-300-100", "--method", "first-weights", "--density", "0.5")
    try:
        panel = run(*words, "--help").output.partition("Options of the method first-weights")[2]
        assert "How many weights stay. Default: 1." in panel
        assert "no [pruned] weight" in panel  # brackets are no markup
        outcome = run(
            *words, "--its-field", 7, "--drop", "measure.latency=false", "threads=1", "--out", tmp_path / "a", "--json"
        )
        assert outcome.exit_code == 0, outcome.output
        result = json.loads(outcome.stdout)
        assert result["recipe"]["prune"] == {"density": 0.5, "pattern": "unstructured", "its_field": 7, "drop": True}
        assert result["masks"]["kept"] == 3 * 7
        refused = run("prune", "lenet-300-100", "--its-field", 7)
        assert "--its-field is an option of the method first-weights, and the method here is magnitude" in refused.stderr
    finally:
        module = sys.modules.pop("toy_first")
        del methods._items["first-weights"], NAMES[module.FirstConfig]


# --------------------------------------------------------------------------------------------------- toys of every type
@dataclass(frozen=True)
class ToyConfig(MethodConfig):
    """One field of each type.

    Attributes:
        fractions: Two numbers.
        words: Names.
        widths: A number, or one by layer; None for none.
        form: ``round`` or ``square``.
        drop: Whether to drop. In the package it is a number.
        limit: A number; None for any.
        seed: A name that a shared option has.
        size: A name that the toy task has too.
    """

    takes: ClassVar[Takes] = Takes(fields=("score",), patterns={Unstructured: "masked"})
    fractions: tuple[float, float] = (0.1, 0.2)
    words: tuple[str, ...] = ()
    widths: int | dict[str, int] | None = None
    form: Literal["round", "square"] = "round"
    drop: bool = True
    limit: int | None = None
    seed: int = 3
    size: int = 1


@dataclass(frozen=True)
class ToyOptions:
    """Options of a toy task.

    Attributes:
        size: Side of something, or height and width.
        colour: A colour.
    """

    size: int | tuple[int, int] = 8
    colour: str = "red"


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Registers a method and a task, and collects the recipes that would be executed."""
    method("toy-types", ToyConfig)(lambda task, run, config: None)  # type: ignore[arg-type,return-value]
    kind("toy-task", ToyOptions)(lambda model, options, *, checkpoint, seed: None)  # type: ignore[arg-type,return-value]
    executed: list[Any] = []

    def execute(recipe: Any, directory: Path, starts: Path | None) -> None:
        executed.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "execute", execute)
    yield executed
    del methods._items["toy-types"], NAMES[ToyConfig], kinds._items["toy-task"]


SETTINGS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("--fractions", "0.5,1e-3"), {"fractions": [0.5, 1e-3]}),
    (("--fractions=[0.5, 0.25]",), {"fractions": [0.5, 0.25]}),
    (("--words", "fc*,type:Conv2d"), {"words": ["fc*", "type:Conv2d"]}),
    (("--widths", "4"), {"widths": 4}),
    (("--widths", "{fc1: 3}"), {"widths": {"fc1": 3}}),
    (("--form", "square", "--no-drop", "--limit", "5"), {"form": "square", "drop": False, "limit": 5}),
    (("--drop", "prune.seed=4", "--seed", "9"), {"drop": True, "seed": 4}),
    (("--size", "2"), {"size": 2}),
    (("--score", "random"), {"score": "random"}),
]


@pytest.mark.parametrize(("words", "settings"), SETTINGS)
def test_values_of_every_type(toys: list[Any], words: tuple[str, ...], settings: dict[str, Any]) -> None:
    outcome = run("prune", "lenet-300-100", *words, "--method", "toy-types", "--out", "unused")
    assert outcome.exit_code == 130, outcome.output
    (recipe,) = toys
    as_lists = {key: list(value) if isinstance(value, tuple) else value for key, value in recipe.prune.items()}
    assert {key: as_lists[key] for key in settings} == settings
    assert recipe.seed == (9 if "--seed" in words else 0)


@pytest.mark.parametrize("where", ["option", "setting", "file", "budget"])
def test_the_method_may_be_named_anywhere(toys: list[Any], tmp_path: Path, where: str) -> None:
    (tmp_path / "recipe.yaml").write_text("method: l1\nprune: {flops: 0.5, round_to: 2}\n")
    words = {
        "option": ("--flops", "0.5", "--method=l1"),
        "setting": ("method=l1", "prune.flops=0.5"),
        "file": ("--recipe", str(tmp_path / "recipe.yaml")),
        "budget": ("--flops", "0.5"),
    }[where]
    run("prune", "--round-to", "4", "lenet-300-100", *words, "--out", "unused")
    assert [(one.method, one.prune["round_to"]) for one in toys] == [("channels" if where == "budget" else "l1", 4)]


@pytest.mark.parametrize(
    ("words", "task"),
    [
        (("--task", "toy-task", "--size", "4,6"), {"kind": "toy-task", "size": (4, 6), "colour": "red"}),
        (("task.kind=toy-task", "--colour", "blue"), {"kind": "toy-task", "size": 8, "colour": "blue"}),
        (("--recipe", "toy.yaml", "--size", "5"), {"kind": "toy-task", "size": 5, "colour": "red"}),
    ],
)
def test_a_task_adds_its_options(
    toys: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any, task: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text("task: toy-task\n")
    outcome = run("prune", "lenet-300-100", "--density", "0.5", *words, "--out", "unused")
    assert outcome.exit_code == 130, outcome.output
    assert [{**one.task, "size": _plain(one.task["size"])} for one in toys] == [task]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def test_the_options_of_classification_are_fields_of_the_recipe(toys: list[Any]) -> None:
    run("prune", "lenet-300-100", "--density", "0.5", "--label-smoothing", "0.1", "--out", "unused")
    assert [(one.task, one.label_smoothing) for one in toys] == [(None, 0.1)]


REFUSED = {
    "one method": (
        ("--bytes", "5000"),
        "--bytes is an option of the method deep-compression, and the method here is magnitude: leave it out, or choose "
        "--method deep-compression.",
    ),
    "two methods": (("--mask-lr", "1"), "of the methods pas and smart, and the method here is magnitude: leave it out, or"),
    "many methods": (("--round-to", "8"), "16 more, and the method here is magnitude: leave it out, or choose one of them by"),
    "a task": (("--text", "a"), "of the tasks language and embedding, and the task here is classification"),
    "an own task": (("--text", "a", "task=mine:task"), "and the task here is mine:task"),
    "method and task": (
        ("--head-lr", "1"),
        "of the methods fbs and ftwt and the task segmentation, and the method here is magnitude",
    ),
    "both": (
        ("--size", "2", "--method", "toy-types", "--task", "toy-task"),
        "both the method toy-types and the task toy-task have the option --size: give prune.size=VALUE or task.size=VALUE",
    ),
    "a common field": (("--score", "random", "--method", "smart"), "The method 'smart' does not take score: it ranks units"),
    "an unknown method": (("--bytes", "5", "--method", "smrt"), "There is no method named 'smrt'. Did you mean 'smart'"),
    "an unknown task": (("--bytes", "5", "--task", "langage"), "There is no kind of task named 'langage'"),
    "no file": (("--bytes", "5", "--recipe", "nothing.yaml"), "Cannot read the recipe nothing.yaml: No such file"),
    "no YAML": (("--fractions", "{1", "--method", "toy-types"), "The value of --fractions is not valid YAML"),
    "a wrong value": (("--fractions", "1,x", "--method", "toy-types"), "fractions.1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_taken_ends_in_one_sentence(toys: list[Any], case: str) -> None:
    words, text = REFUSED[case]
    outcome = run("prune", "lenet-300-100", *words, "--json")
    assert outcome.exit_code == 1
    assert text in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert json.loads(outcome.stdout)["error"] == outcome.stderr.strip().removeprefix("error: ")
    assert not toys


def test_help_lists_the_options_of_method_and_task(toys: list[Any]) -> None:
    text = run("prune", "--method", "toy-types", "--task", "toy-task", "--help").output
    panels = ["What to keep", "Options of the method toy-types", "Options of the task toy-task", "Training"]
    places = [text.index(f"─ {panel} ") for panel in panels]
    assert places == sorted(places)
    own = text[places[1] : places[2]]
    for part in ("--score", "--fractions", "Two numbers. Default: 0.1,0.2.", "--no-drop", "Default: on.", "default: any."):
        assert part in own
    assert "--seed" not in own  # a shared option
    assert "--bytes" not in text
    assert "Options of the method magnitude" in run("prune", "--help").output
    assert "Options of the method smart" in run("prune", "method=smart", "--help").output


def test_a_wrong_line_still_has_its_help() -> None:
    assert "What to keep" in run("prune", "--method", "smrt", "--recipe", "nothing.yaml", "--help").output


def test_the_shell_completes_own_options() -> None:
    words = "microglia prune --method smart --init"
    environment = {"_MICROGLIA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "4"}
    done = CliRunner().invoke(app, [], env=environment, prog_name="microglia")
    assert set(done.output.split()) == {"--init", "--init-temp"}


def test_every_field_of_every_config_has_its_help() -> None:
    silent = [
        (name, asked.name)
        for name, one in methods.items()
        for asked in asked_of(one.config)
        if is_setting(one.config, asked.name) and not asked.help.endswith(".")
    ]
    silent += [(name, asked.name) for name, one in kinds.items() for asked in asked_of(one.options) if asked.help[-1:] != "."]
    assert silent == []
