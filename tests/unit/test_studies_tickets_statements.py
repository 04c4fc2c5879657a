"""What the ticket papers say holds here only outside one pooled standard error; the table says where its accuracy is."""

from __future__ import annotations

import math
from typing import Any

import pytest

from microglia.studies.result import decode
from microglia.studies.tickets.result import TicketSearch
from microglia.studies.tickets.statements import statements
from microglia.studies.tickets.study import arm_table, statement_table

SAID = "Tickets at 21 % beat other initial weights."
FASTER = "Tickets at 21 % learn faster than other initial weights."


def arm(
    name: str, accuracy: float, std: float | None, n: int, step: float = 100.0, spread: float | None = 1.0
) -> dict[str, Any]:
    accuracies, steps = {"mean": accuracy, "std": std}, {"mean": step, "std": spread}
    return {"arm": name, "level": 7, "density": 0.21, "n": n, "accuracy": accuracies, "early_stop": steps}


def search(statements: list[Any], summary: Any = (), rows: Any = ()) -> TicketSearch:
    content = {"task": "digits", "headline": "accuracy", "recipe": {}, "rows": list(rows), "statements": statements}
    return decode(TicketSearch, {**content, "summary": [{"early_stop_accuracy": row["accuracy"], **row} for row in summary]})


def judged(text: str, *arms: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in statements(arms) if row["text"] == text)


@pytest.mark.parametrize(("gain", "holds"), [(0.0024, False), (0.0026, True), (-0.0026, False)])
def test_the_gain_is_more_than_the_pooled_standard_error(gain: float, holds: bool) -> None:
    """s^2 = (2 * 0.003^2 + 1 * 0.002^2) / 3 = 7.333e-6; s sqrt(1/3 + 1/2) = 0.002472."""
    error = math.sqrt((2 * 0.003**2 + 1 * 0.002**2) / 3 * (1 / 3 + 1 / 2))
    assert error == pytest.approx(0.002472, abs=1e-6)
    found = judged(SAID, arm("iterative", 0.9 + gain, 0.003, 3), arm("reinit", 0.9, 0.002, 2))
    assert found["holds"] is holds
    assert "standard error 0.25" in found["found"]
    assert f"at {int(holds)} of 1 levels" in found["found"]


@pytest.mark.parametrize(("step", "holds"), [(98.0, False), (96.0, True), (104.0, False)])
def test_fewer_steps_are_better_by_the_same_rule(step: float, holds: bool) -> None:
    """Deviations 3 and 3 of 2 and 2 runs: 3 sqrt(1/2 + 1/2) = 3."""
    arms = arm("iterative", 0.9, 0.1, 2, step, 3.0), arm("reinit", 0.9, 0.1, 2, 100.0, 3.0)
    assert judged(FASTER, *arms)["holds"] is holds


def test_one_run_of_each_arm_tells_nothing() -> None:
    found = judged(SAID, arm("iterative", 0.99, None, 1, spread=None), arm("reinit", 0.9, None, 1, spread=None))
    assert found["holds"] is None
    assert "no standard error" in found["found"]
    cells = list(statement_table(search([found])).columns[1].cells)
    assert cells == ["cannot be told"]
    assert list(statement_table(search([judged(SAID)])).columns[1].cells) == ["no such level"]


def test_the_table_says_at_which_step_its_accuracy_is() -> None:
    row = {"seed": 0, "arm": "iterative", "draw": 0, "level": 7, "kept": 9, "density": 0.21, "test": {}, "train": {}}
    row |= {"early_stop": None}
    found = search([], [arm("iterative", 0.9, 0.1, 2)], [{**row, "end": 5000}, {**row, "end": 5000}])
    title = str(arm_table(found).title)
    assert "at the end, step 5,000" in title
    assert "at the end of training" in str(arm_table(search([], [arm("iterative", 0.9, 0.1, 2)], [row])).title)
