"""Results: typed fields and the dict of result.json are one object, and measure's own types are read back."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest
import torch

from microglia.lab.result import Observed, Result, read, written
from microglia.measure import measure, measure_latency
from microglia.methods import Initialization, Predicted, Routing, Search
from microglia.report.summary import result_table
from microglia.storage.observations import Observation, observations

RUNS = sorted((Path(__file__).parents[1] / "fixtures" / "0.1.0" / "runs").glob("*/result.json"))
KINDS = {"at_init": {Initialization}, "gated": {Routing, Predicted}, "searched": {Search}}


@pytest.fixture
def content():
    return json.loads(next(path for path in RUNS if path.parent.name == "masked").read_text())


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_fields_and_keys_tell_the_same(path):
    content = json.loads(path.read_text())
    result = Result.of(content)
    assert isinstance(result, dict)
    assert result == content
    assert json.dumps(result) == json.dumps(content)
    for name in ("dense", "pruned"):
        typed, stored = getattr(result, name), content[name]
        assert typed.metrics == stored["metrics"]
        assert typed.parameters.to_dict() == stored["parameters"]
        assert typed.bytes.to_dict() == stored["bytes"]
        assert typed.macs.to_dict() == stored["macs"]
    assert json.loads(json.dumps(result.latency.to_dict())) == content["latency"]
    assert {type(found) for found in result.observations.values()} == KINDS.get(path.parent.name, set())


def test_what_was_measured_is_read_back_as_the_same_values(content):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    example = torch.zeros(1, 8)
    measured = measure(model, example, latency=False)
    times = measure_latency({"dense": model, "pruned": model}, example, executions=("eager",), rounds=3, min_round_seconds=0)
    content["dense"] = {"metrics": {"accuracy": 0.5}, **measured.to_dict()}
    result = Result.of(json.loads(json.dumps({**content, "latency": times.to_dict()})))
    assert result.latency == times
    assert (result.dense.parameters, result.dense.bytes) == (measured.parameters, measured.bytes)
    assert (result.dense.macs.total, result.dense.macs.effective) == (measured.macs.total, measured.macs.effective)
    assert result.dense.macs.layers == measured.macs.layers


def test_sums_alone_are_read_too(content):
    result = Result.of(content)
    slim = written(result)
    assert "layers" not in slim["dense"]["parameters"]
    again = Result.of(slim)
    assert again.pruned.parameters.compression == result.pruned.parameters.compression
    assert again.pruned.macs.speedup == result.pruned.macs.speedup
    assert again.pruned.parameters.nonzero_all is None


def test_fields_cannot_be_set_and_copies_are_whole(content):
    result = Result.of(content)
    with pytest.raises(FrozenInstanceError):
        result.seconds = 1.0
    for again in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert again == content
        assert again.pruned == result.pruned


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: c.pop("pruned"), "pruned is missing"),
        (lambda c: c["dense"]["macs"].pop("total"), "dense.macs.total is missing"),
        (lambda c: c["latency"]["best"].update(dense="magic"), "latency has no timing of 'magic' for the dense model"),
        (
            lambda c: c["latency"]["timings"]["dense"]["eager"].update(median=0.0),
            "of the dense model is not positive",
        ),
        (lambda c: c.update(search={"freeze": {"step": 1}}), "search.freeze.units is missing"),
    ],
)
def test_a_damaged_result_names_the_place(content, damage, reason):
    damage(content)
    with pytest.raises(ValueError, match=reason.replace(".", r"\.")):
        Result.of(content)


def test_an_observation_from_outside_is_in_the_final_table(content, monkeypatch):
    @dataclass(frozen=True)
    class Codes(Observation):
        bits: int

        def computed(self):
            return {"MACs on codes": 1 / self.bits}

        def kept(self, others):
            return f"kept {self.bits} bits of {len(others)} observation"

    monkeypatch.setattr(observations, "_items", dict(observations.items()))
    observations.add("codes")(Codes)
    table = result_table({**content, "codes": {"bits": 4}})
    labels = list(table.columns[0].cells)
    row = labels.index("MACs on codes")
    total = content["dense"]["macs"]["total"]
    assert labels[row - 1] == "MACs of kept weights"
    cells = [list(column.cells)[row] for column in table.columns]
    assert cells == ["MACs on codes", f"{total:,}", "-", f"{total / 4:,.0f}", "4.00x"]
    assert "kept 4 bits of 1 observation" in table.caption
    assert "of the prunable weights" in result_table(content).caption


def test_the_final_table_shows_every_metric_in_its_unit(content):
    for name in ("dense", "before", "pruned"):
        content[name]["metrics"] = {"iou": 0.5, "psnr": 31.25, "accuracy": 0.25}
    table = result_table({**content, "units": {"iou": "%", "psnr": "", "accuracy": "%"}})
    cells = {row[0]: row[1] for row in zip(*(column.cells for column in table.columns), strict=True)}
    assert (cells["iou, test"], cells["psnr, test"], cells["accuracy, test"]) == ("50.00 %", "31.2500", "25.00 %")
    older = result_table(content)  # without units
    cells = {row[0]: row[1] for row in zip(*(column.cells for column in older.columns), strict=True)}
    assert (cells["iou, test"], cells["accuracy, test"]) == ("0.5000", "25.00 %")


def test_a_part_of_a_result_is_read_alone():
    with pytest.raises(ValueError, match="metrics is missing"):
        read(Observed, {})
