"""Recipes and sweeps from elsewhere: whatever the YAML, one sentence, in bounded time and memory."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from microglia.cli.app import app
from microglia.core.errors import MicrogliaError, RunError
from microglia.lab.recipe import RecipeError, override, put, read_yaml, resolve
from microglia.lab.sweep_grid import read_sweep
from microglia.storage import plain_yaml
from microglia.storage.plain_yaml import LARGEST, parse_yaml
from microglia.storage.run import Run

LAUGHS = "a: &a [lol, lol, lol]\n" + "".join(f"{x}: &{x} [{', '.join([f'*{w}'] * 9)}]\n" for w, x in pairwise("abcdefghi"))
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{x}: &{x} {{'<<': [{', '.join([f'*{w}'] * 9)}]}}\n" for w, x in pairwise("abcdefghijk")
).replace("'<<'", "<<")
LONG = f"a: &a {'x' * 20_000}\nb: [{', '.join(['*a'] * 5_000)}]\n"
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000))
HOSTILE = {
    "a billion laughs": (LAUGHS, "with its aliases written out it has more than"),
    "a billion merges": (MERGES, "with its aliases written out it has more than"),
    "a long text many times": (LONG, "with its aliases written out it has more than"),
    "deep lists": ("a: " + "[" * 100_000, "deep within each other"),
    "deep lists that end": ("a: " + "[" * 5_000 + "]" * 5_000, "deep within each other"),
    "deep mappings": ("{a: " * 5_000, "deep within each other"),
    "deep by indentation": ("".join(" " * i + "a:\n" for i in range(500)), "deep within each other"),
    "deep by aliases": (CHAIN, "deep within each other"),
    "a list that holds itself": ("a: &a [1, *a]\n", "holds itself"),
    "a mapping that holds itself": ("a: &a\n  b: *a\n", "holds itself"),
    "a key twice": (
        "model: conv-2\nseed: 1\nmodel: conv-4\n",
        "the key 'model' is there twice in one mapping, again in line 3",
    ),
    "a key twice below": ("train:\n  lr: 1\n  epochs: 2\n  lr: 3\n", "the key 'lr' is there twice"),
    "a key twice, quoted": ("seed: 1\n'seed': 2\n", "the key 'seed' is there twice"),
    "a number twice": ("a: {1: a, 0x1: b}\n", "is there twice"),
    "far too long": ("# " + "x" * (LARGEST + 1), "more than 262,144 characters"),
    "a long number": (f"seed: {'9' * 5000}\n", "is not valid YAML"),
    "an object": ("a: !!python/object/apply:os.system [touch imported]\n", "could not determine a constructor"),
    "two documents": ("a: 1\n---\nb: 2\n", "is not valid YAML"),
    "no text": ("a: \x00\n", "is not valid YAML"),
    "a date that is none": ("a: 2001-13-99\n", "is not valid YAML"),
    "a list as a key": ("? [a, b]\n: 1\n", "is not valid YAML"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_one_line_says_what_is_wrong_with_a_file(tmp_path: Path, case: str) -> None:
    text, told = HOSTILE[case]
    (tmp_path / "recipe.yaml").write_text(text)
    for read in (read_yaml, read_sweep):
        with pytest.raises(RecipeError) as caught:
            read(tmp_path / "recipe.yaml")
        message = str(caught.value)
        assert told in message
        assert "\n" not in message
        assert len(message) < 500
    with pytest.raises(RunError, match="not readable YAML"):
        Run(tmp_path, {"model": "conv-2"})


@pytest.mark.parametrize("case", ["a billion laughs", "deep lists", "a key twice"])
@pytest.mark.parametrize("words", [("recipe",), ("sweep",), ("prune", "--recipe")])
def test_commands_say_it_too(tmp_path: Path, case: str, words: tuple[str, ...]) -> None:
    (tmp_path / "recipe.yaml").write_text(HOSTILE[case][0])
    outcome = CliRunner().invoke(app, [*words, str(tmp_path / "recipe.yaml")])
    assert outcome.exit_code == 1
    assert "Traceback" not in outcome.output
    assert "is not valid YAML" in " ".join(outcome.output.split())


def test_a_file_without_an_end_is_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/dev/zero"):
        pytest.skip("there is no endless file here")
    monkeypatch.setattr(plain_yaml, "LARGEST", 1000)
    with pytest.raises(RecipeError, match="more than 1,000 characters"):
        read_yaml(Path("/dev/zero"))


@pytest.mark.parametrize("value", ["[" * 5000, "&a [*a]", "{a: 1, a: 2}", "9" * 5000, "!!python/name:os.system"])
def test_values_of_the_command_line(value: str) -> None:
    with pytest.raises(RecipeError, match="is not valid YAML") as caught:
        override({}, [f"train.lr={value}"])
    assert len(str(caught.value)) < 500


def test_anchors_aliases_and_merges_of_an_ordinary_recipe_work() -> None:
    text = "x: &x {lr: 1, epochs: 2}\ndense: {<<: *x, lr: 3}\ntrain: *x\nlist: [&one 1, *one, *one]\n"
    expected = {"lr": 1, "epochs": 2}
    assert parse_yaml(text) == {"x": expected, "dense": {"epochs": 2, "lr": 3}, "train": expected, "list": [1, 1, 1]}
    assert parse_yaml("a: &a {<<: &b {x: 1}, x: 2}\nb: {<<: [*a, *b]}") == {"a": {"x": 2}, "b": {"x": 2}}
    assert parse_yaml("") is None
    assert parse_yaml("1: a\n'1': b\n") == {1: "a", "1": "b"}


def test_a_sweep_of_more_cells_than_any_machine_runs(tmp_path: Path) -> None:
    seeds = ", ".join(map(str, range(1000)))
    (tmp_path / "sweep.yaml").write_text(f"grid:\n  seed: [{seeds}]\n  dense.epochs: [{seeds}]\n  train.epochs: [{seeds}]\n")
    with pytest.raises(RecipeError, match="at most 10,000 cells; this grid has 1,000,000,000"):
        read_sweep(tmp_path / "sweep.yaml")


def test_a_key_with_thousands_of_dots() -> None:
    with pytest.raises(RecipeError, match="dots; a recipe has at most 64 levels"):
        put({}, ".".join(["a"] * 5000), 1)


def test_what_is_wrong_with_a_recipe_is_told_briefly() -> None:
    with pytest.raises(MicrogliaError, match="and 30 more") as caught:
        resolve({f"field{i}": "x" * 10_000 for i in range(50)})
    assert len(str(caught.value)) < 10_000
