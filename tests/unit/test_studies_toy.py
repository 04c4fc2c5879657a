"""A study of another package: one value, registered from outside, with a command, a durable run, tables and figures."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from typer.testing import CliRunner

from microglia.cli.app import app
from microglia.core.errors import MicrogliaError, RunError
from microglia.report.chart import Axis, Chart, Line, Panel
from microglia.studies import Figure, Result, Study, Work, conduct, every_study, register
from microglia.studies.listed import LISTED
from microglia.studies.options import Option, described
from microglia.studies.study import check_choices, studies


@dataclass(frozen=True)
class Rule:
    """How a sequence goes on.

    Attributes:
        ratio: Factor from one number
            to the next.
        sign: ``plus`` or ``minus``.
    """

    ratio: float = 2.0
    sign: Literal["plus", "minus"] = "plus"

    def __post_init__(self):
        if self.ratio <= 0:
            raise ValueError(f"ratio must be above 0; got {self.ratio}")


@dataclass(frozen=True)
class Powers:
    """Which numbers to make.

    Attributes:
        start: First number.
        counts: How many numbers each row has.
        rule: How a row goes on.
        form: Form of a number: ``whole`` or ``exact``.
        limit: Largest number; None for any.
        names: Words for the rows.
        out: Directory; the same command goes on there.
        checked: Whether options were settled.
    """

    start: Annotated[str, Option(words=("start",))]
    counts: Annotated[Sequence[int], Option(name="count", least=1)] = (2, 3)
    rule: Annotated[Rule, Option(parts={"ratio": "ratio", "sign": "sign"})] = field(default_factory=Rule)
    form: Literal["whole", "exact"] = "exact"
    limit: Annotated[int | None, Option(least=1)] = None
    names: tuple[str, ...] = ("a", "b")
    out: Path | None = None
    checked: Annotated[bool, Option(hidden=True)] = False


@dataclass(frozen=True)
class Rows(Result):
    """The rows, and how they were asked for."""

    rows: tuple[tuple[float, ...], ...]
    checked: bool
    limit: int | None
    names: tuple[str, ...]


MADE = []
"""Rows that were computed, not read from a stage."""


def begin(config):
    if not config.start.isdigit():
        raise MicrogliaError(f"The start is a number; got {config.start!r}.")

    def row(count):
        MADE.append(count)
        factor = config.rule.ratio if config.rule.sign == "plus" else -config.rule.ratio
        return {"numbers": [int(config.start) * factor**place for place in range(count)]}

    def measure(run):
        rows = [run.stage(f"count-{count}", lambda _, count=count: row(count))["numbers"] for count in config.counts]
        return {"rows": rows, "checked": config.checked, "limit": config.limit, "names": list(config.names)}

    return Work(measure, {"command": "powers", "start": config.start, "ratio": config.rule.ratio})


def figures(told):
    lines = [Line(f"{len(row)} numbers", list(range(len(row))), row) for row in told.rows]
    points = [{"row": number, "value": value} for number, row in enumerate(told.rows) for value in row]
    chart = Chart("Powers", [Panel(Axis("place"), Axis("value"), lines)])
    return [Figure("rows", chart, points, told), Figure("paper", chart)]


POWERS = Study(
    "some-powers",
    "Make powers.",
    Powers,
    begin,
    tables=lambda told: [f"largest: {max(map(max, told.rows)):g}"],
    figures=figures,
    result=Rows,
    settle=lambda given: {**given, "checked": True},
    details="Every row is a stage.",
    example="microglia some-powers 3",
)


@pytest.fixture
def toy():
    MADE.clear()
    register(POWERS)
    yield POWERS
    studies._items.pop("some-powers")
    app.registered_commands[:] = [one for one in app.registered_commands if one.callback.__name__ != "some-powers"]


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200", "TERM": "dumb"}, prog_name="microglia")


def test_the_command_is_derived_and_durable(toy, tmp_path):
    words = ("some-powers", 3, "--count", "2,4", "--ratio", 10, "--out", tmp_path / "out")
    outcome = run(*words)
    assert outcome.exit_code == 0, outcome.output
    assert "largest: 3000" in outcome.output
    assert f"Picture: {tmp_path / 'out' / 'some-powers-rows.png'}" in outcome.output
    told = json.loads(run(*words, "--json").stdout)
    assert MADE == [2, 4]  # the second call read its stages
    assert told["rows"] == [[3, 30], [3, 30, 300, 3000]]
    assert told["checked"]
    assert (told["limit"], told["names"]) == (None, ["a", "b"])
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == told
    written = {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("some-powers")}
    forms = {f"some-powers-rows.{form}" for form in ("png", "svg", "html", "json", "csv")}
    assert written == forms | {"some-powers-paper.png", "some-powers-paper.svg"}
    assert (tmp_path / "out" / "some-powers-rows.csv").read_text().splitlines()[1] == "0,3.0"
    assert len(told["pictures"]) == 7
    other = run(*words, "--ratio", 5)
    assert other.exit_code == 1
    assert "ratio: 10.0 -> 5.0" in other.stderr


def test_the_help_comes_from_the_config(toy):
    text = run("--help").output
    assert "some-powers" in text
    assert "Make powers." in text
    text = " ".join(run("some-powers", "--help").output.split())
    for part in (
        "START <str> First number.",
        "--count <str> How many numbers each row has. [default: 2,3]",
        "--ratio <float> Factor from one number to the next. [default: 2.0]",
        "--sign <str> plus or minus. [default: plus]",
        "Largest number; default: any.",
        "Every row is a stage.",
        "Example: microglia some-powers 3",
    ):
        assert part in text, part
    assert "checked" not in text
    assert "--device" not in text  # it has no such field


WRONG = {
    "list": (("1", "--count", "2,x"), 1, "The counts are whole numbers of at least 1 such as 2,3; got '2,x'."),
    "least": (("1", "--count", "0"), 1, "at least 1"),
    "choice": (("1", "--form", "half"), 1, "The form is whole or exact; got 'half'."),
    "part": (("1", "--ratio", "-1"), 1, "ratio must be above 0; got -1"),
    "own check": (("x",), 1, "The start is a number; got 'x'."),
    "number": (("1", "--limit", "0"), 2, "limit"),
    "word": ((), 2, "START"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_end_in_one_sentence(toy, tmp_path, case):
    words, status, text = WRONG[case]
    outcome = run("some-powers", *words, *(("--out", tmp_path / "out") if words else ()))
    assert outcome.exit_code == status
    assert text in outcome.stderr
    assert not (tmp_path / "out").exists()
    if status == 1:
        assert outcome.stderr.count("\n") == 1


def test_in_python_it_needs_no_directory(tmp_path):
    MADE.clear()
    told = conduct(POWERS, Powers("3", counts=(2,)))
    assert told == {"rows": [[3, 6]], "checked": False, "limit": None, "names": ["a", "b"], "pictures": []}
    assert told.result == Rows(((3.0, 6.0),), False, None, ("a", "b"))
    conduct(POWERS, Powers("3", out=tmp_path / "out"))
    with pytest.raises(RunError, match="start: '3' -> '4'"):
        conduct(POWERS, Powers("4", out=tmp_path / "out"))


def test_a_name_is_taken_once(toy):
    with pytest.raises(ValueError, match="registered twice"):
        register(POWERS)


@pytest.mark.parametrize("name", LISTED)
def test_the_configs_of_this_package_say_what_every_field_is(name):
    study = every_study()[name]
    texts = described(study.config)
    assert set(texts) == set(study.config.__dataclass_fields__)
    assert all(text.endswith(".") for text in texts.values())
    assert study.example.startswith(f"microglia {name} ")


@pytest.mark.parametrize("name", LISTED)
def test_the_device_is_auto(name):
    fields = every_study()[name].config.__dataclass_fields__
    assert "device" not in fields or fields["device"].default == "auto"


def test_choices():
    check_choices(Rule(sign="minus"))
    with pytest.raises(MicrogliaError, match="The sign is plus or minus; got 'times'"):
        check_choices(Rule(sign="times"))


MODULE = '''
"""A study of another package, in a module that the command line imports."""
from dataclasses import dataclass

from microglia.studies import Study, Work, register


@dataclass(frozen=True)
class Echo:
    """What to say.

    Attributes:
        word: The word that comes back.
    """

    word: str = "hello"


def begin(config):
    return Work(lambda run: {"said": config.word}, {"command": "echo-word", "word": config.word})


register(Study("echo-word", "Say a word.", Echo, begin, tables=lambda told: [told["said"]], directory=lambda config: None))
'''


def test_a_study_of_an_imported_module_is_listed_and_runs(tmp_path, monkeypatch):
    (tmp_path / "toy_studies.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MICROGLIA_IMPORT", "")
    try:
        assert "Say a word." in run("--import", "toy_studies", "--help").output
        assert json.loads(run("--import", "toy_studies", "echo-word", "--word", "ciao", "--json").output)["said"] == "ciao"
    finally:
        sys.modules.pop("toy_studies", None)
        studies._items.pop("echo-word", None)
        app.registered_commands[:] = [one for one in app.registered_commands if one.callback.__name__ != "echo-word"]
