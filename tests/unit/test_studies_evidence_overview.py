"""The overview of the evidence from made-up results: verdicts, tables, the queue, and the shipped statements."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from microglia.cli.evidence import STATEMENTS
from microglia.lab.recipe import RecipeError, as_dict
from microglia.studies.evidence.files import read_queue
from microglia.studies.evidence.ledger import Entry, Ledger
from microglia.studies.evidence.overview import overview
from microglia.studies.evidence.plan import Planner
from microglia.studies.evidence.statements import Difference, Statement, cells_of, outcome_of, read_statements

ROOT = Path(__file__).parents[2]
STUDY = {
    "title": "Toys",
    "seconds_per_epoch": 3600,
    "base": {"model": "lenet-300-100", "data": "digits", "device": "cpu", "train": {"epochs": 4}},
    "rows": {
        "best": {"set": {"method": "magnitude"}},
        "good": {"set": {"method": "gradient"}},
        "dense": {"set": {"method": "magnitude", "prune.density": 1.0}, "grid": {}, "control": True},
    },
    "grid": {"prune.density": [0.5, 0.2]},
}
ACCURACY = {  # row, density -> accuracy of seeds 0, 1, 2
    ("best", 0.5): (0.90, 0.80, 0.70),
    ("good", 0.5): (0.88, 0.79, 0.69),
    ("best", 0.2): (0.60, 0.50, 0.40),
    ("good", 0.2): (0.50, 0.60, 0.38),
    ("dense", None): (0.95, 0.85, 0.75),
}


def observed(accuracy):
    return {
        "metrics": {"accuracy": accuracy},
        "parameters": {"all": 100, "compression": 2.0, "density": 0.5, "kept": 50, "prunable": 100},
        "macs": {"effective": 250.0, "speedup": 4.0, "total": 1000},
        "bytes": {"raw": 400, "zipped": 200},
    }


def record(job, accuracy):
    environment = {"microglia": "0", "torch": "2", "python": "3", "platform": "p", "processor": "p", "threads": 1}
    return {
        "recipe": as_dict(job.recipe),
        "environment": environment,
        "task": "lenet-300-100 on digits",
        "headline": "accuracy",
        "units": {"accuracy": "%"},
        "asked": {"density": None},
        "dense": observed(0.96),
        "pruned": observed(accuracy),
        "latency": None,
    }


@pytest.fixture
def toys(tmp_path):
    """A queue with results; a start of other bits belongs to seed 2 of the row good at 0.2."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "toys.yaml").write_text(yaml.safe_dump(STUDY))
    parts = [{"study": "one/toys", "worth": 1}]
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump({"results": "results", "parts": parts}))
    queue = read_queue(tmp_path / "queue.yaml")
    ledger = Ledger(queue.ledger)
    for job in Planner(queue, ledger).jobs():
        keys = {name: getattr(job, name) for name in ("identity", "study", "row", "values", "seed", "epochs")}
        entry = Entry(**keys, commit="c" * 40, seconds=1800.0, start=f"digest{job.seed}", value=0.9)
        if job.kind == "start":
            ledger.add_start(replace(entry, recipe=as_dict(job.recipe)))
            continue
        accuracy = ACCURACY[job.row, job.values.get("prune.density")][job.seed]
        other = job.row == "good" and job.values["prune.density"] == 0.2 and job.seed == 2
        ledger.add_cell(replace(entry, start="other" if other else entry.start), record(job, accuracy))
    return queue


def outcome(queue, density, **claim):
    statement = Statement(document="d", text="t", source="s", study="one/toys", **claim)
    return outcome_of(statement, cells_of(queue, Ledger.read(queue.ledger))["one/toys"], {"prune.density": density}, 100.0)


class TestVerdicts:
    def test_two_standard_errors_of_paired_differences(self):
        clear = Difference.of([0.02, 0.01, 0.01])
        assert (round(clear.mean, 4), round(clear.error, 4), clear.n) == (0.0133, 0.0033, 3)
        assert clear.sign == 1
        assert Difference.of([-0.02, -0.01, -0.01]).sign == -1
        assert Difference.of([0.02, 0.0, 0.0]).sign == 0  # 1 standard error
        assert Difference.of([0.02, 0.02]).sign == 0  # two pairs are too few
        assert Difference.of([0.0, 0.0, 0.0]).sign == 0
        assert math.isnan(Difference.of([]).mean)
        assert clear.told(100) == "+1.33 ± 0.33 (n = 3)"

    def test_a_winner_is_first_among_rows_that_are_no_controls(self, toys):
        found = outcome(toys, 0.5, first="best")
        assert (found.verdict, found.words) == ("holds", "best - good, the best of 1 others: +1.33 ± 0.33 (n = 3)")
        assert outcome(toys, 0.5, first="good").verdict == "does not hold"

    def test_runs_from_networks_with_other_bits_are_no_pair(self, toys):
        found = outcome(toys, 0.2, above=("best", "good"))
        assert found.words == "best - good: +0.00 ± 10.00 (n = 2)"
        assert found.verdict == "cannot be told"

    def test_a_row_without_the_grid_is_compared_at_each_point(self, toys):
        assert outcome(toys, 0.5, above=("dense", "best")).verdict == "holds"
        assert outcome(toys, 0.2, above=("best", "dense")).verdict == "does not hold"

    @pytest.mark.parametrize(("points", "verdict"), [(3.0, "holds"), (1.3, "cannot be told"), (0.5, "does not hold")])
    def test_no_cost_needs_a_bound_beyond_the_error(self, toys, points, verdict):
        assert outcome(toys, 0.5, costless=("best", "good"), points=points).verdict == verdict

    def test_a_gain_is_no_cost(self, toys):
        assert outcome(toys, 0.5, costless=("good", "best"), points=0.5).verdict == "holds"

    def test_a_lower_metric_may_be_better(self, toys):
        toys.studies["one/toys"] = replace(toys.studies["one/toys"], better="lower")
        assert outcome(toys, 0.5, first="best").verdict == "does not hold"


def write(toys, **statement):
    path = toys.path.parent / STATEMENTS
    full = {"document": "Paper", "text": "Best is best.", "source": "table 1", **statement}
    path.write_text(yaml.safe_dump({"statements": [full]}))
    return path


class TestPage:
    def test_statements_tables_queue_and_starts(self, toys):
        path = write(toys, study="one/toys", first="best", published="Big net: 77.5")
        ledger = Ledger.read(toys.ledger)
        page = overview(toys, ledger, read_statements(path, toys), ("results", "queue.yaml"))
        lines = page.splitlines()
        held = "| Best is best. (table 1) | Toys; density 0.5, 4 epochs | best - good, the best of 1 others: +1.33 ± 0.33"
        assert f"{held} (n = 3) | holds | Big net: 77.5 |" in lines
        assert any("density 0.2" in line and "cannot be told" in line for line in lines)
        row = "| best | density 0.5 | 3 | 80.00 ± 10.00 |  | 0.500 | 0.250 | 1.000 | not measured |  |"
        assert row in lines
        assert any(line.startswith("| good | density 0.5 | 3 | 78.67") and "-1.33 ± 0.33 (n = 3)" in line for line in lines)
        assert "2 comparisons are planned: 1 hold, 0 do not hold, 1 cannot be told, and 0 have not run." in lines
        assert "15 of 15 cells, at commit cccccccccccc." in page
        assert "| one/toys | 15 | 0 | 0 | 0 | 7.5 | 0.0 |" in lines
        assert any(line.startswith("| lenet-300-100 | 0 | 30 | 0.9000 | digest0 | cccccccccccc |") for line in lines)
        assert page == overview(toys, ledger, read_statements(path, toys), ("results", "queue.yaml"))

    def test_what_has_not_run_says_so(self, toys):
        path = write(toys, why="a large network", hours=40)
        empty = overview(toys, Ledger(toys.ledger), read_statements(path, toys), ("results", "queue.yaml"))
        assert "Nothing of it has run yet: 15 cells." in empty
        assert "| Best is best. | a large network | 40 |" in empty.splitlines()
        assert "None was trained yet." in empty
        # 15 cells of 4 epochs and 3 starts of 30, an hour an epoch, two side by side
        assert "0 of 15 cells are done, 15 left: 0.0 core hours spent, about 150.0 left, 75.0 hours with 2 processes." in empty

    def test_statements_without_a_pair_wait_below_the_outcomes(self, toys):
        path = write(toys, study="one/toys", first="best", published="Big net: 77.5")
        statements = read_statements(path, toys)
        lines = overview(toys, Ledger(toys.ledger), statements, ("results", "queue.yaml")).splitlines()
        assert "2 comparisons are planned: 0 hold, 0 do not hold, 0 cannot be told, and 2 have not run." in lines
        assert "| Best is best. (table 1) | Toys; density 0.5, 4 epochs; density 0.2, 4 epochs | Big net: 77.5 |" in lines
        assert not any("cannot be told |" in line for line in lines)

    def test_cells_of_several_commits_are_named(self, toys):
        file = toys.ledger / "one_toys.json"
        rows = json.loads(file.read_text())
        rows[0]["evidence"]["commit"] = "d" * 40
        file.write_text(json.dumps(rows))
        assert "at commit cccccccccccc, dddddddddddd. They are not of one commit" in overview(
            toys, Ledger.read(toys.ledger), [], ("results", "queue.yaml")
        )

    @pytest.mark.parametrize(
        ("rates", "told"),
        [((0.05, 0.1, 0.2), ""), ((0.1, 0.2, 0.4), " (least tried)"), ((0.02, 0.05, 0.1), " (most tried)"), ((0.1, 0.2), "")],
    )
    def test_a_setting_at_the_end_of_what_pilots_tried_is_marked(self, toys, rates, told):
        ledger = Ledger.read(toys.ledger)
        cell = next(entry for entry in ledger.cells.values() if entry.row == "good")
        recipe = ledger.records[cell.identity].recipe
        recipe["train"]["lr"] = 0.1
        for rate in rates:
            tried = {**recipe, "train": {**recipe["train"], "lr": rate}}
            ledger.add_pilot(replace(cell, identity=f"pilot {rate}", values={"train.lr": rate}, recipe=tried))
        page = overview(toys, ledger, [], ("results", "queue.yaml"))
        assert any(line.startswith("| good") and line.endswith(f"| train.lr 0.1{told} |") for line in page.splitlines())

    @pytest.mark.parametrize(
        ("statement", "text"),
        [
            ({"study": "one/toy", "first": "best"}, "names the study 'one/toy'"),
            ({"study": "one/toys", "first": "bets"}, "names the row 'bets'"),
            ({"study": "one/toys"}, "one of first, above and costless"),
            ({"first": "best"}, "one without a study has none"),
            ({"studdy": "one/toys"}, "no such field"),
        ],
    )
    def test_a_mistake_in_a_statement_is_named(self, toys, statement, text):
        with pytest.raises(RecipeError, match=text):
            read_statements(write(toys, **statement), toys)


def test_the_shipped_statements_name_rows_of_the_queue():
    queue = read_queue(ROOT / "recipes" / "evidence" / "queue.yaml")
    found = read_statements(ROOT / "recipes" / "evidence" / STATEMENTS, queue)
    assert {statement.document for statement in found} == {"SMART", "Survey", "FTWT"}
    assert {statement.study for statement in found if statement.study} == set(queue.studies)
    assert all(statement.why and statement.hours for statement in found if not statement.study)
