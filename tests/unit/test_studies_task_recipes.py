"""The queue of SMART's tables on small tasks: recipes, their document, and the trial of a queue."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from benchmark_scripts import script
from microglia.lab.execute import make_task
from microglia.lab.recipe import as_dict, method_config, resolve
from microglia.methods import methods
from microglia.studies.evidence.files import read_queue
from microglia.studies.evidence.ledger import Entry, Ledger
from microglia.studies.evidence.plan import Planner, grid_of
from queues import jobs_of_first_seed

QUEUE = Path(__file__).parents[2] / "recipes" / "tasks" / "queue.yaml"
LAST_CHANGE = 0.6
BOX = "<object><name>{}</name><bndbox><xmin>4</xmin><ymin>5</ymin><xmax>34</xmax><ymax>40</ymax></bndbox></object>"


@pytest.fixture(scope="module")
def queue():
    return read_queue(QUEUE)


@pytest.fixture(scope="module")
def jobs(queue, tmp_path_factory):
    return jobs_of_first_seed(queue, tmp_path_factory.mktemp("nothing"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two pictures with a box each, and two with a mask each, for every split."""
    boxes, masks = tmp_path_factory.mktemp("boxes"), tmp_path_factory.mktemp("masks")
    for split in ("train", "val", "test"):
        names = [f"{split}{number}" for number in range(2)]
        folders = [boxes / "Annotations", boxes / "JPEGImages", boxes / "ImageSets" / "Main"]
        for folder in (*folders, masks / "images" / split, masks / "masks" / split):
            folder.mkdir(parents=True, exist_ok=True)
        (boxes / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            picture = Image.new("RGB", (64, 64), (20, 120, 220))
            picture.save(boxes / "JPEGImages" / f"{name}.png")
            (boxes / "Annotations" / f"{name}.xml").write_text(f"<a>{BOX.format('cell')}</a>")
            picture.save(masks / "images" / split / f"{name}.png")
            Image.new("L", (64, 64), 1).save(masks / "masks" / split / f"{name}.png")
    (masks / "classes.txt").write_text("road\nsky")
    return {"detection": (str(boxes), {"size": 64}), "segmentation": (str(masks), {"crop": [64, 64]})}


def test_every_file_in_the_folder_is_a_part_of_the_queue(queue):
    files = {path.relative_to(QUEUE.parent).with_suffix("").as_posix() for path in QUEUE.parent.glob("*/*.yaml")}
    assert files == set(queue.studies)


def test_every_part_of_a_study_is_in_the_queue(queue, jobs):
    for name, study in queue.studies.items():
        points = {job.values.get(key) for job in jobs if job.study == name for key in study.grid if job.values}
        assert points == {value for values in study.grid.values() for value in values}
        assert {job.row for job in jobs if job.study == name} == set(study.rows)


def test_every_recipe_fits_its_model(jobs, folders):
    """Each check of a method runs once for a model and a pattern; the config itself is checked for every recipe."""
    checked = set()
    for job in jobs:
        recipe, config = job.recipe, method_config(job.recipe)
        check = methods[recipe.method].check
        key = recipe.model, check.__module__, check.__qualname__, recipe.prune["pattern"], repr(recipe.prune.get("exclude"))
        if key not in checked:
            checked.add(key)
            check(task_of(recipe, folders), config)
    assert len(checked) >= 8


def task_of(recipe, folders):
    if recipe.task is None:
        return make_task(replace(recipe, data="digits"))
    data, small = folders[recipe.task["kind"]]
    return make_task(replace(recipe, data=data, task={**recipe.task, "data": data, **small}))


def test_rows_of_a_study_share_length_data_order_and_start(queue, jobs):
    for name, study in queue.studies.items():
        cells = [job for job in jobs if job.study == name and job.kind == "cell"]
        assert len({(json.dumps(as_dict(job.recipe)["train"]), job.start, job.seed) for job in cells}) == 1
        assert {(job.recipe.threads, job.recipe.device, job.recipe.train.distill) for job in cells} == {(1, "cpu", 0)}
        assert study.seeds == [0, 1, 2]
        assert {"dense", "smart", "pdp", "pas", "awg", "acdc"} < set(study.rows)
        assert {row for row, own in study.rows.items() if not own.control} == {"smart", "pdp", "pas", "awg", "acdc"}
    starts = [job.recipe.model for job in jobs if job.kind == "start"]
    assert len(starts) == len(set(starts)) == 4  # blocks and channels have one dense network


def test_the_dense_row_of_blocks_and_channels_is_one_run(jobs):
    dense = {job.study: job.identity for job in jobs if job.row == "dense" and job.kind == "cell"}
    assert len(dense) == 6
    assert (dense["bccd/blocks"], dense["camvid/blocks"]) == (dense["bccd/channels"], dense["camvid/channels"])


def test_channels_have_equal_operations_and_masks_are_fixed_in_time(queue, jobs):
    for job in jobs:
        if job.kind == "start" or job.row == "dense":
            continue
        config = method_config(job.recipe)
        assert (config.flops is not None) == (config.pattern == "channel") == job.study.endswith("channels")
        assert getattr(config, "span", (0, getattr(config, "end", LAST_CHANGE)))[1] == pytest.approx(LAST_CHANGE)
        assert job.recipe.measure.latency == job.study.endswith("channels")  # a time beside every count of operations


# --------------------------------------------------------------------------------------------------------------- the document
def test_every_row_stands_beside_its_figure(queue):
    tables, published = script("task_tables"), script("task_published").PUBLISHED
    assert {name for studies in tables.TABLES.values() for name in studies} == set(queue.studies) == set(published)
    for name, study in queue.studies.items():
        points = [value for values in study.grid.values() for value in values] or [None]
        for row, own in study.rows.items():
            figures = [published[name].at(row, point) for point in points]
            assert all(figures) == (row == "dense" or not own.control)
            assert grid_of(study, own) == (study.grid if row != "dense" else {})


def observed(value, kept=1.0):
    return {
        "metrics": {"accuracy": value},
        "parameters": {"all": 100, "compression": 1 / kept, "density": kept, "kept": 50, "prunable": 100},
        "macs": {"effective": 1000 * kept, "speedup": 1 / kept, "total": 1000},
        "bytes": {"raw": 400, "zipped": 200},
    }


def result(job, value):
    environment = {"microglia": "0", "torch": "2", "python": "3", "platform": "p", "processor": "p", "threads": 1}
    told = {"task": "a vit", "headline": "accuracy", "units": {"accuracy": "%"}, "asked": {}, "latency": None}
    models = {"dense": observed(0.9), "pruned": observed(value, 0.5)}
    return {"recipe": as_dict(job.recipe), "environment": environment, **told, **models, "source": "a", "seconds": 1.0}


def test_the_document_tells_what_was_run_and_what_was_not(queue, tmp_path):
    tables = script("task_tables")
    empty = tables.document(queue, Ledger(tmp_path))
    assert "State: 0 of 270 cells are done" in empty
    assert "| density 0.3 | smart | 0 | not run |  |  |  |  | 40.0 |" in empty
    assert "Not run yet: 24 of 24 runs." in empty
    assert "SMART above the others" not in empty
    ledger, values = Ledger(tmp_path), {"dense": (0.80, 0.81, 0.82), "smart": (0.70, 0.71, 0.72), "pdp": (0.60, 0.62, 0.61)}
    for job in Planner(queue, ledger).jobs():
        if job.study == "cifar10/vit" and job.row in values:
            entry = Entry(job.identity, job.study, job.row, job.values, job.seed, "c0ffee", 1.0, 10, "bits", None)
            ledger.add_cell(entry, result(job, values[job.row][job.seed]))
    text = tables.document(queue, Ledger.read(tmp_path))
    assert "| kept | row | n | accuracy | to dense | weights | MACs | ms | published: ViT on ImageNet, top-1 |" in text
    assert "| all | dense | 3 | 81.00 ± 0.58 |" in text
    assert "| 2 of 4 | smart | 3 | 71.00 ± 0.58 | -10.00 ± 0.00 (n = 3) | 0.500 | 0.500 |  | 76.8 |" in text
    assert "SMART above the others: cannot be told; smart - pdp, the best of 4 others: +10.00 ± 0.58 (n = 3)." in text
    assert "Not run yet: 15 of 24 runs." in text
    assert "Dense networks from which" not in text


def test_detectors_show_two_metrics_and_the_network_from_which_they_start(queue, tmp_path):
    tables, ledger = script("task_tables"), Ledger(tmp_path)
    jobs = Planner(queue, ledger).jobs()
    start = next(job for job in jobs if job.kind == "start" and job.recipe.model == "yolov5n" and job.seed == 0)
    cell = next(job for job in jobs if job.study == "bccd/blocks" and job.row == "smart" and job.seed == 0)
    ledger.add_start(Entry(start.identity, "", "yolov5n", {}, 0, "c0ffee", 1800.0, 150, "bits", 0.54, as_dict(start.recipe)))
    told = result(cell, 0.0) | {"headline": "map", "units": {"map": "%"}}
    told["dense"]["metrics"], told["pruned"]["metrics"] = (
        {"map": 0.54, "map50": 0.86, "map/RBC": 0.5},
        {"map": 0.5, "map50": 0.8},
    )
    ledger.add_cell(Entry(cell.identity, cell.study, cell.row, cell.values, 0, "c0ffee", 1.0, 50, "bits", None), told)
    text = tables.document(queue, Ledger.read(tmp_path))
    assert "| kept | row | n | map (map50) | to dense |" in text
    assert "| smart | 1 | 50.00 (80.00) |" in text
    assert "(1): map 54.00, map50 86.00 on the test images; 150 epochs, 30 minutes of one core each." in text


# ------------------------------------------------------------------------------------------------------------------ the trial
def test_a_trial_shortens_inner_loops_and_keeps_the_method():
    trial = script("trial")
    known = {field for name in methods for field in methods[name].config.__dataclass_fields__}
    assert set(trial.SHORT) <= known
    long = resolve({"model": "resnet8", "method": "amc", "prune": {"flops": 0.5}, "train": {"epochs": 9}})
    short = trial.shortened(long)
    assert (long.prune["episodes"], short.prune["episodes"], short.prune["warmup"]) == (800, 3, 2)
    assert (short.train, short.dense, short.prune["flops"]) == (long.train, long.dense, 0.5)
    tried = trial.trial(long, 1, 2)
    assert (tried.train.epochs, tried.train.max_batches, tried.dense.epochs, tried.method) == (2, 1, 1, "amc")


def test_a_trial_runs_every_row_and_ends_with_a_failure(tmp_path, monkeypatch, capsys):
    trial = script("trial")
    base = {"model": "lenet-300-100", "data": "digits", "device": "cpu", "measure": {"latency": False}}
    rows = {"one": {"set": {"method": "magnitude"}}, "two": {"set": {"method": "slimming", "prune": {"flops": 0.5}}}}
    study = {"title": "Toys", "base": base, "rows": rows, "grid": {"seed": [3]}, "seeds": [3]}
    rows["one"]["set"]["prune.density"] = 0.5
    (tmp_path / "toys.yaml").write_text(yaml.safe_dump(study))
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump({"results": "kept", "parts": [{"study": "toys", "worth": 1}]}))
    monkeypatch.setattr("sys.argv", ["trial.py", str(tmp_path / "queue.yaml"), "--out", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match="1"):
        trial.main()
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("toys one ")
    assert "'after': 0." in first
    assert second.startswith("toys two ")
    assert "FAILED: ShrinkError: Slimming ranks channels" in second
    assert not (tmp_path / "kept").exists()  # numbers of a trial are no results
    monkeypatch.setattr("sys.argv", [*sys.argv, "--rows", "one"])
    trial.main()  # it ran before, and nothing failed
    assert capsys.readouterr().out.startswith("toys one ")
