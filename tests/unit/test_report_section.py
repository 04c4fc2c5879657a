"""A section from outside the package: its observation, labels, table and figure are in results.md and on the page."""

import json
from dataclasses import dataclass

import pytest
from test_report import Page, data, plots, result, save, table_of
from typer.testing import CliRunner

import microglia.cli  # noqa: F401  (registers the commands)
from microglia.cli.app import app
from microglia.lab.result import Result
from microglia.report import families
from microglia.report.cells import Entry, of_words
from microglia.report.chart import Axis, Chart, Line, Panel, look
from microglia.report.families import Family
from microglia.report.section import Picture, Section, Table, register, sections
from microglia.report.write import collect, export, report
from microglia.storage.observations import observations


@dataclass(frozen=True)
class Codes:
    """What a toy method that shares weights tells of a run."""

    bits: int
    entropy: float


def codes(row):
    return [record.observed(Codes) for record in row.records if record.observed(Codes) is not None]


def tables(group):
    rows = [
        (row, [of_words(row.method), Entry(f"{codes(row)[0].bits}", codes(row)[0].bits)]) for row in group.rows if codes(row)
    ]
    return [Table(("method", "bits a weight"), rows, ("method",), "Weights share values.")]


def pictures(group):
    rows = [row for row in group.rows if codes(row)]
    lines = [Line(row.line, [codes(row)[0].bits], [codes(row)[0].entropy], look=look(0), method=row.method) for row in rows]
    yield Picture("entropy", "entropy of the codes", Chart(group.title, [Panel(Axis("bits"), Axis("entropy"), lines)]))


TOY = Section(
    "toy",
    applies=lambda group: any(codes(row) for row in group.rows),
    tables=tables,
    pictures=pictures,
    family=Family(
        lambda record: record.observed(Codes) is not None,
        method=lambda record: f"shared at {record.observed(Codes).bits} bits",
        asked=lambda record: f"{2 ** record.observed(Codes).bits} values",
        strength=lambda record: -record.observed(Codes).bits,
        left=lambda record: 0.25,
    ),
)


@pytest.fixture
def toy(monkeypatch):
    """Registers the toy for one test."""
    monkeypatch.setattr(observations, "_items", dict(observations.items()))
    monkeypatch.setattr(sections, "_items", dict(sections.items()))
    before = list(families.families)
    observations.add("codes")(Codes)
    register(TOY)
    yield
    families.families[:] = before


def shared(bits, seed=0):
    return result(seed=seed, params=1 / bits) | {"codes": {"bits": bits, "entropy": bits - 0.5}}


@pytest.fixture
def runs(tmp_path):
    for bits in (4, 8):
        save(tmp_path / "runs" / f"shared-{bits}", shared(bits))
    save(tmp_path / "runs" / "plain", result(params=0.5))
    return tmp_path / "runs"


def test_its_table_labels_and_figure_are_in_every_form(toy, runs, tmp_path):
    written = report([runs], tmp_path / "out")
    text = written.tables.read_text()
    rows = {row["method"]: row for row in table_of(text.partition("Weights share")[0])}
    assert set(rows) == {"dense", "global-magnitude", "shared at 4 bits", "shared at 8 bits"}
    assert rows["shared at 4 bits"]["kept (asked)"] == "16 values"
    assert rows["shared at 4 bits"]["theoretical speed-up"] == "4.00x"
    assert "Weights share values.\n\n| method | bits a weight |\n" in text
    assert "| shared at 8 bits | 8 |" in text
    assert "![entropy of the codes](figures/resnet20-on-cifar10-entropy.png)" in text
    assert {"resnet20-on-cifar10-entropy.png", "resnet20-on-cifar10-entropy.svg"} <= {path.name for path in written.figures}
    page = Page(written.page.read_text())
    assert "Weights share values." in page.texts
    drawn = [trace for trace in map(data, plots(page)) if "entropy" in json.dumps(trace) or trace[0]["y"] == [3.5]]
    assert [[trace["y"] for trace in traces] for traces in drawn] == [[[3.5], [7.5]]]


def test_the_command_shows_it(toy, runs, tmp_path):
    outcome = CliRunner().invoke(app, ["report", str(runs), "--out", str(tmp_path / "out")])
    assert outcome.exit_code == 0, outcome.output
    assert "| shared at 4 bits | 4 |" in (tmp_path / "out" / "results.md").read_text()


def test_an_exported_file_keeps_its_observation(toy, runs, tmp_path):
    kept = collect([export(collect([runs]), tmp_path / "all.json")])
    assert {record.observed(Codes) for record in kept} == {None, Codes(4, 3.5), Codes(8, 7.5)}
    assert Result.of(shared(4)).observed(Codes) == Codes(4, 3.5)


def test_a_damaged_observation_is_named_with_its_place(toy):
    with pytest.raises(ValueError, match=r"^codes\.bits is missing$"):
        Result.of(result() | {"codes": {"entropy": 1.0}})


def test_without_it_the_same_runs_are_told_by_the_usual_labels(runs, tmp_path):
    text = report([runs], tmp_path / "out").tables.read_text()
    assert "Weights share" not in text
    assert "params 0.125" in text


def test_a_name_is_taken_once(toy):
    with pytest.raises(ValueError, match="'toy' is registered twice"):
        register(TOY)


def test_a_family_that_needs_more_says_why_a_run_is_left_out(toy, runs, tmp_path):
    def check(record):
        raise ValueError("the codes have no table")

    families.families[:] = [Family(lambda record: "8" in record.source, str, str, len, len, check=check)]
    written = report([runs], tmp_path / "out")
    assert written.left_out == ("runs/shared-8/result.json: damaged (the codes have no table)",)
