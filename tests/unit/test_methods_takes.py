"""What a method takes: declared once, everything else refused in one sentence, and never listed, written or lost."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from torch import nn

from microglia.core.errors import BudgetError, MicrogliaError, PatternError, ScoreError, SelectorError
from microglia.core.patterns import Block, Channel
from microglia.lab.recipe import RecipeError, as_dict, completed, read_yaml, resolve, schema
from microglia.methods import MethodConfig, PruneConfig, Smart, Takes, methods
from microglia.methods.what import COMMON, left_out, taken
from microglia.storage.run import Run, RunError
from microglia.storage.validation import adapter_of

STORED = sorted((Path(__file__).parent.parent / "fixtures" / "0.1.0" / "runs").iterdir())
OTHER = {
    "density": 0.5, "params": 0.5, "flops": 0.5, "ms": 3.0, "scope": "layer", "score": "random", "reduction": "max",
    "layers": ["a*"], "exclude": ["a*"], "protect": ["a*"], "allow_empty": True, "score_batches": 3, "score_batch_size": 7,
}  # fmt: skip
"""For each common field a value that is no default."""
ORIGINALS = [name for name, method in methods.items() if method.original == name]
REFUSED = [(name, field) for name in ORIGINALS for field in left_out(methods[name].config)]


def test_every_common_field_has_another_value_here() -> None:
    assert set(OTHER) == set(COMMON)


@pytest.mark.parametrize(("name", "field"), REFUSED)
def test_a_field_that_is_not_taken_ends_in_one_sentence(name: str, field: str) -> None:
    with pytest.raises(MicrogliaError) as error:
        resolve({"method": name, "prune": {field: OTHER[field]}})
    text = str(error.value)
    assert text.startswith(f"The method {name!r} ")
    assert f"not {field}" in text or f"does not take {field}" in text
    assert text.endswith(".")
    assert "\n" not in text


@pytest.mark.parametrize("name", ["smart", "pdp", "pas", "awg", "acdc", "ddnp", "ftwt", "slimming", "sfp", "eagleeye"])
@pytest.mark.parametrize("field", ["score", "reduction"])
def test_methods_with_values_of_their_own_take_no_score(name: str, field: str) -> None:
    with pytest.raises(ScoreError, match=f"The method '{name}' does not take {field}"):
        methods[name].config(**{field: OTHER[field]})
    with pytest.raises(ScoreError, match=f"does not take {field}"):
        adapter_of(methods[name].config).validate_python({field: OTHER[field]})


def test_a_pruner_refuses_the_same_keywords() -> None:
    with pytest.raises(ScoreError, match="The method 'smart' does not take score: it ranks units by values of its own"):
        Smart(nn.Linear(4, 4), density=0.5, total_steps=3, score="random")


@pytest.mark.parametrize("name", ORIGINALS)
def test_defaults_that_were_written_out_are_dropped_on_read(name: str) -> None:
    usual = left_out(methods[name].config)
    plain = {"flops": 0.5} if "density" in usual else {"density": 0.5}
    recipe = resolve({"method": name, "prune": {**usual, **plain}})
    assert recipe == resolve({"method": name, "prune": plain})
    assert not set(usual) & set(recipe.prune)
    as_lists = {key: list(value) if isinstance(value, tuple) else value for key, value in usual.items()}
    methods[name].config(**as_lists)  # as YAML spells tuples


@pytest.mark.parametrize("name", list(methods))
def test_only_what_is_taken_is_listed_and_written(name: str) -> None:
    config = methods[name].config
    expected = [f for f in taken(config) if f not in ("dense", "train")]
    assert list(schema(name)["properties"]["prune"]["properties"]) == expected
    assert set(resolve({"method": name, "prune": {}}).prune) == set(expected)
    assert set(taken(config)) | set(left_out(config)) == {f.name for f in fields(config)}


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x2", "nm:2:4", "channel"])
def test_a_pattern_that_is_not_admitted_is_refused(name: str, pattern: str) -> None:
    if methods[name].outcome(pattern) is not None:
        assert methods[name].config(pattern=pattern).pattern == pattern
        return
    with pytest.raises(PatternError, match=f"The method '{name}' does not take this pattern: its pattern is .*, not {pattern}"):
        methods[name].config(pattern=pattern)


# ------------------------------------------------------------------------------------------------ files of version 0.1
@pytest.mark.parametrize("run", STORED, ids=lambda path: path.name)
def test_a_stored_recipe_keeps_its_identity(run: Path) -> None:
    stored = read_yaml(run / "recipe.yaml")
    now = as_dict(resolve(stored))
    assert completed(now) == stored  # so that runs/ names the same directory
    assert set(now["prune"]) <= set(stored["prune"])


def test_a_directory_of_version_0_1_goes_on_and_one_of_another_recipe_does_not(tmp_path: Path) -> None:
    (searched,) = (run for run in STORED if run.name == "searched")
    stored = read_yaml(searched / "recipe.yaml")
    assert stored["prune"]["score"] == "magnitude"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(stored))
    recipe = resolve(stored)
    assert "score" not in recipe.prune
    Run(tmp_path, as_dict(recipe), identity=completed).close()
    other = resolve({**stored, "prune": {**stored["prune"], "init_temp": 3.0}})
    with pytest.raises(RunError, match=r"prune\.init_temp"):
        Run(tmp_path, as_dict(other), identity=completed)
    with pytest.raises(ScoreError, match="does not take score"):
        resolve({**stored, "prune": {**stored["prune"], "score": "random"}})


def test_recipes_that_are_no_recipes_are_completed_to_themselves() -> None:
    for recipe in ({}, {"method": "no such"}, {"method": "smart"}, {"method": ["smart"], "prune": {}}, {"command": "connect"}):
        assert completed(recipe) == recipe


# ------------------------------------------------------------------------------------------------------- a declaration
@dataclass(frozen=True)
class Part:
    """A part with a check of its own."""

    size: int = 1

    def check_values(self) -> None:
        if self.size < 1:
            raise BudgetError(f"size is at least 1; got {self.size}.")


@dataclass(frozen=True)
class Composed(Part, MethodConfig):
    """Two parts and a field of its own."""

    takes: ClassVar[Takes] = Takes(
        fields=("density", "exclude", "scope"), patterns={Channel: "shrunk", Block: "masked"},
        scopes=("global",), also=("mass",),
        why={"protect": "{density:g} of all is kept", "nm:N:M": "rows have no blocks"},
    )  # fmt: skip
    pattern: str = "channel"
    mass: float = 1.0

    def check_values(self) -> None:
        if not self.mass > 0:
            raise BudgetError(f"mass is above 0; got {self.mass}.")


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"size": 0}, BudgetError, "size is at least 1"),
        ({"mass": 0.0}, BudgetError, "mass is above 0"),
        ({"params": 0.5}, BudgetError, "Composed takes density or mass, and not params."),
        ({"layers": ("a",)}, SelectorError, "Composed takes exclude and scope, and not layers."),
        ({"density": 0.25, "protect": ("a",)}, SelectorError, "and not protect: 0.25 of all is kept."),
        ({"score": "random"}, ScoreError, "Composed does not take score."),
        ({"pattern": "nm:2:4"}, PatternError, "its pattern is block:OUTxIN or channel, not nm:2:4: rows have no blocks."),
        ({"pattern": "unstructured"}, PatternError, "its pattern is block:OUTxIN or channel, not unstructured."),
        ({"scope": "layer"}, MicrogliaError, "no scope of Composed named 'layer'"),
    ],
)
def test_parts_are_composed_and_each_checks_its_own(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    Composed(density=0.5, exclude=("a",), pattern="block:2x2", size=3, mass=2.0)
    with pytest.raises(error) as caught:
        Composed(**settings)
    assert text in str(caught.value)


def test_a_selection_alone_is_a_value_too() -> None:
    assert PruneConfig(density=0.5, protect=("a",)).protect == ("a",)
    with pytest.raises(BudgetError, match="PruneConfig takes density or params, and not ms: flops and ms are budgets"):
        PruneConfig(ms=1.0)


def test_an_unknown_field_is_still_told_by_its_name() -> None:
    with pytest.raises(RecipeError, match="densitty: there is no such field"):
        resolve({"method": "smart", "prune": {"densitty": 0.1}})
