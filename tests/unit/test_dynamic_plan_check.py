"""Plans of gates from a file: types, ranges and the shapes of the weights are looked at before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microglia as mg
from microglia.core.errors import FileError, MicrogliaError
from microglia.dynamic import GatePlan, Site, attach_gates, gates_of
from microglia.storage import archive

SITES = (Site("0", "1", "relu", 3, 6), Site("3", "3", "relu", 6, 4))
PLAN = GatePlan(SITES, keep={"3": 2}).with_r(0.8)


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)
    ).eval()


def gated() -> nn.Module:
    return attach_gates(plain(), PLAN, torch.Generator().manual_seed(0))


def values() -> dict[str, Any]:
    return json.loads(json.dumps(PLAN.to_dict()))  # type: ignore[no-any-return]


WRONG_SITES = {"layer": 3, "carrier": None, "activation": ["relu"], "inputs": True, "outputs": 6.0}
WRONG = {
    **{f"a site's {name}": {"sites": [{**values()["sites"][0], name: value}]} for name, value in WRONG_SITES.items()},
    "no inputs": {"sites": [{**values()["sites"][0], "inputs": 0}]},
    "more outputs than any layer has": {"sites": [{**values()["sites"][0], "outputs": 10**30}]},
    "a site's unknown field": {"sites": [{**values()["sites"][0], "more": 1}]},
    "a layer twice": {"sites": [values()["sites"][0]] * 2},
    "a carrier twice": {"sites": [values()["sites"][0], {**values()["sites"][1], "carrier": "1"}], "keep": {}},
    "softmax as a number": {"softmax": 1},
    "softmax as text": {"softmax": "no"},
    "pool as a list": {"pool": ["avg"]},
    "r as a boolean": {"r": {"0": True}},
    "r not a number": {"r": {"0": float("nan")}},
    "r of a layer without a gate": {"r": {"6": 0.5}},
    "keep as a fraction": {"keep": {"3": 1.5}},
    "keep as a boolean": {"keep": {"3": True}},
    "keep more than there are": {"keep": {"3": 5}},
    "keep of a layer without a gate": {"keep": {"6": 1}},
}


@pytest.mark.parametrize("case", WRONG)
def test_types_and_ranges(case: str) -> None:
    assert GatePlan.from_dict(values()) == PLAN
    with pytest.raises(FileError, match=r"^The plan of the gates is damaged: .*\.$"):
        GatePlan.from_dict({**values(), **WRONG[case]})


STATES: dict[str, dict[str, Tensor]] = {
    "no head": {},
    "a head of another layer": {"1.gate.weight": torch.zeros(6, 4), "1.gate.bias": torch.zeros(6)},
    "a bias of another size": {"1.gate.weight": torch.zeros(6, 3), "1.gate.bias": torch.zeros(5)},
}


@pytest.mark.parametrize("case", STATES)
def test_shapes_of_the_weights(case: str) -> None:
    state = gated().state_dict()
    assert GatePlan.from_dict(values(), state) == PLAN
    damaged = {name: value for name, value in state.items() if not name.startswith("1.gate")} | STATES[case]
    with pytest.raises(FileError, match="of the gate of '0' should have shape"):
        GatePlan.from_dict(values(), damaged)


def test_nothing_is_built_for_a_plan_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mg.save(gated(), tmp_path)
    assert mg.load(tmp_path, plain()).state_dict().keys() == gated().state_dict().keys()
    state = {**gated().state_dict(), "1.gate.weight": torch.zeros(1, 1)}
    plan = json.loads((tmp_path / "plan.json").read_text())
    mark = archive.write_tensors(tmp_path / archive.WEIGHTS, state, kind="weights", document=archive._mark(plan))
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "digest": mark}))
    monkeypatch.setattr(archive, "_build", lambda *args: pytest.fail("it was built"))
    with pytest.raises(FileError, match="should have shape"):
        mg.load(tmp_path)


OTHER: dict[str, Site] = {
    "another size": Site("0", "1", "relu", 3, 7),
    "other inputs": Site("3", "3", "relu", 3, 4),
    "no convolution": Site("6", "6", "relu", 4, 2),
    "masked by an activation": Site("0", "2", "relu", 3, 6),
    "masked by another convolution": Site("0", "3", "relu", 3, 6),
    "the whole model": Site("", "", "relu", 3, 6),
}


@pytest.mark.parametrize("case", OTHER)
def test_gates_hang_on_convolutions_of_their_size_alone(case: str) -> None:
    model = plain()
    with pytest.raises(MicrogliaError, match="The gates belong to another model"):
        attach_gates(model, GatePlan((SITES[1], OTHER[case]) if case != "other inputs" else (OTHER[case],)))
    assert not gates_of(model)
