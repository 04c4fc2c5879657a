"""Which method for what: every answer names methods and commands that exist, and a page with the figures."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from microglia.cli.app import app
from microglia.cli.listed import COMMANDS
from microglia.methods import methods
from microglia.methods.advice import Advice, advice, advice_page, advice_table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("goal", list(advice))
def test_an_answer_is_of_what_exists(goal: str) -> None:
    one = advice[goal]
    assert one.take
    assert all(name in methods for name in one.take)
    assert f"--method {one.take[0]} " in f"{one.command} ", "one begins with the first"
    for command in (one.command, one.shown):
        first, name, *rest = shlex.split(command)
        assert name in COMMANDS if first == "microglia" else (ROOT / name).is_file(), command
        assert all((ROOT / word).is_file() for word in rest if re.search(r"\.(yaml|json)$", word))


@pytest.mark.parametrize("goal", list(advice))
def test_the_figures_are_those_of_the_page(goal: str) -> None:
    """Each decimal number of an answer is on its page, rounded."""
    page = (ROOT / "docs" / advice[goal].page).read_text()
    there = [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.\d+|\d{2,3},\d{3}", page)]
    for number in re.findall(r"\d+\.\d+", advice[goal].measured):
        digits = len(number.partition(".")[2])
        assert any(abs(float(number) - value) <= 0.51 * 10**-digits for value in there), number


def test_the_command_line_and_the_page_say_the_same() -> None:
    done = CliRunner().invoke(app, ["methods", "--for", "speed"], env={"COLUMNS": "400"})
    assert done.exit_code == 0
    assert advice["speed"].measured in done.stdout
    assert advice["file"].measured not in done.stdout
    assert json.loads(CliRunner().invoke(app, ["methods", "--for", "speed", "--json"]).stdout)["speed"]["take"] == ["channels"]
    wrong = CliRunner().invoke(app, ["methods", "--for", "sped"])
    assert wrong.exit_code == 1
    assert "There is no goal named 'sped'. Did you mean 'speed'?" in wrong.stderr
    assert advice_page() in (ROOT / "docs" / "choose.md").read_text()


def test_a_goal_from_outside_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "_items", dict(advice._items))
    toy = Advice("a toy", ("magnitude",), "microglia prune", "nothing", "results.md", "microglia methods")
    advice.add("toy")(toy)
    assert "toy" in advice_page()
    assert advice_table("toy").row_count == 1
