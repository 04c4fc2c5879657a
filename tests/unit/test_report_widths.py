"""Reports of structured pruning: width vectors, searches, scales, sweeps, ranks by batch, variants; what is observed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import result, save

from microglia.methods import WidthSearch, WidthVectors
from microglia.methods.widths_observed import ranks_of, scales_of, spearman
from microglia.report.chart import Chart
from microglia.report.read import read_results
from microglia.report.rows import groups
from microglia.report.section import pictures_of, tables_of
from microglia.report.sections.widths import run_lengths
from microglia.report.write import collect, export, report

WIDTHS = {"widths": {"a": 16, "b": 16, "c": 32}, "counts": {"a": 8, "b": 8, "c": 10}, "density": 0.4}
SCALES = {"largest": 0.8, "counts": [5, 0, 0, 7], "cut": 0.1}
RANKS = {"agreement": {"a": 0.99, "b": 0.95}, "by_batch": {"a": [[3.0, 8.0], [3.1, 7.9], [2.9, 8.0]]}}
CANDIDATES = {
    "candidates": [{"widths": [8, 8, 10], "value": 0.6}, {"widths": [9, 7, 10], "value": 0.4}],
    "rounds": [{"best": 0.5, "median": 0.3, "candidates": 1}, {"best": 0.6, "median": 0.5, "candidates": 1}],
    "rejected": 7,
}


def structured(method: str, accuracy: float, prune: dict[str, Any], seed: int = 0, **observed: Any) -> dict[str, Any]:
    run = result(method, prune={"flops": 0.5, **prune}, seed=seed, accuracy=accuracy) | {"widths": WIDTHS, **observed}
    run["asked"] = {"flops": 0.5}
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("structured") / "runs"
    made = {"eagleeye": structured("eagleeye", 0.9, {}, candidates=CANDIDATES)}
    made["slimming"] = structured("slimming", 0.88, {}, widths=WIDTHS | {"scales": SCALES})
    for t in (1.0, 1.4):
        probes = [{"strength": 1e-4, "t": t, "flops": 0.7}]
        observed = WIDTHS | {"scales": SCALES, "probes": probes}
        made[f"polarization-{t}"] = structured("polarization", 0.8 + t / 20, {"t": t}, widths=observed)
    for place, variant in enumerate(("hrank", "edge", "random", "reverse")):
        for seed in (0, 1):
            accuracy = 0.91 - 0.02 * place + 0.01 * seed
            observed = WIDTHS | {"ranks": RANKS}
            made[f"{variant}-{seed}"] = structured("hrank", accuracy, {"variant": variant}, seed=seed, widths=observed)
    for name, content in made.items():
        save(root / name, content)
    return root


@pytest.fixture(scope="module")
def charts(runs: Path) -> dict[str, Chart]:
    group = groups(collect([runs]))[0]
    return {picture.name: picture.chart for picture in pictures_of(group)}


# ------------------------------------------------------------------------------------------------------------ the tables
def test_widths_before_and_after_by_method(runs: Path) -> None:
    group = groups(collect([runs]))[0]
    table = next(t for t in tables_of(group) if "before" in t.columns and "groups" in t.columns)
    at = list(table.columns).index("groups")
    assert {tuple(e.text for e in entries[at:]) for _, entries in table.rows} == {("3", "16x2, 32", "8x2, 10")}
    assert len(table.rows) == 8
    assert run_lengths([16, 16, 8, 16]) == "16x2, 8, 16"


def test_a_search_tells_what_it_evaluated_and_rejected(runs: Path) -> None:
    group = groups(collect([runs]))[0]
    table = next(t for t in tables_of(group) if "rejected" in t.columns)
    assert [[e.text for e in entries[2:]] for _, entries in table.rows] == [["2", "7", "2", "0.6", "0.5"]]


def test_the_agreement_of_ranks(runs: Path) -> None:
    group = groups(collect([runs]))[0]
    table = next(t for t in tables_of(group) if "least" in t.columns and "layers" in t.columns)
    assert {tuple(e.text for e in entries[-3:]) for _, entries in table.rows} == {("2", "0.950", "0.970")}


# ----------------------------------------------------------------------------------------------------------- the figures
def test_every_figure_is_there(charts: dict[str, Chart]) -> None:
    assert {"widths", "width-search", "scales", "sweep", "ranks", "variants"} <= charts.keys()
    lines = {line.name: list(line.y) for line in charts["widths"].panels[0].lines}
    assert lines["eagleeye channel"] == [50.0, 50.0, 31.25]
    progress = {line.name: list(line.y) for line in charts["width-search"].panels[0].lines}
    assert progress["best so far"] == [0.5, 0.6]
    assert progress["median of the round"] == [0.3, 0.5]


def test_the_histogram_shows_the_cut(charts: dict[str, Chart]) -> None:
    assert len(charts["scales"].panels) == 3
    panel = charts["scales"].panels[0]
    assert list(panel.bars[0].heights) == [5, 0, 0, 7]
    assert list(panel.bars[0].x) == pytest.approx([0.1, 0.3, 0.5, 0.7])
    assert [rule.at for rule in panel.rules] == [0.1]


def test_the_sweep_holds_runs_and_short_trainings(charts: dict[str, Chart]) -> None:
    operations, headline = charts["sweep"].panels
    assert {line.name for line in operations.lines} == {"lambda 5e-05", "lambda 0.0001, short trainings of the search"}
    assert [list(line.x) for line in operations.lines] == [[1.0, 1.4], [1.0, 1.4]]
    assert [list(line.y) for line in headline.lines] == [pytest.approx([85.0, 87.0])]


def test_the_variants_stand_side_by_side(charts: dict[str, Chart]) -> None:
    (panel,) = charts["variants"].panels
    assert panel.x.labels == ["hrank", "edge", "random", "reverse"]
    after = next(bars for bars in panel.bars if bars.name == "after")
    assert list(after.heights) == pytest.approx([91.5, 89.5, 87.5, 85.5])
    assert all(error > 0 for error in after.errors)


def test_frozen_filters_are_drawn_by_group_and_by_fraction(tmp_path: Path) -> None:
    for seed, frozen in ((0, 0.0), (0, 0.5), (1, 0.5), (0, 0.25)):
        parts = {} if frozen == 0 else {"frozen": {"a": 16 * frozen / 2, "b": 0, "c": 5}}
        run = structured(
            "hrank", 0.9 - frozen / 10 + seed / 50, {"variant": "hrank", "frozen": frozen}, seed, widths=WIDTHS | parts
        )
        save(tmp_path / f"{frozen}-{seed}", run)
    pictures = {picture.name: picture.chart for picture in pictures_of(groups(collect([tmp_path]))[0])}
    first = pictures["frozen"].panels[0]
    assert [(bars.name, list(bars.heights)) for bars in first.bars[:2]] == [("removed", [16, 16, 32]), ("trained", [8, 8, 10])]
    assert {tuple(panel.bars[2].heights) for panel in pictures["frozen"].panels} == {(4.0, 0, 5), (2.0, 0, 5)}
    (line,) = pictures["freezing"].panels[0].lines
    assert list(line.x) == [0.0, 25.0, 50.0]
    assert list(line.y) == pytest.approx([90.0, 87.5, 86.0])
    assert line.y_error[2] > 0


def test_ranks_by_batch(charts: dict[str, Chart]) -> None:
    (panel,) = charts["ranks"].panels
    assert panel.field is not None
    assert panel.field.values == [[3.0, 3.1, 2.9], [8.0, 7.9, 8.0]]


def test_the_report_is_written_and_read_again(runs: Path, tmp_path: Path) -> None:
    written = report([runs], tmp_path / "out")
    names = {path.name for path in written.figures}
    assert {f"resnet20-on-cifar10-{end}.png" for end in ("widths", "scales", "variants", "ranks", "sweep")} <= names
    kept = collect([export(collect([runs]), tmp_path / "all.json")])
    assert sum(record.observed(WidthSearch) is not None for record in kept) == 1
    assert all(record.observed(WidthVectors) is not None for record in kept)


def test_learned_fractions_are_shown_without_widths_before(tmp_path: Path) -> None:
    learned = {"widths": {"a": 0.4, "b": 0.6}, "counts": {"a": 6, "b": 19}, "history": []}
    save(tmp_path / "run", structured("ddnp", 0.9, {}, widths=learned))
    group = groups(collect([tmp_path]))[0]
    assert group.records[0].observed(WidthVectors).fractions == {"a": 0.4, "b": 0.6}
    table = next(t for t in tables_of(group) if "before" in t.columns and "groups" in t.columns)
    assert [e.text for e in table.rows[0][1][-2:]] == ["", "6, 19"]


def test_a_damaged_observation_is_left_out_with_its_place(tmp_path: Path) -> None:
    save(tmp_path / "run", json.dumps(structured("eagleeye", 0.9, {}, candidates={"candidates": [{"value": 1}]})))
    found = read_results([tmp_path])
    assert found.records == ()
    assert "candidates.candidates.0.widths" in found.left_out[0]


# ------------------------------------------------------------------------------------------------------ what is observed
def test_spearman_by_hand() -> None:
    assert spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 20, 25, 99])) == pytest.approx(1.0)
    assert spearman(torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 2, 1])) == pytest.approx(-1.0)
    assert spearman(torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 3, 2, 4])) == pytest.approx(0.9486833)
    assert math.isnan(spearman(torch.ones(3), torch.arange(3.0)))


def test_the_cut_lies_at_the_largest_scale_that_goes() -> None:
    scales = [torch.tensor([0.1, -0.4]), torch.tensor([0.8, 0.2])]
    found = scales_of(scales, torch.tensor([0.1, 0.4, 0.8, 0.2]), torch.tensor([False, True, True, False]))
    assert sum(found["counts"]) == 4
    assert found["largest"] == pytest.approx(0.8)
    assert found["cut"] == pytest.approx(0.2)
    assert scales_of(scales, torch.ones(4), torch.ones(4, dtype=torch.bool))["cut"] is None


def test_ranks_of_disjoint_halves() -> None:
    one, other = torch.tensor([[2.0, 8, 4], [1, 1, 1], [2, 2, 2]]), torch.tensor([[3.0, 9, 4], [1, 1, 1], [2, 2, 2]])
    found = ranks_of({"a": [one, other], "b": [one], "c": [torch.ones(3, 3)] * 2})
    assert found["agreement"] == pytest.approx({"a": 1.0})
    assert found["by_batch"]["a"] == [[1.0, 4.0, 2.0], [1.5, 4.5, 2.0]]
