"""Each method names its paper and what it is good for, in its own registration; the list shows both."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from microglia.cli.app import app
from microglia.methods import MethodConfig, methods
from microglia.methods.config import method, preset

NO_SINGLE_PAPER = {"oneshot", "layerwise", "channels", "channels-global"}


@pytest.mark.parametrize("name", list(methods))
def test_a_method_says_what_it_is_for_and_where_it_is_from(name: str) -> None:
    one = methods[name]
    assert 0 < len(one.purpose) <= 60
    assert (one.paper == "") == (name in NO_SINGLE_PAPER)
    if one.paper:
        form = r"(de )?[A-Z][\w'-]+( et al\.|, [A-Z]\w+)? (19|20)\d\d(, arXiv \d{4}\.\d{5})?(, appendix [A-Z])?"
        assert re.fullmatch(form, one.paper), one.paper
        number = re.search(r"arXiv (\d\d)(\d\d)\.", one.paper)
        year = re.search(r"(?:19|20)\d\d", one.paper)
        assert year is not None
        assert number is None or 0 <= int(year[0]) - (2000 + int(number[1])) <= 2  # not before the preprint
        assert number is None or 1 <= int(number[2]) <= 12


def test_one_paper_has_one_number() -> None:
    numbers: dict[str, set[str]] = {}
    for one in (methods[name] for name in methods):
        if found := re.search(r"arXiv (\S+?)(?:,|$)", one.paper):
            numbers.setdefault(found[1], set()).add(one.paper.partition(",")[0] if "et al." in one.paper else one.paper[:20])
    assert [names for names in numbers.values() if len(names) > 1] == []


def test_the_list_shows_both() -> None:
    found = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)["methods"]
    assert found["wanda"]["paper"] == "Sun et al. 2023, arXiv 2306.11695"
    assert all(row["for"] for row in found.values())
    table = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "400"}).output
    assert "arXiv 2306.11695" in table
    assert "the smallest file" in table


def test_a_method_from_outside_has_them_too_and_a_preset_keeps_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_items", dict(methods._items))

    @method("toy-of-papers", MethodConfig, paper="Nobody 2031", purpose="a toy")
    def toy(task: object, run: object, config: object) -> None:
        """Does nothing."""

    preset("toy-of-papers-half", "toy-of-papers", "Half of it.", purpose="half a toy", density=0.5)
    assert (methods["toy-of-papers"].paper, methods["toy-of-papers"].purpose) == ("Nobody 2031", "a toy")
    half = methods["toy-of-papers-half"]
    assert (half.paper, half.purpose, half.defaults) == ("Nobody 2031", "half a toy", {"density": 0.5})
