"""The report of packed files: bytes by step, accuracy against compression, histograms, EIE's balance."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import microglia as mg
from microglia.compress import open_packed
from microglia.compress.engine_rows import Machine
from microglia.compress.histograms import DEPTHS, balances, distributions
from microglia.lab.recipe import resolve
from microglia.methods import Packed
from microglia.report.rows import groups
from microglia.report.sections.packed import accuracy_chart, histograms_chart, packed_of, steps_chart, tables
from microglia.report.write import collect, report


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two densities, one of them all weights, and a run of another method."""
    root = tmp_path_factory.mktemp("packed")
    base = {
        "model": "lenet-300-100", "data": "digits", "dense": {"epochs": 2}, "train": {"epochs": 1},
        "measure": {"latency": False},
    }  # fmt: skip
    for density in (0.2, 1.0):
        prune = {"density": density, "bits": 4, "share": {"epochs": 1}}
        mg.execute(
            resolve({**base, "method": "deep-compression", "prune": prune}), root / f"d{density}", starts=root / ".starts"
        )
    mg.execute(resolve({**base, "prune": {"density": 0.2}}), root / "plain", starts=root / ".starts")
    return root


def test_the_table_has_the_measured_bytes_of_each_step(runs: Path) -> None:
    (group,) = groups(collect([runs]))
    (table,) = tables(group)
    assert len(table.rows) == 2  # the other method packs nothing
    for row, entries in table.rows:
        (found,) = packed_of(row)
        texts = [entry.text for entry in entries]
        assert f"{found.bytes:,}" in texts
        assert texts[-2] == f"{found.dense / found.bytes:.1f}x"
        file = runs / f"d{row.records[0].recipe['prune']['density']}" / "model.mgpack"
        assert file.stat().st_size == found.bytes == found.steps["coded"]


def test_the_figures_show_what_was_measured(runs: Path) -> None:
    (group,) = groups(collect([runs]))
    rows = [(row, packed_of(row)) for row in group.rows if packed_of(row)]
    lines = {line.name: line for line in accuracy_chart(group, rows).panels[0].lines}
    assert set(lines) == {"pruning alone", "sharing alone", "both, coded"}
    sparse = next(found[0] for row, found in rows if row.records[0].recipe["prune"]["density"] == 0.2)
    assert lines["both, coded"].x == [sparse.dense / sparse.bytes]
    assert lines["pruning alone"].x[0] == sparse.dense / sparse.steps["pruned"] < lines["both, coded"].x[0]
    assert [bars.heights[-1] for bars in steps_chart(group, rows).panels[0].bars] == [found[0].bytes for _, found in rows]
    layer = sparse.layers["fc1.weight"].distributions
    assert layer is not None
    assert sum(layer.counts) == round(sparse.layers["fc1.weight"].density * 300 * 64)
    chart = histograms_chart(group, [("fc1.weight", layer)])
    assert chart.panels[0].bars[0].heights == layer.counts
    assert sum(chart.panels[1].bars[0].heights) >= sum(layer.counts)  # fillers count too


def test_the_report_is_written_with_all_four_figures(runs: Path, tmp_path: Path) -> None:
    report([runs], tmp_path)
    names = {path.stem.rpartition("-")[2] for path in tmp_path.rglob("*.png")}
    assert {"packedbytes", "packedaccuracy", "packedhistograms", "packedbalance"} <= names
    assert "coded, bytes" in (tmp_path / "results.md").read_text()


def test_distributions_are_those_of_the_file(runs: Path) -> None:
    file = open_packed(runs / "d0.2" / "model.mgpack")
    name = next(name for name, row in file.rows.items() if row["form"] == "shared")
    found, (tensor, kept) = distributions(file, name), file.decoded(name)
    assert {v: int(((tensor == v) & kept).sum()) for v in tensor[kept].unique().tolist()} == dict(
        zip(found.table, found.counts, strict=True)
    )
    assert len(found.balance) == len(DEPTHS)


def test_deeper_queues_balance_better() -> None:
    kept = np.random.default_rng(0).random((512, 300)) < 0.1
    found = balances(kept, Machine())
    assert found == sorted(found)
    assert 0.2 < found[0] < 0.8 * found[-1] <= 1


def test_results_of_earlier_versions_have_no_distributions() -> None:
    from microglia.lab.result import read

    old = {"density": 0.1, "values": 3, "code_bits": 2.0, "index_bits": 3.0, "bytes": 9}
    found = read(Packed, {"bytes": 10, "dense": 20, "layers": {"a": old}})
    assert found.layers["a"].distributions is None
    assert found.steps == {}
    assert found.rounds == ()


def test_the_table_of_the_document_has_each_seed_beside_its_dense_network(runs: Path, tmp_path: Path) -> None:
    place = Path(__file__).parents[2] / "benchmarks" / "deep_compression_table.py"
    spec = importlib.util.spec_from_file_location("deep_compression_table", place)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "lenet").symlink_to(runs)
    script.exported(tmp_path / "runs", tmp_path / "results")
    lines = script.table(groups(collect([tmp_path / "results" / "lenet.json"])))
    assert len(lines) == 2 + 2  # the run that packs nothing has no row
    for record in collect([runs]):
        found = record.observed(Packed)
        if found is not None:
            (line,) = [line for line in lines if f"{found.bytes:,}" in line]
            assert f"{100 * record.value(record.dense):.2f}" in line
            assert f"{100 * record.value(record.pruned):.2f}" in line
            assert f"{found.dense / found.bytes:.1f}x" in line
            assert ("1 of 1" in line) == (record.value(record.pruned) >= record.value(record.dense))
