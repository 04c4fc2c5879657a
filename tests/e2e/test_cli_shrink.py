"""Removing channels from the command line: `prune --flops`, `shrink`, and one clear sentence for everything wrong."""

import json

import pytest
import torch
import yaml
from torch import nn

import microglia as mg
from commands import TINY, microglia, refused

NET = ("lenet-300-100", "--data", "digits", "--seed", "3", "dense.epochs=2", "train.epochs=2", "train.lr=0.1", "threads=1")
QUICK = (*NET, "measure.latency=false")
PNG = b"\x89PNG"


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


def good(outcome):
    assert outcome.status == 0, outcome
    assert "Traceback" not in outcome.err
    return outcome.out


@pytest.fixture(scope="module")
def removed(tmp_path_factory):
    """A finished run whose channels were removed, timed, and what it printed as JSON."""
    folder = tmp_path_factory.mktemp("removed")
    words = ("prune", *NET, "--pattern", "channel", "--flops", "0.5", "measure.executions=[eager]", "measure.rounds=3")
    outcome = microglia(*words, "--out", folder / "run", "--json", folder=folder / "work")
    return folder / "run", json.loads(good(outcome))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A finished run with masked channels."""
    folder = tmp_path_factory.mktemp("masked")
    words = ("prune", *QUICK, "--pattern", "channel", "--density", "0.5", "--scope", "layer", "--exclude", "fc3")
    words += ("measure.executions=[eager]", "measure.rounds=3")  # of `shrink`
    good(microglia(*words, "--out", folder / "run", folder=folder / "work"))
    return folder / "run"


def test_prune_to_half_the_operations(removed):
    directory, result = removed
    assert result["recipe"]["method"] == "channels"
    assert result["recipe"] == yaml.safe_load((directory / "recipe.yaml").read_text())
    assert result["asked"] == {"density": None, "params": None, "flops": 0.5, "ms": None}
    assert result["pruned"]["macs"]["total"] / result["dense"]["macs"]["total"] == pytest.approx(0.5, abs=0.02)
    assert result["removed"]["got"]["flops"] == pytest.approx(0.5, abs=0.02)
    assert result["masks"] == {"kept": 0, "total": 0}
    assert set(result["latency"]["best"]) == {"dense", "pruned"}
    assert result["pruned"]["metrics"]["accuracy"] > 0.8
    assert (directory / "channels.png").read_bytes().startswith(PNG)
    model = mg.load(directory / "model")
    assert sum(p.numel() for p in model.parameters()) == result["pruned"]["parameters"]["all"]
    layer = result["removed"]["layers"][0]
    assert (layer["name"], layer["before"], layer["after"]) == ("fc1.weight", [300, 64], list(model.fc1.weight.shape))


def test_prune_prints_what_went_for_people(work, removed):
    out = good(microglia("prune", *NET, "--pattern", "channel", "--flops", "0.5", "measure.executions=[eager]",
                         "measure.rounds=3", "--out", removed[0], folder=work))  # fmt: skip
    width = removed[1]["removed"]["layers"][0]["after"][0]
    assert "lenet-300-100 on digits: channels, channel, uniform" in out
    assert "asked: flops 0.5; got flops 0.5" in out
    assert f"300 -> {width}" in out
    assert "best against best" in out
    assert f"Picture: {removed[0] / 'channels.png'}" in out


@pytest.mark.parametrize(
    "words",
    [
        ("--flops", "0.5"),
        ("--method", "channels", "--params", "0.5"),
        ("--method", "channels", "--density", "0.5", "--round-to", "1", "--exclude", "fc3"),
        ("--method", "channels-global", "--flops", "0.4"),
        ("--ms", "1000"),
    ],
)
def test_other_ways_to_say_it(work, tmp_path, words):
    command = ("prune", *QUICK, "dense.epochs=0", "train.epochs=0", *words, "--out", tmp_path / "run", "--json")
    result = json.loads(good(microglia(*command, folder=work, environment={"XDG_CACHE_HOME": str(tmp_path)})))
    assert result["removed"]["layers"][-1]["after"][0] == 10
    if "fc3" in words:
        assert [layer["after"] for layer in result["removed"]["layers"]] == [[150, 64], [100, 150], [10, 100]]


def test_masks_of_channels_stay_masks(masked):
    result = json.loads((masked / "result.json").read_text())
    assert result["recipe"]["method"] == "magnitude"
    assert result["removed"] is None
    assert result["masks"]["kept"] == pytest.approx(0.5 * result["masks"]["total"], rel=0.01)


@pytest.mark.parametrize("below", [".", "model"])
def test_eval_and_measure_of_a_smaller_model(work, removed, below):
    metrics = json.loads(good(microglia("eval", removed[0] / below, "--json", folder=work)))
    assert metrics == removed[1]["pruned"]["metrics"]
    measured = json.loads(good(microglia("measure", removed[0] / below, "--no-latency", "--json", folder=work)))
    for name in ("parameters", "macs", "bytes"):
        assert measured[name] == removed[1]["pruned"][name]
    whole = removed[1]["dense"]["parameters"]["all"]
    assert measured["shrunk_from"]["parameters"] == [whole, measured["parameters"]["all"]]
    assert f"{whole:,} / " in good(microglia("measure", removed[0] / below, "--no-latency", folder=work))


def test_shrink_a_run(work, masked, tmp_path):
    result = json.loads(good(microglia("shrink", masked, "--no-latency", "--out", tmp_path / "small", "--json", folder=work)))
    assert result["masked"]["metrics"] == json.loads((masked / "result.json").read_text())["pruned"]["metrics"]
    assert result["shrunk"]["metrics"]["accuracy"] == result["masked"]["metrics"]["accuracy"]
    assert result["difference"] < 1e-5
    assert result["latency"] is None
    shapes = {layer["name"]: layer["after"] for layer in result["removed"]["layers"]}
    assert shapes == {"fc1.weight": [150, 64], "fc2.weight": [50, 150], "fc3.weight": [10, 50]}
    assert result["shrunk"]["parameters"]["all"] == 150 * 65 + 50 * 151 + 10 * 51
    assert json.loads((tmp_path / "small" / "shrink.json").read_text()) == result
    assert (tmp_path / "small" / "channels.png").read_bytes().startswith(PNG)
    model, images = mg.load(tmp_path / "small").eval(), torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(model(images), mg.load(masked / "model").eval()(images), rtol=1e-4, atol=1e-5)


def test_shrink_writes_into_the_run_and_prints_tables(work, masked):
    out = good(microglia("shrink", masked, folder=work))
    assert "300 -> 150" in out
    assert "dense / shrunk" in out
    assert "best against best" in out
    assert f"Model: {masked / 'shrunk'}" in out
    found = json.loads((masked / "shrunk" / "shrink.json").read_text())
    assert set(found["latency"]["timings"]) == {"dense", "masked", "shrunk"}
    metrics = json.loads(good(microglia("eval", masked / "shrunk", "--json", folder=work)))
    assert metrics == found["shrunk"]["metrics"]
    out = good(microglia("shrink", masked / "model", "--no-latency", "--keep-class", "--clear", folder=work))
    assert f"Model: {masked / 'model-shrunk'}" in out


def test_the_report_counts_against_the_dense_model(work, removed, masked, tmp_path):
    good(microglia("report", removed[0], masked, "--out", tmp_path / "report", folder=work))
    lines = [line for line in (tmp_path / "report" / "results.md").read_text().splitlines() if line.startswith("| ")]
    titles = [cell.strip() for cell in lines[0].strip("|").split("|")]
    rows = {cells[0]: dict(zip(titles, cells, strict=True)) for line in lines[2:]
            for cells in [[cell.strip() for cell in line.strip("|").split("|")]]}  # fmt: skip
    result, row = removed[1], rows["channels"]
    dense, small = result["dense"], result["pruned"]
    assert row["kept (asked)"] == "flops 0.5"
    assert row["compression"] == f"{dense['parameters']['all'] / small['parameters']['all']:.2f}x"
    assert row["theoretical speed-up"] == f"{dense['macs']['total'] / small['macs']['total']:.2f}x"
    times = [result["latency"]["timings"][name]["eager"]["median"] for name in ("dense", "pruned")]
    assert row["measured speed-up"] == f"{times[0] / times[1]:.2f}x"
    assert row["bytes, raw"] == f"{small['bytes']['raw']:,}"
    assert rows["magnitude"]["compression"].startswith("1.9")


WRONG = {
    "flops 0": (("--flops", "0"), "flops is the fraction kept, above 0 and at most 1; got 0", "Nothing would be left"),
    "flops in percent": (("--flops", "50"), "Did you mean 0.5?"),
    "flops nan": (("--flops", "nan"), "flops is the fraction kept"),
    "impossible flops": (("--flops", "0.00001"), "The budget (flops 1e-05) cannot be met", "at its narrowest"),
    "impossible params": (("--method", "channels", "--params", "0.00001"), "cannot be met"),
    "ms 0": (("--ms", "0"), "ms is a time in milliseconds, above 0; got 0"),
    "flops beside N:M": (("--flops", "0.5", "--pattern", "nm:2:4"), "flops and ms are budgets of removed channels"),
    "flops of masks": (
        ("--flops", "0.5", "--method", "magnitude"),
        "flops and ms are budgets of removed channels",
        "'channels'",
    ),
    "flops of gradual masks": (("--flops", "0.5", "--method", "gradual"), "flops and ms are budgets of removed channels"),
    "another pattern": (
        ("--method", "channels", "--flops", "0.5", "--pattern", "block:4x4"),
        "its pattern is channel, not block",
    ),
    "a scope of masks": (("--flops", "0.5", "--scope", "erk"), "scope", "'erk'"),
    "layers": (("--flops", "0.5", "--layers", "fc1"), "takes exclude"),
    "no budget": (("--method", "channels"), "A budget needs at least one of density, params, flops"),
    "unknown excluded layer": (("--flops", "0.5", "--exclude", "fc9"), "The selector 'fc9' meets no layer"),
    "all excluded": (("--flops", "0.5", "--exclude", "*"), "no channels that can be removed"),
    "rounding to 0": (("--flops", "0.5", "--round-to", "0"), "round_to, batch and rounds are at least 1"),
    "rounding masks": (("--density", "0.5", "--round-to", "8"), "--round-to is an option of the methods", "here is magnitude"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_budgets_end_in_one_clear_sentence(work, tmp_path, case):
    words, *texts = WRONG[case]
    outcome = microglia("prune", *QUICK, *words, "--out", tmp_path / "run", folder=work,
                        environment={"XDG_CACHE_HOME": str(tmp_path / "cache")})  # fmt: skip
    refused(outcome, *texts)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_shrunk(work, removed, tmp_path):
    refused(
        microglia("shrink", tmp_path / "nowhere", folder=work), "is neither a run directory (recipe.yaml) nor a saved model"
    )
    refused(microglia("shrink", "lenet-300-100", folder=work), "is neither a run directory")
    refused(microglia("shrink", removed[0], folder=work), "was shrunk already")
    mg.save(mg.tasks.build("lenet-300-100", classes=10, shape=(1, 8, 8)), tmp_path / "dense")
    refused(
        microglia("shrink", tmp_path / "dense", folder=work), "has no masks, so there is nothing to remove", "--pattern channel"
    )
    mg.save(nn.Linear(2, 2), tmp_path / "mine")
    refused(microglia("shrink", tmp_path / "mine", folder=work), "does not say which network it is")
    good(
        microglia(
            "prune", *TINY, "--scope", "layer", "dense.epochs=0", "train.epochs=0", "--out", tmp_path / "single", folder=work
        )
    )
    refused(microglia("shrink", tmp_path / "single", folder=work), "Nothing can be removed", "No channel is masked whole")
    assert not (tmp_path / "single" / "shrunk").exists()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text("model: conv-2\nprune: {density: 0.5}\n")
    refused(microglia("shrink", tmp_path / "begun", folder=work), "has no model yet")


def test_a_run_whose_plan_is_damaged(work, removed, tmp_path):
    mg.save(mg.load(removed[0] / "model"), tmp_path / "model")
    plan = json.loads((tmp_path / "model" / "plan.json").read_text())
    plan["shrunk"]["kept"] = {}
    (tmp_path / "model" / "plan.json").write_text(json.dumps(plan))
    for command in ("eval", "measure", "shrink"):
        refused(microglia(command, tmp_path / "model", folder=work), "do not belong together")
