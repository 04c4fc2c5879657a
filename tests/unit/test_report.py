"""Reports: records, the numbers of the tables, figures that show something, a page that needs no network."""

import html.parser
import io
import json
import math
import re
import statistics
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from microglia.core.errors import FileError
from microglia.lab.execute import execute
from microglia.lab.recipe import as_dict, resolve
from microglia.measure import measure, measure_latency
from microglia.report.printed import printed
from microglia.report.rows import Spread, groups, speedup_of
from microglia.report.sections.dynamic import gates_chart, lines_of, savings_chart
from microglia.report.table import markdown, table
from microglia.report.write import collect, export, read_results, report

TITLES = [
    "method",
    "pattern",
    "scope",
    "kept (asked)",
    "n",
    "accuracy, %, before recovery",
    "accuracy, %, after",
    "change (points)",
    "compression",
    "theoretical speed-up",
    "dense, ms (execution)",
    "pruned, ms (execution)",
    "measured speed-up",
    "bytes, raw",
    "bytes, zipped",
]


def observed(accuracy, *, compression=1.0, speedup=1.0, zipped=1000):
    layers = {f"layer{i}.weight": [1000, 500] for i in range(20)}
    parameters = {
        "all": 20_000,
        "prunable": 20_000,
        "kept": 0 if compression is None else round(20_000 / compression),
        "nonzero_all": 1,
        "density": 0.5,
        "compression": compression,
    }
    macs = {"total": 4000, "effective": 4000 / speedup, "speedup": speedup, "other": 0, "layers": dict.fromkeys(layers, 200)}
    return {
        "metrics": {"accuracy": accuracy, "top5": 0.99, "loss": 0.3},
        "parameters": {**parameters, "layers": layers},
        "macs": macs,
        "bytes": {"raw": 2_000_000, "zipped": zipped},
        "latency": None,
    }


def latency(dense, pruned, **changes):
    def timing(median):
        return {"median": median, "low": 0.9 * median, "high": 1.1 * median, "rounds": 5}

    found = {
        "timings": {
            "dense": {"eager": timing(2 * dense), "packed": timing(dense)},
            "pruned": {"eager": timing(pruned), "packed": timing(2 * pruned)},
        },
        "device": "Some CPU",
        "threads": 2,
        "batch": 1,
        "torch_version": "2.13.0",
        "notes": ["dense: compiled was left out: no compiler in /opt/secret/bin/g++"],
        "best": {"dense": "packed", "pruned": "eager"},
    }
    return {**found, **changes}


def result(method="global-magnitude", *, params=0.5, seed=0, accuracy=0.9, before=0.8, dense=0.92, times=None, **recipe):
    source = {
        "model": "resnet20",
        "data": "cifar10",
        "method": method,
        "seed": seed,
        "checkpoint": "/home/somebody/models/resnet20.th",
        "prune": {"params": params, "exclude": ["linear"]},
        "train": {"epochs": 1, "lr": 0.02},
    }
    ratio = 1 / params
    return {
        "recipe": as_dict(resolve({**source, **recipe})),
        "environment": {
            "microglia": "0.1.0",
            "torch": "2.13.0",
            "python": "3.12.1",
            "platform": "Linux",
            "processor": "Some CPU",
            "threads": 2,
            "cores": 2,
            "gpu": None,
        },
        "task": "resnet20 on cifar10",
        "headline": "accuracy",
        "normalization": {"mean": [0.5], "std": [0.5]},
        "asked": {"density": None, "params": params},
        "masks": {"kept": 1, "total": 2},
        "dense": observed(dense, zipped=1_800_000),
        "before": None if before is None else observed(before, compression=ratio, speedup=ratio**0.8),
        "pruned": observed(accuracy, compression=ratio, speedup=ratio**0.8, zipped=round(1_900_000 * params)),
        "latency": times,
        "seconds": 12.5,
    }


def save(directory, content, curves=""):
    directory.mkdir(parents=True)
    (directory / "recipe.yaml").write_text("model: resnet20\n")
    (directory / "result.json").write_text(content if isinstance(content, str) else json.dumps(content))
    if curves:
        (directory / "metrics.jsonl").write_text(curves)
    return directory


def curves(stage="train", epochs=3):
    rows = [
        {"stage": stage, "epoch": e, "loss": 1 / e, "lr": 0.1, "validation_accuracy": 0.5 + e / 10, "seconds": 1}
        for e in range(1, epochs + 1)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Five methods, three budgets, three seeds: 45 runs with curves and latencies."""
    root = tmp_path_factory.mktemp("made") / "runs"
    for place, method in enumerate(["global-magnitude", "layer-magnitude", "global-gradient", "layer-gradient", "random"]):
        for params in (0.5, 0.25, 0.125):
            for seed in (0, 1, 2):
                accuracy = 0.92 - 0.01 * (place + 1) / params + 0.002 * seed
                content = result(method, params=params, seed=seed, accuracy=accuracy, times=latency(4.0, 4.0 + place * params))
                save(root / f"{method}-{params}-{seed}", content, curves())
    return root


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """The report of these runs."""
    return report([runs], tmp_path_factory.mktemp("report"))


def rows_of(*paths):
    """Returns the rows of the first table of ``results.md``, as mappings from title to text."""
    found = read_results(paths)
    return table_of(markdown(found, groups(found.records), []))


def table_of(text):
    """Returns the rows of the first table of a Markdown text, as mappings from title to text."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    titles, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(titles, row, strict=True)) for row in rows]


class TestNumbers:
    def test_mean_and_deviation_by_hand(self):
        # mean (1 + 2 + 6) / 3 = 3; squares 4 + 1 + 9 = 14, over n - 1 = 2: 7
        assert Spread.of([1, 2, 6]) == Spread(3.0, math.sqrt(7), 3)
        assert Spread.of([5]) == Spread(5.0, None, 1)

    def test_a_row_by_hand(self, tmp_path):
        times = [latency(4.0, 2.0), latency(6.0, 4.0), latency(5.0, 5.0)]  # ratios 2, 1.5, 1
        for seed, (accuracy, before) in enumerate([(0.90, 0.50), (0.91, 0.60), (0.93, 0.70)]):
            save(tmp_path / "runs" / str(seed), result(seed=seed, accuracy=accuracy, before=before, times=times[seed]))
        dense, row = rows_of(tmp_path / "runs")
        assert list(row) == TITLES
        assert list(row.values()) == [
            "global-magnitude",
            "unstructured",
            "global",
            "params 0.5",
            "3",
            "60.00 ± 10.00",  # 50, 60, 70
            "91.33 ± 1.53",  # 90, 91, 93: deviations -4/3, -1/3, 5/3; squares 42/9 over 2 = 7/3; root 1.5275
            "-0.67 ± 1.53",  # against 92
            "2.00x",
            "1.74x",  # 2 ** 0.8
            "5.000 (packed)",  # median of 4, 6, 5
            "4.000 (eager)",  # median of 2, 4, 5
            "1.50x",  # median of the ratios, not ratio of the medians
            "2,000,000",
            "950,000",
        ]
        assert dense == dict(
            zip(
                TITLES,
                [
                    "dense",
                    "",
                    "",
                    "",
                    "1",
                    "",
                    "92.00",
                    "",
                    "1.00x",
                    "1.00x",
                    "5.000 (packed)",
                    "",
                    "1.00x",
                    "2,000,000",
                    "1,800,000",
                ],
                strict=True,
            )
        )

    def test_unmeasured_latency_is_said_beside_the_theoretical_speedup(self, tmp_path):
        save(tmp_path / "runs" / "a", result())
        dense, row = rows_of(tmp_path / "runs")
        assert row["theoretical speed-up"] == "1.74x"
        assert [row[t] for t in ("dense, ms (execution)", "pruned, ms (execution)", "measured speed-up")] == [
            "not measured"
        ] * 3
        assert dense["dense, ms (execution)"] == "not measured"
        after = TITLES[TITLES.index("theoretical speed-up") + 1 :]
        assert after[:3] == ["dense, ms (execution)", "pruned, ms (execution)", "measured speed-up"]

    def test_some_runs_timed_and_several_machines_are_said(self, tmp_path):
        for seed, times in enumerate([latency(4.0, 2.0), None]):
            save(tmp_path / "some" / str(seed), result(seed=seed, times=times))
        for seed, threads in enumerate([1, 2]):
            save(tmp_path / "several" / str(seed), result(seed=seed, times=latency(4.0, 2.0 + seed, threads=threads)))
        (row,) = groups(collect([tmp_path / "some"]))[0].rows
        assert row.time("dense") == ("packed", 4.0)
        report([tmp_path / "some"], tmp_path / "out")
        assert (
            table_of((tmp_path / "out" / "results.md").read_text())[1]["pruned, ms (execution)"] == "2.000 (eager, 1 of 2 runs)"
        )
        report([tmp_path / "several"], tmp_path / "out")
        row = table_of((tmp_path / "out" / "results.md").read_text())[1]
        assert (row["pruned, ms (execution)"], row["measured speed-up"]) == ("2 machines", "1.33 to 2.00x")

    def test_a_trained_dense_model_counts_once_for_each_seed_and_each_run_is_compared_with_its_own(self, tmp_path):
        for params in (0.5, 0.25):
            for seed, dense in enumerate([0.80, 0.90]):
                content = result(params=params, seed=seed, dense=dense, accuracy=dense - 0.01, checkpoint=None)
                save(tmp_path / f"{params}-{seed}", content)
        (group,) = groups(collect([tmp_path]))
        (baseline,) = group.baselines
        assert baseline.after == Spread(pytest.approx(0.85), pytest.approx(statistics.stdev([0.8, 0.9])), 2)
        assert [row.change.mean for row in group.rows] == pytest.approx([-0.01, -0.01])
        assert [row.change.deviation for row in group.rows] == pytest.approx([0, 0], abs=1e-12)

    def test_rows_are_sorted_and_split_where_recipes_differ(self, tmp_path):
        number = 0
        for epochs in (30, 1):
            for params in (0.125, 0.5):
                for method in ("random", "global-magnitude"):
                    save(tmp_path / str(number), result(method, params=params, train={"epochs": epochs}))
                    number += 1
        (group,) = groups(collect([tmp_path]))
        found = [(row.method, row.settings, row.asked) for row in group.rows]
        assert found == [
            (method, f"train.epochs={epochs}", f"params {params}")
            for method in ("global-magnitude", "random")
            for epochs in (1, 30)
            for params in (0.5, 0.125)
        ]
        assert "settings" in table(group).columns
        assert sorted(group.lines) == sorted({f"{method} {settings}" for method, settings, _ in found})
        assert len(group.baselines) == 1  # the dense model does not depend on the recovery

    def test_fields_that_came_later_are_at_their_defaults_in_an_older_recipe(self, tmp_path):
        save(tmp_path / "new", result(seed=0, accuracy=0.90))
        older = result(seed=1, accuracy=0.92)
        del older["recipe"]["measure"]["accelerate"], older["recipe"]["prune"]["permute"], older["recipe"]["train"]["momentum"]
        save(tmp_path / "old", older)
        (row,) = groups(collect([tmp_path]))[0].rows
        assert (row.settings, row.after.n, row.after.mean) == ("", 2, pytest.approx(0.91))
        save(tmp_path / "other", result(seed=2, measure={"accelerate": True}))
        assert {row.settings for row in groups(collect([tmp_path]))[0].rows} == {
            "measure.accelerate=False",
            "measure.accelerate=True",
        }

    def test_a_dense_model_for_each_checkpoint(self, tmp_path):
        for number, name in enumerate(["/a/one.th", "/a/two.th"]):
            save(tmp_path / name[3:], result(checkpoint=name, dense=0.9 + number / 100, accuracy=0.9))
        (group,) = groups(collect([tmp_path]))
        assert [(row.settings, row.after.mean) for row in group.baselines] == [
            ("checkpoint=one.th", 0.9),
            ("checkpoint=two.th", 0.91),
        ]

    def test_tasks_are_kept_apart(self, tmp_path):
        save(tmp_path / "a", result())
        save(tmp_path / "b", {**result(model="conv-2", data="digits"), "task": "conv-2 on digits"})
        found = groups(collect([tmp_path]))
        assert [group.title for group in found] == ["conv-2 on digits", "resnet20 on cifar10"]
        assert len({group.slug for group in found}) == 2

    def test_a_headline_that_is_no_fraction_is_not_turned_into_per_cent(self, tmp_path):
        content = result()
        content["headline"] = "psnr"
        for name, value in (("dense", 31.5), ("before", 20.0), ("pruned", 30.25)):
            content[name]["metrics"]["psnr"] = value
        save(tmp_path / "a", content)
        (group,) = groups(collect([tmp_path]))
        found = table(group)
        texts = dict(zip(found.columns, [entry.text for entry in found.rows[1][1]], strict=True))
        assert (texts["psnr, after"], texts["change"]) == ("30.2500", "-1.2500")

    def test_a_unit_that_a_run_tells_decides_over_its_values(self, tmp_path):
        content = result(dense=0.5, before=0.2, accuracy=0.4)
        save(tmp_path / "a", {**content, "units": {"accuracy": ""}})
        (group,) = groups(collect([tmp_path]))
        assert (group.scale, group.unit) == (1.0, "")
        other = result(seed=1, dense=0.5, before=0.2, accuracy=0.4)
        save(tmp_path / "b", {**other, "task": "other", "units": {"accuracy": "%"}})
        assert [one.unit for one in groups(collect([tmp_path]))] == [" %", ""]
        kept = collect([export(collect([tmp_path]), tmp_path / "kept.json")])
        assert {record.units["accuracy"] for record in kept} == {"", "%"}

    def test_methods_without_a_moment_before_recovery_and_infinite_compression(self, tmp_path):
        content = result(before=None)
        content["pruned"]["parameters"] |= {"kept": 0, "compression": None}
        save(tmp_path / "runs" / "a", content)
        written = report([tmp_path / "runs"], tmp_path / "out")
        row = table_of(written.tables.read_text())[1]
        assert (row["accuracy, %, before recovery"], row["compression"]) == ("", "infinite")


class TestReading:
    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda text: text[: len(text) // 2], "not a JSON file"),
            (lambda text: "[]", "no JSON object"),
            (lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "pruned"}), "pruned is missing"),
            (lambda text: text.replace('"accuracy": 0.9,', '"accuracy": NaN,'), "accuracy is nan"),
            (lambda text: text.replace('"accuracy": 0.9,', '"accuracy": "good",'), "pruned.metrics.accuracy"),
            (lambda text: text.replace('"seed": 0, ', ""), "the recipe lacks seed"),
            (lambda text: text.replace('"packed": ', '"pecked": '), "latency"),
        ],
    )
    def test_a_damaged_result_is_named_and_left_out(self, tmp_path, damage, reason):
        good = result(seed=1, times=latency(1.0, 1.0))
        save(tmp_path / "runs" / "good", good)
        text = json.dumps(result(times=latency(1.0, 1.0)))
        damaged = damage(text)
        assert damaged != text
        save(tmp_path / "runs" / "bad", damaged)
        with pytest.warns(UserWarning, match=r"runs/bad/result\.json: damaged"):
            records = collect([tmp_path / "runs"])
        assert [record.recipe["seed"] for record in records] == [1]
        found = read_results([tmp_path / "runs"])
        (line,) = found.left_out
        assert reason in line
        assert f"## Left out\n\n- {line.replace('<', '&lt;')}\n" in markdown(found, groups(found.records), [])

    def test_unfinished_runs_are_named(self, tmp_path):
        save(tmp_path / "runs" / "good", result())
        (tmp_path / "runs" / "half").mkdir()
        (tmp_path / "runs" / "half" / "recipe.yaml").write_text("model: x")
        (tmp_path / "runs" / "failed").mkdir()
        (tmp_path / "runs" / "failed" / "cell.yaml").write_text("model: x")
        assert read_results([tmp_path / "runs"]).left_out == ("runs/failed: not finished", "runs/half: not finished")

    def test_damaged_curves_cost_only_the_curves(self, tmp_path):
        save(tmp_path / "a", result(), curves() + '{"stage": "tr')
        found = read_results([tmp_path])
        assert found.records[0].curves == {}
        assert found.left_out == (f"{tmp_path.name}/a/metrics.jsonl: damaged, so there are no curves of this run",)

    def test_curves_are_read_by_stage(self, tmp_path):
        save(tmp_path / "a", result(), curves("dense", 2) + curves("train", 3))
        assert collect([tmp_path])[0].curves == {
            "dense": {"epoch": [1, 2], "loss": [1, 0.5], "validation": [0.6, 0.7]},
            "train": {"epoch": [1, 2, 3], "loss": [1, 0.5, 0.333333], "validation": [0.6, 0.7, 0.8]},
        }

    def test_a_run_found_twice_counts_once(self, tmp_path):
        directory = save(tmp_path / "runs" / "a", result())
        assert read_results([tmp_path / "runs", directory, directory / "result.json"]).left_out == ()
        assert len(collect([tmp_path / "runs", directory, directory / "result.json"])) == 1
        save(tmp_path / "other" / "a", result())
        with pytest.warns(UserWarning, match=r"the same recipe and seed as .*, counted once"):
            assert len(collect([tmp_path])) == 1

    def test_nothing_to_report(self, tmp_path):
        with pytest.raises(FileError, match="no run directory or results file"):
            report([tmp_path / "none"], tmp_path / "out")
        save(tmp_path / "runs" / "bad", "{")
        with pytest.raises(FileError, match=r"no finished run .*bad/result\.json: damaged"):
            report([tmp_path / "runs"], tmp_path / "out")
        with pytest.raises(FileError, match="no path at all"):
            report([], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_what_measure_returns_is_what_records_hold(self, tmp_path):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        example = torch.zeros(1, 8)
        times = measure_latency(
            {"dense": model, "pruned": model}, example, executions=("eager",), rounds=3, min_round_seconds=0
        )
        content = result()
        for name in ("dense", "before", "pruned"):
            content[name] = {"metrics": {"accuracy": 0.5}, **measure(model, example, latency=False).to_dict()}
        content["latency"] = times.to_dict()
        save(tmp_path / "a", content)
        (record,) = collect([tmp_path])
        assert record.latency == times
        assert speedup_of(record.latency) == times.speedup("pruned", over="dense")
        assert record.dense.parameters.all == 8 * 8 + 8 + 2 * 8 + 2
        assert record.pruned.macs.total == 80


class TestExport:
    def test_the_tables_are_the_same_from_exported_records(self, tmp_path, runs, written):
        export(collect([runs]), tmp_path / "results" / "bench.json")
        again = report([tmp_path / "results"], tmp_path / "again")
        tables, _, sources = again.tables.read_text().partition("## Made from")
        assert tables == written.tables.read_text().partition("## Made from")[0]
        assert sources.strip() == "- `results/bench.json` (45 runs)"
        assert plots(Page(again.page.read_text())) == plots(Page(written.page.read_text()))

    def test_it_keeps_what_the_report_needs_and_no_path_of_the_machine(self, tmp_path, runs):
        save(tmp_path / "elsewhere", {**result(data="/data/sets/pets"), "task": "resnet20 on /data/sets/pets"})
        text = export(collect([runs, tmp_path]), tmp_path / "bench.json").read_text()
        content = json.loads(text)
        assert len(content) == 46
        assert len(text.splitlines()) == 48  # one line each: a small diff when one is added
        for word in ("layers", "/home", "somebody", "/data", "/opt", "secret/", str(tmp_path)):
            assert word not in text.replace('"layers": ["*"]', "").replace("layers_", "")
        assert {item["recipe"]["checkpoint"] for item in content} == {"resnet20.th"}
        assert {item["recipe"]["data"] for item in content} == {"cifar10", "pets"}
        assert "resnet20 on pets" in {item["task"] for item in content}
        assert len(text) < sum(len(path.read_text()) for path in runs.glob("*/result.json")) / 1.4

    def test_it_reads_back_equal(self, tmp_path, runs):
        records = collect([runs])
        again = collect([export(records, tmp_path / "bench.json")])
        assert len(records) == 45
        assert [replace(record, source="") for record in records] == [replace(record, source="") for record in again]
        first = (tmp_path / "bench.json").read_bytes()
        assert export(list(reversed(records)), tmp_path / "bench.json").read_bytes() == first

    @pytest.mark.parametrize(
        ("text", "reason"), [("[{", "damaged"), ("{}", "not a list"), ('[1, {"a": 2}]', "result 1: damaged")]
    )
    def test_a_damaged_file_is_named(self, tmp_path, text, reason):
        (tmp_path / "bench.json").write_text(text)
        save(tmp_path / "runs" / "good", result())
        found = read_results([tmp_path / "bench.json", tmp_path / "runs"])
        assert len(found.records) == 1
        assert found.left_out[0].startswith("bench.json")
        assert reason in found.left_out[0]

    def test_one_damaged_result_costs_only_itself(self, tmp_path):
        save(tmp_path / "runs" / "a", result())
        save(tmp_path / "runs" / "b", result(seed=1))
        path = export(collect([tmp_path / "runs"]), tmp_path / "bench.json")
        content = json.loads(path.read_text())
        del content[0]["headline"]
        path.write_text(json.dumps(content))
        found = read_results([path])
        assert len(found.records) == 1
        assert found.left_out == ("bench.json, result 1: damaged (headline is missing)",)


class TestMarkdown:
    def test_the_order_of_the_paths_does_not_matter(self, runs, written):
        found = read_results([*sorted(runs.iterdir(), reverse=True), runs])
        shuffled = markdown(found, groups(found.records), [path.relative_to(written.directory) for path in written.figures])
        assert shuffled.partition("## Made from")[0] == written.tables.read_text().partition("## Made from")[0]

    def test_it_says_what_made_it_and_what_ran_on_what(self, written):
        text = written.tables.read_text()
        assert "Generated by `microglia report`; do not edit." in text
        assert text.count("/result.json` (1 run)") == 45
        assert "45 runs on Some CPU (2 cores, 2 threads): torch 2.13.0, Python 3.12.1, microglia 0.1.0, Linux." in text
        assert "Timed on Some CPU, 2 threads, batch 1, best of: eager, packed." in text
        assert "checkpoint resnet20.th" in text
        assert "train.epochs 1" in text
        assert "no compiler in g++ (45 runs)" in text
        for word in ("/home", "/opt", "/tmp", str(written.directory)):
            assert word not in text

    def test_it_says_how_wide_the_model_is(self, tmp_path):
        save(tmp_path / "a", result(model_options={"width": 0.25}))
        found = read_results([tmp_path / "a"])
        assert "Recipe: model_options.width 0.25, checkpoint" in markdown(found, groups(found.records), [])

    def test_every_figure_it_shows_is_there(self, written):
        text = written.tables.read_text()
        shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
        assert len(shown) == 2
        assert all((written.directory / name).is_file() for name in shown)

    def test_names_cannot_break_the_table(self, tmp_path):
        content = result(prune={"params": 0.5, "pattern": "unstructured"})
        content["recipe"]["method"] = "a|b\n<script>`x`"
        save(tmp_path / "runs" / "a", content)
        assert rows_of(tmp_path / "runs")[1]["method"] == "a\\|b &lt;script>'x'"


class TestFigures:
    def test_images_show_something(self, written):
        assert sorted(path.name for path in written.figures) == [
            f"resnet20-on-cifar10-{name}.{form}" for name in ("compression", "speedup") for form in ("png", "svg")
        ]
        for path in written.figures:
            if path.suffix == ".png":
                image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
                colors = image.getcolors(1 << 24)
                assert min(image.size) > 600
                assert len(colors) > 200
                white = max(count for count, color in colors if color == (255, 255, 255))
                assert 0.5 < white / (image.width * image.height) < 0.98
                for wanted in ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"):
                    color = tuple(int(wanted[i : i + 2], 16) for i in (1, 3, 5))
                    assert sum(count for count, c in colors if c == color) > 100
            else:
                root = ElementTree.fromstring(path.read_text())
                assert root.tag.endswith("svg")
                assert len(root.findall(".//{http://www.w3.org/2000/svg}path")) > 50

    def test_the_same_results_give_the_same_bytes(self, runs, written, tmp_path):
        again = report([runs], tmp_path)
        assert again.tables.read_bytes() == written.tables.read_bytes()
        assert again.page.read_bytes() == written.page.read_bytes()
        for first, second in zip(written.figures, again.figures, strict=True):
            assert first.read_bytes() == second.read_bytes()

    def test_better_methods_are_drawn_higher(self, written):
        """The picture itself: the markers of the best method lie above those of the worst."""
        path = next(path for path in written.figures if path.name == "resnet20-on-cifar10-compression.png")
        image = np.asarray(Image.open(path).convert("RGB"))
        image = image[: int(len(image) * 0.8)]  # without the legend

        def mean_row(color):
            return np.nonzero((image == color).all(axis=2))[0].mean()

        # by name: global-gradient blue, global-magnitude vermilion, layer-gradient green, layer-magnitude pink, random orange
        assert mean_row((0xD5, 0x5E, 0x00)) < mean_row((0x00, 0x72, 0xB2)) < mean_row((0xE6, 0x9F, 0x00))

    def test_without_latency_the_measured_side_says_so(self, tmp_path, written):
        content = result()
        content["recipe"]["method"] = "$weird_{name"  # which must not be taken for mathematics
        save(tmp_path / "runs" / "a", content)
        _, speedup = plots(Page(report([tmp_path / "runs"], tmp_path / "out").page.read_text()))  # and none of curves
        assert '"text":"latency was not measured"' in speedup
        assert all("latency was not measured" not in script for script in plots(Page(written.page.read_text())))


class Page(html.parser.HTMLParser):
    """Collects what a browser would see and fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.scripts, self.texts, self._in = [], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [(tag, name, value) for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        self._in = tag

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        (self.scripts if self._in == "script" else self.texts).append(data)


class TestPage:
    def test_it_needs_no_network(self, written):
        page = Page(written.page.read_text())
        assert page.links == []
        assert max(map(len, page.scripts)) > 1_000_000  # plotly.js itself
        assert len(plots(page)) == 3
        policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'")
        assert "http" not in policy
        styles = [text for text in page.texts if "font:" in text]
        assert styles
        assert "@import" not in styles[0]
        assert "url(" not in styles[0]

    def test_it_offers_no_upload(self, written):
        page = Page(written.page.read_text())
        assert len(plots(page)) == 3
        assert all('"showSendToCloud": false' in script for script in plots(page))

    def test_it_holds_the_table_and_every_method_can_be_filtered(self, written):
        page = Page(written.page.read_text())
        methods = ["global-gradient", "global-magnitude", "layer-gradient", "layer-magnitude", "random"]
        boxes = [a["value"] for tag, a in page.tags if tag == "input"]
        assert boxes == methods
        rows = [a.get("data-method") for tag, a in page.tags if tag == "tr" and "data-method" in a]
        assert rows == [method for method in methods for _ in range(3)]
        assert sum(tag == "tr" and a.get("class") == "dense" for tag, a in page.tags) == 1
        heads = [tag for tag, a in page.tags if tag == "th"]
        assert len(heads) == len(TITLES)
        orders = [a["data-order"] for tag, a in page.tags if tag == "td"]
        assert len(orders) == 16 * len(TITLES)
        assert not {"inf", "-inf", "nan"} & set(orders)

    def test_the_figures_hold_the_numbers(self, written):
        page = Page(written.page.read_text())
        first, second, third = map(data, plots(page))
        assert [trace["meta"] for trace in first] == [
            "global-gradient",
            "global-magnitude",
            "layer-gradient",
            "layer-magnitude",
            "random",
        ]
        magnitude = first[1]
        assert magnitude["x"] == [2, 4, 8]
        assert magnitude["y"] == pytest.approx([90.2, 88.2, 84.2])  # 92 - 1 / params + the mean of 0, 0.2, 0.4
        assert magnitude["error_y"]["array"] == pytest.approx([0.2] * 3)
        assert len(second) == 10  # theoretical and measured
        assert len(third) == 45 * 2  # accuracy and loss of every run
        assert third[0]["x"] == [1, 2, 3]
        assert third[0]["y"] == pytest.approx([60, 70, 80])

    def test_names_cannot_break_out_of_the_page(self, tmp_path):
        content = result()
        content["recipe"]["method"] = evil = "</script><img src=https://evil.example/x onerror=alert(1)>\"'"
        content["task"] = evil
        save(tmp_path / "runs" / "a", content, curves())
        page = Page(report([tmp_path / "runs"], tmp_path / "out").page.read_text())
        assert page.links == []
        assert not [tag for tag, _ in page.tags if tag == "img"]
        assert [a["value"] for tag, a in page.tags if tag == "input"] == [evil]


def plots(page):
    """Returns the scripts that draw figures."""
    return [script for script in page.scripts if "Plotly.newPlot(" in script and len(script) < 1_000_000]


def data(script):
    """Returns the traces a script plots."""
    start = script.index("[", script.index("Plotly.newPlot("))
    return json.JSONDecoder().raw_decode(script[start:])[0]


def test_real_runs_end_in_the_tables_as_they_were_measured(tmp_path):
    """Two real runs on digits that differ in their seed."""
    recipe = {
        "model": "lenet-300-100",
        "method": "global-magnitude",
        "prune": {"density": 0.2},
        "dense": {"epochs": 2, "lr": 0.1},
        "train": {"epochs": 1, "lr": 0.05},
        "measure": {"latency": False},
    }
    found = [execute(resolve({**recipe, "seed": seed}), tmp_path / "runs" / str(seed)) for seed in (0, 1)]
    written = report([tmp_path / "runs"], tmp_path / "out")
    assert written.records == 2
    assert written.left_out == ()
    dense, row = table_of(written.tables.read_text())
    for shown, moment in ((dense, "dense"), (row, "pruned")):
        accuracies = [100 * one[moment]["metrics"]["accuracy"] for one in found]
        assert shown["accuracy, %, after"] == f"{statistics.fmean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}"
    assert row["kept (asked)"] == "density 0.2"
    assert row["theoretical speed-up"] == f"{statistics.fmean(one['pruned']['macs']['speedup'] for one in found):.2f}x"
    assert row["bytes, zipped"] == f"{statistics.fmean(one['pruned']['bytes']['zipped'] for one in found):,.0f}"
    assert row["measured speed-up"] == "not measured"
    (first, _) = collect([tmp_path / "runs"])
    assert set(first.curves) == {"dense", "train"}
    assert len(first.curves["dense"]["epoch"]) == 2


def searched(method, density, seed=0):
    """Returns the result of a run whose method learned its masks."""
    history = [
        {"step": 10 * i, "histogram": [5 + 10 * i, *[0] * 18, 95 - 10 * i], "undecided": 100 - 10 * i, "temperature": 10.0**-i}
        for i in range(5)
    ]
    freeze = {"step": 50, "units": 100, "kept": 30, "undecided": 2, "largest": 0.5, "mean": 0.012}
    freeze |= {"soft": {"accuracy": 0.8125}, "hard": {"accuracy": 0.75 + 0.01 * seed}}
    layers = {f"layer{i}.weight": density * (1 + i / 10) for i in range(5)}
    made = result(method, seed=seed, accuracy=0.8)
    return {**made, "densities": layers, "search": {"freeze": freeze, "history": history, "densities": layers}}


@pytest.fixture(scope="module")
def searches(tmp_path_factory):
    root = tmp_path_factory.mktemp("searched") / "runs"
    for method in ("smart", "pdp"):
        for seed in (0, 1):
            save(root / f"{method}-{seed}", searched(method, 0.3, seed))
    save(root / "plain", result("random", accuracy=0.5))
    return root


class TestSearches:
    def test_the_freeze_is_told_by_the_mean_over_seeds(self, searches):
        found = read_results([searches])
        text = markdown(found, groups(found.records), []).partition("The freeze")[2]
        rows = {row["method"]: row for row in table_of("|" + text.partition("|")[2].partition("## Made")[0])}
        assert set(rows) == {"pdp", "smart"}
        expected = ["100", "2.0", "0.012", "81.25 %", "75.50 %"]
        assert [rows["smart"][title] for title in list(rows["smart"])[3:]] == expected

    def test_searches_and_layers_are_drawn(self, searches, tmp_path):
        made = report([searches], tmp_path)
        names = {figure.name.rpartition("-")[2] for figure in made.figures}
        assert {"layers.png", "layers.svg", "search.png", "search.svg"} <= names
        for figure in made.figures:
            if figure.suffix == ".png":
                picture = Image.open(figure).convert("RGB")
                assert len(picture.getcolors(picture.width * picture.height)) > 50
        text = made.tables.read_text()
        assert "![density of each layer]" in text
        assert "![masks and temperature over the search]" in text
        again = report([searches], tmp_path / "again")
        assert [a.read_bytes() for a in made.figures] == [b.read_bytes() for b in again.figures]

    def test_an_export_keeps_the_search(self, searches, tmp_path):
        records = collect([searches])
        kept = collect([export(records, tmp_path / "all.json")])
        assert [r.observations["search"] for r in kept if r.observations] == [
            r.observations["search"] for r in records if r.observations
        ]
        assert [r.densities for r in kept] == [r.densities for r in records]

    def test_without_a_search_there_are_no_such_figures(self, runs, written):
        assert not any("search" in figure.name or "layers" in figure.name for figure in written.figures)
        assert "The freeze" not in written.tables.read_text()


def gated(mode="decoupled", *, honest=0.5, seed=0, accuracy=0.9, flops=0.5, **prune):
    """Returns the result of a run with gates; ``honest`` is the fraction of the operations that it computes."""
    made = result("ftwt", seed=seed, accuracy=accuracy, before=None, prune={"flops": flops, "mode": mode, **prune})

    def spread(mean):
        return {"mean": mean, "std": 0.01, "min": mean - 0.05, "max": mean + 0.1}

    layers = [
        {"layer": f"conv{i}", "filters": 16, "kept": 0.5 + i / 10, "core": 4 + i, "dead": 1, "std": 0.1, "macs": 0.3,
         "diversity": 0.4, "within": 0.9, "across": None, "accuracy": 0.8, "precision": 0.7, "recall": 0.6}
        for i in range(4)
    ]  # fmt: skip
    routes = {"inputs": 10_000, "dense": 4000, "heads": 40, "honest": spread(honest), "paper": spread(honest - 0.1)}
    routes |= {"agreement": {"accuracy": 0.8, "precision": 0.75, "recall": 0.85}, "routes": 1234, "signatures": 99}
    estimate = {"r": 0.8125, "honest": 0.48, "paper": 0.4, "kept": dict.fromkeys("abcd", 0.5), "images": 2048}
    return {**made, "asked": {"density": None, "params": None}, "estimate": estimate, "routes": {**routes, "layers": layers}}


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    """Two modes, two budgets, two seeds; one of another rule; one static run at half of the operations."""
    root = tmp_path_factory.mktemp("dynamic") / "runs"
    for mode in ("decoupled", "joint"):
        for flops in (0.5, 0.3):
            for seed in (0, 1):
                accuracy = 0.9 + 0.01 * seed - (0.02 if mode == "joint" else 0) - (0.03 if flops < 0.5 else 0)
                content = gated(mode, honest=flops + 0.02 * seed, flops=flops, seed=seed, accuracy=accuracy)
                save(root / f"{mode}-{flops}-{seed}", content)
    save(root / "cover", gated(rule="cover_ge"))
    static = result("channels", accuracy=0.88, before=None, prune={"flops": 0.5})
    static["asked"] = {"density": None, "params": None, "flops": 0.5, "ms": None}
    static["pruned"]["macs"] |= {"total": 2000, "effective": 2000.0, "speedup": 1.0}
    save(root / "static", static)
    return root


@pytest.fixture(scope="module")
def dynamic_report(dynamic, tmp_path_factory):
    return report([dynamic], tmp_path_factory.mktemp("dynamic-report"))


def test_dynamic_runs_stand_beside_static_masks_at_their_gates(tmp_path):
    """The difference in pairs of one seed; another budget, other places or a seed alone has no pair."""
    root = tmp_path / "runs"
    for seed, static, joint in ((0, 0.80, 0.83), (1, 0.82, 0.84), (2, None, 0.99)):
        if static:
            save(root / f"static-{seed}", gated("static", seed=seed, accuracy=static))
        save(root / f"joint-{seed}", gated("joint", seed=seed, accuracy=joint))
    save(root / "first", gated("joint", gates="first"))
    save(root / "tight", gated("joint", flops=0.3))
    tables = report([root], tmp_path / "report").tables.read_text()
    rows = table_of("|" + tables.partition("Over static:")[2].partition("|")[2].partition("## Made")[0])
    column = {(r["method"], r["asked"], r["n"]): r["over static at the gates, points"] for r in rows}
    assert column == {
        ("ftwt static", "flops 0.5", "2"): "",
        ("ftwt joint", "flops 0.5", "3"): "+2.50 ± 0.71",
        ("ftwt joint", "flops 0.5", "1"): "",
        ("ftwt joint", "flops 0.3", "1"): "",
    }


class TestDynamic:
    def rows(self, text):
        return table_of(
            "|" + text.partition("Gates choose the computation for each input")[2].partition("|")[2].partition("## Made")[0]
        )

    def test_a_row_by_hand(self, dynamic_report):
        rows = self.rows(dynamic_report.tables.read_text())
        assert list(rows[0].items()) == [
            ("method", "ftwt decoupled"),
            ("rule", "prefix_le"),
            ("asked", "flops 0.5"),
            ("n", "2"),
            ("r", "0.8125"),
            ("predicted (honest), %", "48.00 ± 0.00"),
            ("computed (honest), %", "51.00 ± 1.41"),  # 50 and 52: deviations 1 and 1, root of 2
            ("± over inputs", "1.00"),
            ("least to most, %", "45.0 to 62.0"),
            ("predicted (paper), %", "40.00 ± 0.00"),
            ("computed (paper), %", "41.00 ± 1.41"),
            ("accuracy, %", "90.50 ± 0.71"),
            ("precision, %", "75.00 ± 0.00"),
            ("recall, %", "85.00 ± 0.00"),
            ("routes", "1,234 of 10,000"),
        ]

    def test_modes_and_rules_have_rows_of_their_own(self, dynamic_report, dynamic):
        rows = self.rows(dynamic_report.tables.read_text())
        assert [(row["method"], row["rule"], row["asked"]) for row in rows] == [
            ("ftwt decoupled", "prefix_le", "flops 0.5"),
            ("ftwt decoupled", "prefix_le", "flops 0.3"),
            ("ftwt decoupled cover_ge", "cover_ge", "flops 0.5"),
            ("ftwt joint", "prefix_le", "flops 0.5"),
            ("ftwt joint", "prefix_le", "flops 0.3"),
        ]
        (group,) = groups(collect([dynamic]))
        assert {row.method for row in group.rows} == {row["method"] for row in rows} | {"channels"}

    @pytest.mark.parametrize(
        ("prune", "asked"),
        [
            ({"flops": None, "r": 0.9}, "r 0.9"),
            ({"count": "paper"}, "flops 0.5 by the paper count"),
            ({"flops": None, "r": {"a": 0.5, "b": 0.75}}, "r by layer, mean 0.625 (plan "),
        ],
    )
    def test_budgets_are_named(self, tmp_path, prune, asked):
        save(tmp_path / "a", gated(**prune))
        save(tmp_path / "b", gated(**{"flops": None, "r": {"a": 0.75, "b": 0.5}}))
        (group,) = groups(collect([tmp_path]))
        assert len(group.rows) == 2
        assert [row.settings for row in group.rows] == ["", ""]
        assert any(row.asked.startswith(asked) for row in group.rows)

    def test_the_main_table_counts_what_gates_compute(self, dynamic_report):
        rows = table_of(dynamic_report.tables.read_text().partition("Gates choose")[0])
        row = next(row for row in rows if row["method"] == "ftwt decoupled" and row["kept (asked)"] == "flops 0.5")
        assert row["theoretical speed-up"] == f"{(1 / 0.5 + 1 / 0.52) / 2:.2f}x"
        assert row["compression"] == "2.00x"  # of the made-up result, as for any other

    def test_the_figure_has_dynamic_and_static_lines_with_bars_over_seeds(self, dynamic):
        (group,) = groups(collect([dynamic]))
        lines = lines_of(group)
        assert list(lines) == ["channels channel uniform", "ftwt decoupled", "ftwt decoupled cover_ge", "ftwt joint"]
        assert [x.mean for x, _, _ in lines["ftwt joint"]] == pytest.approx([0.49, 0.69])
        assert [y.mean for _, y, _ in lines["ftwt joint"]] == pytest.approx([0.885, 0.855])
        assert [(x.mean, y.mean) for x, y, _ in lines["channels channel uniform"]] == [(0.5, 0.88)]
        (axes,) = printed(savings_chart(group)).axes
        drawn = {bars.get_label(): bars for bars in axes.containers}
        data, _, bars = drawn["ftwt joint"].lines
        assert data.get_xdata() == pytest.approx([49, 69])
        assert data.get_ydata() == pytest.approx([88.5, 85.5])
        assert len(bars) == 2  # across and up
        up = bars[1].get_segments()[0]
        assert up[1][1] - up[0][1] == pytest.approx(2 * 100 * statistics.stdev([0.88, 0.89]))
        assert data.get_linestyle() == "-"
        assert drawn["channels channel uniform"].lines[0].get_linestyle() == "--"
        assert len(drawn["channels channel uniform"].lines[2]) == 0  # one seed has no deviation
        assert [line.get_ydata()[0] for line in axes.lines if line.get_label() == "dense"] == [92]

    def test_layers_are_drawn_as_means_over_seeds(self, dynamic):
        (group,) = groups(collect([dynamic]))
        first, second = printed(gates_chart(group)).axes
        assert (first.get_title(), second.get_title()) == ("flops 0.5", "flops 0.3")
        lines = {line.get_label(): line.get_ydata() for line in second.lines}
        assert lines["ftwt joint: kept"] == pytest.approx([0.5, 0.6, 0.7, 0.8])
        assert lines["ftwt joint: core"] == pytest.approx([4 / 16, 5 / 16, 6 / 16, 7 / 16])

    def test_pictures_and_page(self, dynamic, dynamic_report, tmp_path):
        names = {figure.name.removeprefix("resnet20-on-cifar10-") for figure in dynamic_report.figures}
        assert {"flops.png", "flops.svg", "gates.png", "gates.svg"} <= names
        text = dynamic_report.tables.read_text()
        assert "(figures/resnet20-on-cifar10-flops.png)" in text
        page = Page(dynamic_report.page.read_text())
        traces = next(found for found in map(data, plots(page)) if any(trace["name"] == "ftwt joint" for trace in found)
                      and "error_x" in found[0])  # fmt: skip
        joint = next(trace for trace in traces if trace["name"] == "ftwt joint")
        assert joint["x"] == pytest.approx([49, 69])
        assert joint["error_y"]["array"] == pytest.approx([100 * statistics.stdev([0, 0.01])] * 2)
        rows = [a["data-method"] for tag, a in page.tags if tag == "tr" and "data-method" in a]
        assert rows.count("ftwt joint") == 2 * 2  # in both tables
        assert "computed (honest), %" in page.texts
        again = report([dynamic], tmp_path)
        assert [one.read_bytes() for one in again.figures] == [one.read_bytes() for one in dynamic_report.figures]

    def test_an_export_keeps_what_the_tables_and_figures_need_and_no_more(self, dynamic, dynamic_report, tmp_path):
        records = collect([dynamic])
        path = export(records, tmp_path / "all.json")
        again = collect([path])
        assert [one.observations for one in again] == [one.observations for one in records]
        assert sum({"routes", "estimate"} <= set(one.observations) for one in again) == 9
        for word in ('"within"', '"dead"', '"diversity"', '"heads"', '"dense": 4000'):
            assert word not in path.read_text()
        made = report([path], tmp_path / "again")
        parts = [one.tables.read_text().partition("## Made from")[0] for one in (made, dynamic_report)]
        assert parts[0] == parts[1]

    def test_without_gates_there_is_nothing_of_them(self, written):
        assert "Gates choose" not in written.tables.read_text()
        assert not any(figure.stem.endswith(("flops", "gates")) for figure in written.figures)

    def test_damaged_routes_are_named(self, tmp_path):
        content = gated()
        del content["routes"]["honest"]["mean"]
        save(tmp_path / "a", content)
        content = gated(seed=1)
        content["recipe"]["prune"]["flops"] = None
        save(tmp_path / "b", content)
        reasons = read_results([tmp_path]).left_out
        assert "routes.honest.mean is missing" in reasons[0]
        assert "neither flops nor r" in reasons[1]

    def test_a_real_run_ends_in_the_table_as_it_was_measured(self, tmp_path):
        recipe = {
            "model": "resnet8",
            "data": "digits",
            "method": "ftwt",
            "prune": {"r": 0.8, "mode": "random", "layers": ["layer3.*"]},
            "dense": {"epochs": 0},
            "train": {"epochs": 0},
            "measure": {"latency": False},
        }
        found = execute(resolve(recipe), tmp_path / "runs" / "a")
        (row,) = self.rows(report([tmp_path / "runs"], tmp_path / "out").tables.read_text())
        assert (row["method"], row["asked"], row["r"]) == ("ftwt random", "r 0.8", "0.8000")
        assert row["computed (honest), %"] == f"{100 * found['routes']['honest']['mean']:.2f}"
        assert row["predicted (paper), %"] == f"{100 * found['estimate']['paper']:.2f}"
        assert row["routes"] == f"{found['routes']['routes']:,} of {found['routes']['inputs']:,}"


def test_results_kept_in_the_repository_are_still_read():
    kept = sorted((Path(__file__).parents[2] / "results").glob("*.json"))
    assert kept
    found = read_results(kept)
    assert found.left_out == ()
    assert len(found.records) == sum(len(json.loads(path.read_text())) for path in kept)
