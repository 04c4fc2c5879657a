"""The sentence at the top of the page and its bars of bytes, from committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

from microglia.report.opening import byte_bars, opening
from microglia.report.rows import Group, groups
from microglia.report.write import collect

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def group() -> Group:
    (found,) = groups(collect([ROOT / "results" / "shrinkbench_resnet20.json"]))
    return found


def test_the_sentence_names_the_nearest_and_the_smallest_and_the_fastest(group: Group) -> None:
    said = opening(group)
    assert said.startswith("resnet20 on cifar10: the dense model has 91.73 % accuracy; ")
    nearest = min(group.rows, key=lambda row: abs(row.change.mean))
    assert f"{nearest.line} at {nearest.asked} stays nearest to it with {100 * nearest.after.mean:.2f}" in said
    smallest = min(group.rows, key=lambda row: row.zipped)
    assert f"{smallest.line} at {smallest.asked} has the smallest zipped file" in said
    timed = [row for row in group.rows if row.speedup is not None]
    assert ("is fastest" in said) == bool(timed)
    assert ("no time was measured" in said) == (not timed)
    assert said.count(". ") == 0
    assert said.endswith(".")


def test_the_longest_bar_is_the_whole_width_and_others_are_in_proportion(group: Group) -> None:
    bars = byte_bars(group)
    assert len(bars) == len(group.baselines) + len(group.rows)
    assert max(bar.share for bar in bars) == 100
    assert [bar.method for bar in bars[: len(group.baselines)]] == [""] * len(group.baselines)
    first = group.baselines[0].zipped
    largest = max(row.zipped for row in (*group.baselines, *group.rows))
    assert bars[0].share == pytest.approx(100 * first / largest, abs=0.01)
    assert bars[0].text == f"{first:,.0f}"


def test_a_model_that_is_slower_is_not_called_fastest() -> None:
    (found,) = groups(collect([ROOT / "results" / "resnet20_magnitude.json"]))
    assert "is not faster than dense but the best of the timed ones, 0.87x by the clock" in opening(found)
