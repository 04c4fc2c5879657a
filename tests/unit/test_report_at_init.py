"""Reports of masks made before training: the table of paths, the collapse figure, and the page."""

import json

import pytest
from test_report import result, save

from microglia.methods import Initialization
from microglia.report.read import read_results
from microglia.report.write import collect, export, report


def paths(kept, effective, *, empty=False):
    layers = {"one": (600, kept // 2, effective // 2), "two": (400, kept - kept // 2, effective - effective // 2)}
    if empty:
        layers = {"one": (600, 0, 0), "two": (400, kept, 0)}
    return {
        "total": 1000,
        "kept": kept,
        "effective": 0 if empty else effective,
        "emptied": ["one"] if empty else [],
        "layers": {name: dict(zip(("total", "kept", "effective"), row, strict=True)) for name, row in layers.items()},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("paths")
    for name, ablation in (("synflow", "none"), ("snip", "none"), ("snip", "shuffle")):
        for kept in (100, 10):
            for seed in (0, 1):
                settings = {"density": kept / 1000, "ablation": ablation}
                told = paths(kept, kept - 2 * seed, empty=name == "snip" and kept == 10 and seed == 1)
                run = result(name, prune=settings, seed=seed, accuracy=0.5 + kept / 1000) | {"initialization": told}
                run["asked"] = {"density": kept / 1000, "params": None}
                save(root / "runs" / f"{name}-{ablation}-{kept}-{seed}", run)
    written = report([root / "runs"], root / "report")
    return root, written


def test_the_table_tells_paths_and_emptied_layers(made):
    root, _ = made
    text = (root / "report" / "results.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|") and "on a path" in line]
    assert len(lines) == 1
    rows = [line for line in text.splitlines() if line.startswith("| snip") and "1 of 2" in line]
    assert len(rows) == 2  # both ablations at one hundredth
    assert any("ablation=shuffle" in row for row in rows)
    assert "49.00" in rows[0] or "50.00" in rows[0]  # half of the seeds have no path at all
    synflow = [line for line in text.splitlines() if line.startswith("| synflow") and "none" in line]
    assert any("99.00" in line for line in synflow)  # 100 and 98 of 100
    assert "layers that kept nothing" in text


def test_the_figure_and_the_page_show_the_collapse(made):
    root, _ = made
    drawn = sorted((root / "report").rglob("*-collapse.*"))
    assert [path.suffix for path in drawn] == [".png", ".svg"]
    assert "mathdefault" not in drawn[1].read_text()  # ticks are numbers, not markup
    assert "on a path" in (root / "report" / "report.html").read_text()
    assert "-collapse.png" in (root / "report" / "results.md").read_text()


def test_exported_results_keep_them(made):
    root, _ = made
    export(collect([root / "runs"]), root / "kept.json")
    found = read_results([root / "kept.json"])
    assert len(found.records) == 12
    assert all(record.observed(Initialization) is not None for record in found.records)
    assert min(record.observed(Initialization).least for record in found.records) == 0


def test_a_damaged_initialization_is_left_out_with_its_place(tmp_path):
    save(tmp_path / "run", json.dumps(result("snip", prune={"density": 0.1}) | {"initialization": {"total": 3}}))
    found = read_results([tmp_path])
    assert found.records == ()
    assert "initialization" in found.left_out[0]
