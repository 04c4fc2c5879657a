"""Results of studies: typed, and the same JSON as ever, in files of earlier versions too."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from microglia.studies import Study, Work, conduct, every_study
from microglia.studies.connect.result import Connection
from microglia.studies.instability.result import Instability
from microglia.studies.listed import LISTED
from microglia.studies.result import Number, Result, ResultError, Row, Told, decode, encode
from microglia.studies.shifts.result import Condition
from microglia.studies.tickets.result import LevelRow, TicketSearch

BASINS = Path(__file__).parents[2] / "docs" / "basins"
STORED: list[tuple[str, type[Any]]] = [
    ("mnist/tickets-levels.json", TicketSearch),
    ("digits/instability-lines.json", Instability),
]


@pytest.mark.parametrize(("file", "kind"), STORED)
def test_a_stored_result_is_read_and_written_as_it_was(file: str, kind: type[Any]) -> None:
    content = json.loads((BASINS / file).read_text())
    result = decode(kind, {**content, "pictures": ["a.png"]})
    assert isinstance(result, kind)
    assert json.dumps(encode(result), sort_keys=True) == json.dumps(content, sort_keys=True)
    assert result.rows[0].density == content["rows"][0]["density"]


@pytest.mark.parametrize("name", LISTED)
def test_every_study_of_the_package_has_a_typed_result(name: str) -> None:
    kind = every_study()[name].result
    assert kind is not None
    assert issubclass(kind, Result)
    assert is_dataclass(kind)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


PATH = {
    "ts": [0.0, 1.0],
    "lengths": [0.0, 2.0],
    "values": {"test_loss": [0.5, None]},
    "summary": {"test_loss": {"min": 0.5, "max": None, "mean": None, "integral": None, "barrier": None}},
}
CONNECTION: dict[str, Any] = {
    "task": "a on b",
    "ends": [{"target": "runs/a", "test_loss": 0.5}, {"target": "runs/b", "test_loss": None}],
    "distance": 2.0,
    "notes": ["A note."],
    "line": PATH,
    "curve": {"kind": "bezier", "bends": 1, "training": [{"epoch": 1, "loss": 0.25}], **PATH},
    "below": {"test_loss": False},
    "ensemble": None,
    "plane": None,
}


def test_metrics_stand_beside_the_keys_of_their_row_and_nan_is_null() -> None:
    result = decode(Connection, CONNECTION)
    assert [(end.target, end.metrics) for end in result.ends] == [
        ("runs/a", {"test_loss": 0.5}),
        ("runs/b", {"test_loss": None}),
    ]
    assert math.isnan(result.line.values["test_loss"][1])
    assert list(result.paths) == ["line", "curve"]
    assert encode(result) == CONNECTION


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"distance": "far"}, "distance"),
        ({"notes": None}, "notes"),
        ({"more": 1}, "more: there is no such field"),
        ({"ends": [{"test_loss": 1.0}]}, "ends.0"),
    ],
)
def test_a_result_of_another_form_is_refused_by_its_field(change: Mapping[str, Any], text: str) -> None:
    with pytest.raises(ResultError, match="The content is no Connection") as error:
        decode(Connection, {**CONNECTION, **change})
    assert text in str(error.value)


def test_a_key_that_only_some_results_have() -> None:
    plain = {"shift": "clean", "severity": 0, "accuracy": 0.5, "macs": {"mean": 1.0, "std": 0.0}}
    for content in (plain, {**plain, "agreement": {"accuracy": 1.0}}):
        assert encode(decode(Condition, content)) == content
    assert "end" in {one.name for one in fields(LevelRow)}


# ------------------------------------------------------------------------------------------- a study of another package
@dataclass(frozen=True)
class Asked:
    """What to make."""

    count: int = 2


@dataclass(frozen=True)
class Step(Row):
    """A step, with metrics."""

    number: int


@dataclass(frozen=True)
class Steps(Result):
    """Some steps."""

    steps: tuple[Step, ...]
    last: Number


def study(measured: Any) -> Study[Any, Any]:
    return Study("steps", "Make steps.", Asked, lambda asked: Work(lambda run: measured), tables=lambda found: [], result=Steps)


def test_a_study_returns_its_json_form_or_its_result() -> None:
    content = {"steps": [{"number": 1, "loss": 0.5}], "last": math.inf}
    typed = Steps((Step(1, metrics={"loss": 0.5}),), math.inf)
    for measured in (content, typed):
        told = conduct(study(measured), Asked())
        assert isinstance(told, Told)
        assert told == {"steps": [{"number": 1, "loss": 0.5}], "last": None, "pictures": []}
        assert told.result == typed
        assert math.isnan(decode(Steps, told).last)


def test_a_study_that_measures_another_thing_is_refused() -> None:
    with pytest.raises(ResultError, match=r"The content is no Steps: steps\.0\.number"):
        conduct(study({"steps": [{"number": "x"}], "last": 1}), Asked())


def test_a_study_without_a_class_tells_its_mapping() -> None:
    plain: Study[Any, Any] = Study("plain", "Say.", Asked, lambda asked: Work(lambda run: {"a": 1}), tables=lambda found: [])
    told = conduct(plain, Asked())
    assert (told, told.result) == ({"a": 1, "pictures": []}, {"a": 1})
