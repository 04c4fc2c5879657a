"""The bench of structured pruning: the papers' count of operations, the table of all methods, HRank's own claims."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import microglia as mg
from benchmark_scripts import script
from microglia.core.errors import FileError, MicrogliaError, RunError
from microglia.core.layers import prunable_layers
from microglia.graph import plan_of
from microglia.lab.execute import make_task
from microglia.lab.recipe import method_config, read_yaml, resolve
from microglia.measure import Macs, count_macs
from microglia.measure.published import producer_macs
from microglia.methods import ChannelConfig
from microglia.zoo import build

ROOT = Path(__file__).parent.parent.parent
RATES = [0.1, *[0.6] * 35, 0.0, 0.0, *[0.6] * 6, *[0.4] * 3, 0.1, 0.4, 0.1, 0.4, 0.1, 0.4, 0.1, 0.4]
"""Fractions that go of each convolution of ResNet-56, from the README of HRank's public code."""


# ------------------------------------------------------------------------------------------------------ the papers' count
def test_the_published_operations_of_hrank_come_out() -> None:
    """62.72 million of 125.49 for ResNet-56 at the published rates; columns of readers are not left out."""
    model = build("resnet56")
    dense = count_macs(model, torch.zeros(1, 3, 32, 32))
    convolutions = [name for name, layer in prunable_layers(model).items() if isinstance(layer.module, nn.Conv2d)]
    sizes = {name: model.get_parameter(name).shape[0] for name in convolutions}
    filters = {
        name: (sizes[name], sizes[name] - int(rate * sizes[name])) for name, rate in zip(convolutions, RATES, strict=True)
    }
    assert producer_macs(dense, {}) == 125_485_696
    assert producer_macs(dense, filters) == pytest.approx(62.72e6, abs=0.01e6)


def test_it_is_above_the_exact_count_where_readers_lose_columns() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    x = torch.zeros(1, 3, 6, 6)
    small = mg.prune_channels(model, x, mg.Budget(density=0.5), round_to=1)
    filters = {name: (old[0], new[0]) for name, (old, new) in plan_of(small).shapes.items()}
    first, second = 36 * 9 * 3 * 8, 36 * 9 * 8 * 4
    assert producer_macs(count_macs(model, x), filters) == first // 2 + second
    assert count_macs(small, x).total == first // 2 + second // 2


def test_what_cannot_be_counted_is_told() -> None:
    with pytest.raises(MicrogliaError, match="holds only sums: count the dense model again"):
        producer_macs(Macs(5, 5.0), {})
    with pytest.raises(MicrogliaError, match=r"with 0 <= after <= before; a has \(4, 5\)"):
        producer_macs(Macs(5, 5.0, layers={"a": 5}), {"a": (4, 5)})


# ---------------------------------------------------------------------------------------------------------------- the table
@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Any]:
    table = script("structured_table")
    runs = tmp_path_factory.mktemp("structured")
    return table, table.Bench("resnet8", "digits", None, 0.5, 1, 0.05, 1, False, runs)


def test_every_row_names_a_method_and_fits_its_config(bench: tuple[ModuleType, Any]) -> None:
    table, _ = bench
    names = table.names_of_rows()
    assert {"l1", "slimming", "polarization", "group-lasso", "sfp", "fpgm", "hrank", "thinet", "eagleeye", "amc"} <= set(names)
    assert {"smart", "pdp", "pas", "awg", "acdc", "l2-global", "ddnp"} <= set(names)
    assert len(set(names)) == len(names)
    for name in names:
        if name != table.SCRATCH:
            method, settings = table.settings_of(name, 3)
            config = method_config(resolve({"method": method, "prune": {"flops": 0.5, **settings}, "train": {"epochs": 3}}))
            assert (config.pattern, config.flops, table.epochs_of(config) % 3) == ("channel", 0.5, 0)


def test_rows_are_kept_and_not_run_again(bench: tuple[ModuleType, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    table, own = bench
    found = [own.row(name, 0) for name in ("l1", "scratch")]
    first, scratch = found
    assert [row.epochs for row in found] == [1, 1]
    assert (first.macs, first.parameters) == (scratch.macs, scratch.parameters)
    assert first.macs < first.published
    assert first.before is not None
    assert scratch.before is None
    assert all(0 <= row.after <= 1 and not row.refused for row in found)
    monkeypatch.setattr(table, "execute", None)
    assert [own.row(name, 0) for name in ("l1", "scratch")] == found
    text = table.document([(own.setting, found)])
    assert "the numbers mean nothing" in text
    rows = [line for line in text.splitlines() if line.startswith(("| l1 ", "| scratch "))]
    assert len(rows) == 2
    assert f"{first.macs / 1e6:.2f} M | {first.published / 1e6:.2f} M" in text


def test_a_method_that_refuses_the_net_has_its_sentence(bench: tuple[ModuleType, Any], tmp_path: Path) -> None:
    table, _ = bench
    row = table.Bench("conv-2", "digits", None, 0.5, 1, 0.05, 1, False, tmp_path).row("slimming", 0)
    assert "ranks channels by the scales of norms" in row.refused
    own = table.Bench("conv-2", "digits", None, 0.5, 1, 0.05, 1, False, tmp_path)
    assert f"- `slimming`: {row.refused}" in table.document([(own.setting, own.kept())])


def test_a_row_that_another_process_makes_is_not_kept_as_refused(
    bench: tuple[ModuleType, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, _ = bench
    own = table.Bench("resnet8", "digits", None, 0.5, 1, 0.05, 1, False, tmp_path)

    def busy(*_: Any, **__: Any) -> None:
        raise RunError("Another process works in this directory.")

    monkeypatch.setattr(table, "execute", busy)
    with pytest.raises(RunError, match="Another process"):
        own.row("l1", 0)
    assert own.kept() == []


def test_a_full_disk_is_not_kept_as_refused_and_stops_no_other_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = script("structured_table")
    kept = table.Row("fpgm", 0, 0.5, 0.6, 10, 12, 9, 1.5, 1, 3.0)

    def made(self: Any, name: str, seed: int) -> Any:
        if name == "l1":
            raise FileError("No space left on device.")
        if name == "sfp":
            raise ZeroDivisionError
        return kept

    monkeypatch.setattr(table.Bench, "made", made)
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "kept"), "--document", str(tmp_path / "a.md")]
    monkeypatch.setattr("sys.argv", ["structured_table.py", "--methods", "l1", "sfp", "fpgm", *places])
    with pytest.raises(SystemExit, match=r"These rows failed.*: l1, seed 0; sfp, seed 0"):
        table.main()
    ((_, rows),) = table.tables_in(tmp_path / "kept")
    assert rows == [kept]
    assert "No space left" in capsys.readouterr().out


def test_a_trial_has_short_searches_and_the_epochs_of_the_whole_row(bench: tuple[ModuleType, Any], tmp_path: Path) -> None:
    table, _ = bench
    own = table.Bench("resnet8", "digits", None, 0.5, 1, 0.05, 1, False, tmp_path)
    row = own.row("amc", 0)  # whose 800 episodes take minutes
    assert row.epochs == 1
    stored = read_yaml(own.place("amc", 0) / "recipe.yaml")
    assert (stored.get("recipe") or stored)["prune"]["episodes"] == 3
    assert row.macs / count_macs(make_task(own.recipe("amc", 0)).build(), torch.zeros(1, 1, 8, 8)).total <= 0.505


def test_scratch_makes_its_shape_again_where_the_first_row_was_kept_on_another_machine(tmp_path: Path) -> None:
    table = script("structured_table")
    settings = ("resnet8", "digits", None, 0.5, 1, 0.05, 1, False)
    first = table.Bench(*settings, tmp_path / "one", tmp_path / "results").row("l2", 0)
    scratch = table.Bench(*settings, tmp_path / "other", tmp_path / "results").row("scratch", 0)
    assert not scratch.refused
    assert (scratch.macs, scratch.parameters) == (first.macs, first.parameters)
    here = table.Bench(*settings, tmp_path / "other", tmp_path / "results")
    here.time(rounds=1)  # the control has the time of the shape that it trains, and that shape was made here too
    assert all(row.ms is not None and row.ms > 0 for row in here.kept())
    table.Bench(*settings, tmp_path / "none", tmp_path / "results").time(rounds=1)
    assert [row.ms for row in here.kept()] == [None, None]


def test_seconds_count_the_epochs_of_killed_attempts(tmp_path: Path) -> None:
    table = script("structured_table")
    own = table.Bench("resnet8", "digits", None, 0.5, 1, 0.05, 1, False, tmp_path)
    own.place("l1", 0).mkdir(parents=True)
    rows = [{"stage": "dense", "seconds": 50.0}, {"stage": "sparse", "seconds": 2.5}, {"stage": "train", "seconds": 4.0}]
    (own.place("l1", 0) / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert (own.logged("l1", 0), own.logged("l2", 0)) == (6.5, 0.0)


def test_published_rows_stand_beside_resnet56(bench: tuple[ModuleType, Any]) -> None:
    table, _ = bench
    text = table.document([(table.Bench("resnet56", "cifar10", None, 0.5, 3, 0.01, None, True, Path()).setting, [])])
    assert "| HRank | 93.17 | 62.72 M |" in text
    assert "wait for a GPU" in text


def test_a_killed_table_goes_on_from_its_results_alone(bench: tuple[ModuleType, Any], tmp_path: Path) -> None:
    """The rows of two processes are in one file, which another machine reads without the runs; other settings are refused."""
    table, _ = bench
    settings = ("resnet8", "digits", "weights/start.th", 0.5, 1, 0.05, None, False)
    one, other = (table.Bench(*settings, tmp_path / name, tmp_path / "results") for name in ("one", "other"))
    rows = [table.Row("l1", 0, 0.5, 0.6, 10, 12, 9, 1.5, 1, 3.0), table.Row("fpgm", 1, refused="It cannot.")]
    one.keep(rows[0])
    other.keep(rows[1])
    assert one.kept() == rows
    assert [other.row("l1", 0), one.row("fpgm", 1)] == rows  # not run again
    assert table.tables_in(tmp_path / "results") == [(one.setting, rows)]
    assert one.setting["checkpoint"] == "start.th"
    with pytest.raises(SystemExit, match=r"other settings \(epochs 1\): give another --results"):
        table.replace(one, epochs=3).kept()


# -------------------------------------------------------------------------------------------------------- hrank's own claims
def test_claims_of_hrank_are_measured() -> None:
    claims = script("hrank_claims")
    task = make_task(resolve({"model": "resnet8", "data": "digits", "prune": {"density": 0.5}}))
    torch.manual_seed(0)
    model = task.build()
    one, other = claims.drawn(task, 32)
    assert not {tuple(x.flatten().tolist()) for batch, _ in one for x in batch} & {
        tuple(x.flatten().tolist()) for batch, _ in other for x in batch
    }
    same = claims.agreement(model, one, one)
    assert same
    assert all(value == pytest.approx(1.0) for value in same.values())
    assert all(-1 <= value <= 1 for value in claims.agreement(model, one, other).values())
    judged = claims.replace(task, data=claims.Judged(task, 1))
    found = claims.Trial(judged, model, one, 0.5, mg.FitConfig(epochs=0)).order(draws=1)
    assert [row.variant for row in found] == ["hrank", "edge", "random", "reverse"]
    assert all(row.after is None for row in found)


def test_verdicts_in_words() -> None:
    claims = script("hrank_claims")
    values = {"hrank": 0.9, "edge": 0.7, "random": 0.6, "reverse": 0.3}
    rows = [claims.Accuracy(name, value, value if name != "reverse" else 0.65) for name, value in values.items()]
    told = list(claims.verdicts({"a": 0.99, "b": 0.94}, rows))
    assert told[0].startswith("stable: does not hold; least 0.940 (b), mean 0.965 over 2 layers")
    assert told[1].startswith("order before recovery: holds; hrank 90.00")
    assert told[2].startswith("order after recovery: does not hold")
    kept = {"verdicts": told, "asked": {"model": "resnet56", "data": "cifar10"}}
    assert "## HRank's claims on resnet56 and cifar10\n\n- stable: does not" in script("structured_table").document([], [kept])


# ---------------------------------------------------------------------------------------------------- recipes of full length
@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "structured").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_full_length_are_valid(path: Path) -> None:
    recipe = resolve(read_yaml(path))
    config = method_config(recipe)
    assert isinstance(config, ChannelConfig)
    assert config.budget is not None
    assert recipe.model in path.stem
    assert recipe.method in path.stem
    assert config.sparse.epochs + config.train.epochs >= 200
    assert config.train.distill == 0
    assert recipe.checkpoint is not None or recipe.dense.epochs == 0  # from scratch, or from trained weights
