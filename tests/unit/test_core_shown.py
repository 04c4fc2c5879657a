"""How values show themselves: short in a terminal, a table in a notebook, and no text that a name could break out of."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.core.masks import MaskSet
from microglia.core.shown import LIMIT, html_table
from microglia.core.timing import Timing
from microglia.lab.recipe import resolve
from microglia.lab.result import Result
from microglia.measure import LatencyReport
from microglia.runtime.report import AccelerationReport, LayerChoice

LONGEST = 220


@pytest.fixture(scope="module")
def values() -> dict[str, object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)).eval()
    x = torch.randn(1, 3, 8, 8)
    small = mg.prune_channels(model, x, mg.Budget(density=0.5), round_to=1)
    pruner = mg.methods.OneShot(masked := copy.deepcopy(model), density=0.5)
    pruner.finish()
    times = LatencyReport(
        {"model": {"eager": Timing(2.0, 1.9, 2.1, 5), "packed": Timing(1.0, 0.9, 1.1, 5)}}, "a CPU", 1, 1, "2"
    )
    measured = mg.measure(masked, x, latency=False)
    layer = LayerChoice("0", "conv2d", (8, 3, 3, 3), 0.5, "block 16x1", {"dense": 2.0, "block 16x1": 1.0}, "faster")
    report = AccelerationReport((layer,), {"eager": 4.0, "sparse": 2.0}, "sparse", "eager", "avx2", 1)
    return {
        "plan": mg.graph.plan_of(small),
        "masks": mg.masks_of(masked),
        "measurement": measured,
        "latency": times,
        "acceleration": report,
    }


NAMES = ("plan", "masks", "measurement", "latency", "acceleration")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_one_short_line_and_one_table(values: dict[str, object], name: str) -> None:
    text = repr(values[name])
    assert "\n" not in text
    assert len(text) < LONGEST
    assert text.startswith(type(values[name]).__name__ + "(")
    shown = values[name]._repr_html_()  # type: ignore[attr-defined]
    assert shown.count("<table>") == shown.count("</table>") >= 1
    assert "<script" not in shown
    assert shown.count("<tr>") >= 2


def test_the_lines_hold_the_numbers(values: dict[str, object]) -> None:
    assert repr(values["latency"]) == "LatencyReport(model 1 ms (packed); batch 1, 1 thread(s), a CPU)"
    assert "sparse 2 ms, 2.00x eager" in repr(values["acceleration"])
    plan = values["plan"]
    assert f"{plan.parameters[0]:,} to {plan.parameters[1]:,} parameters" in repr(plan)  # type: ignore[attr-defined]
    measured = values["measurement"]
    assert f"{measured.parameters.all:,} parameters, density 0.5" in repr(measured)  # type: ignore[attr-defined]
    assert "652 of 1,304 kept" in values["masks"]._repr_html_()  # type: ignore[attr-defined]


def test_a_result_of_a_run_is_short_and_still_the_whole_dict() -> None:
    short = {"epochs": 1, "max_batches": 2}
    asked = {"model": "lenet-300-100", "data": "digits", "prune": {"density": 0.5}, "dense": short, "train": short}
    made = mg.execute(resolve({**asked, "measure": {"latency": False}}))
    assert isinstance(made, Result)
    assert len(repr(made)) < LONGEST
    assert re.match(r"Result\(lenet-300-100 on \w+, accuracy 0\.\d+ dense, 0\.\d+ pruned, density 0\.5", repr(made))
    assert made._repr_html_().count("<tr>") >= 3
    assert made["pruned"]["parameters"]["density"] == made.pruned.parameters.density


def test_names_cannot_break_out_and_long_tables_end() -> None:
    evil = "<img src=x onerror=alert(1)>"
    shown = html_table(evil, [evil], [[evil]] * (LIMIT + 5), [evil])
    assert "<img" not in shown
    assert shown.count("<td") == LIMIT
    assert "and 5 more" in shown
    assert "MaskSet(no layers)" in MaskSet({})._repr_html_()


def test_numbers_are_read_easily() -> None:
    assert ">1,234,567<" in html_table("t", ["n"], [[1234567]])
    assert ">0.3333<" in html_table("t", ["n"], [[1 / 3]])
    assert ">True<" in html_table("t", ["n"], [[True]])
    assert "><" in html_table("t", ["n"], [[None]])
