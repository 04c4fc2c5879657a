"""Curves of the trainings: the loss of every epoch, the validation of those that were evaluated."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from test_report import result, save

from microglia.report.rows import groups
from microglia.report.sections.overview import NONE, curves_chart
from microglia.report.write import collect


def rows(epochs: int, every: int) -> str:
    """Returns what a training logs that is evaluated every so many epochs; none with 0."""
    found = []
    for epoch in range(1, epochs + 1):
        seen = {"validation_accuracy": 0.1 * epoch} if every and epoch % every == 0 else {}
        found.append(json.dumps({"stage": "train", "epoch": epoch, "loss": 1 / epoch, "lr": 0.1, **seen}))
    return "\n".join(found) + "\n"


def test_epochs_without_validation_are_in_the_curve_of_the_loss(tmp_path: Path) -> None:
    save(tmp_path / "a", result(), rows(6, every=3))
    found = collect([tmp_path])
    stage = found[0].curves["train"]
    assert stage["epoch"] == [1, 2, 3, 4, 5, 6]
    assert [epoch for epoch, value in zip(stage["epoch"], stage["validation"], strict=True) if not math.isnan(value)] == [3, 6]
    above, below = curves_chart(groups(found)[0]).panels
    assert list(above.lines[0].x) == [3, 6]
    assert list(above.lines[0].y) == pytest.approx([30, 60])
    assert list(below.lines[0].x) == [1, 2, 3, 4, 5, 6]
    assert list(below.lines[0].y) == pytest.approx([1 / epoch for epoch in range(1, 7)], rel=1e-5)


def test_a_training_that_was_never_evaluated_says_so(tmp_path: Path) -> None:
    save(tmp_path / "a", result(), rows(2, every=0))
    above, below = curves_chart(groups(collect([tmp_path]))[0]).panels
    assert (list(above.lines), above.empty) == ([], NONE)
    assert list(below.lines[0].x) == [1, 2]
