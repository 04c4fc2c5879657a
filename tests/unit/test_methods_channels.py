"""The method that removes channels: budgets, scopes, stages that are resumed, settings that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microglia as mg
from microglia.core.errors import BudgetError, MicrogliaError, PatternError, ScoreError, SelectorError, UnknownNameError
from microglia.data import ImageData
from microglia.graph.cutting.removal import removal
from microglia.lab.recipe import method_config, resolve
from microglia.methods import ChannelsConfig, methods
from microglia.report.removed import channels, draw_removed, removal_table
from microglia.storage.run import Run
from microglia.tasks.classification import ImageSource
from microglia.tasks.task import CLASSIFICATION, CrossEntropy

SHORT = mg.FitConfig(epochs=1, batch_size=32, lr=0.05)
STAGES = ["dense", "dense-observed", "prune", "before-observed", "train"]


class Network(nn.Module):
    """A stem, a residual block with batch norm, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 32, 3, padding=1)
        self.outer = nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(images)))
        return self.head((x + self.outer(torch.relu(self.inner(x)))).mean((2, 3)))


def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network()


@pytest.fixture(scope="module")
def task() -> mg.Task:
    data, few = mg.data.load_data("digits"), torch.arange(96)
    parts = {split: getattr(data, split).subset(few) for split in ("train", "validation", "test")}
    images = ImageData(
        name="digits", classes=data.classes, **parts, normalization=data.normalization, augmentation=data.augmentation
    )
    example = data.train.images[:1] / 255
    return mg.Task("network on digits", build, ImageSource(images), CrossEntropy(), CLASSIFICATION, example)


def config(**settings: Any) -> ChannelsConfig:
    return ChannelsConfig(**{"dense": SHORT, "train": SHORT, "score_batch_size": 32, "round_to": 1, **settings})


def run(task: mg.Task, settings: ChannelsConfig, directory: Path | None = None) -> tuple[nn.Module, Run]:
    own = Run(directory, {"budget": str(settings.budget)})
    try:
        return methods["channels"].procedure(task, own, settings), own
    finally:
        own.close()


def assert_same(model: nn.Module, other: nn.Module) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


class Grouped(nn.Module):
    """A stem and a convolution of eight groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, groups=8)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(torch.relu(self.stem(images)))).mean((2, 3)))


@pytest.mark.parametrize(("within", "groups", "inputs"), [(False, 4, 4), (True, 8, 2)])
def test_groups_go_whole_or_are_thinned(task: mg.Task, within: bool, groups: int, inputs: int) -> None:
    model, _ = run(replace(task, build=Grouped), config(density=0.5, within_groups=within))
    assert isinstance(model, Grouped)
    assert (model.mix.groups, model.mix.weight.shape[1]) == (groups, inputs)


@pytest.mark.parametrize("budget", [{"flops": 0.5}, {"params": 0.4}, {"density": 0.5}, {"flops": 0.6, "params": 0.3}])
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_budgets_are_met_by_what_is_measured(task: mg.Task, budget: dict[str, float], scope: Any) -> None:
    model, own = run(task, config(scope=scope, **budget, train=replace(SHORT, epochs=0)))
    plan, dense, before = mg.graph.plan_of(model), own.observations["dense"], own.observations["before"]
    measured = {
        "flops": before["macs"]["total"] / dense["macs"]["total"],
        "params": before["parameters"]["all"] / dense["parameters"]["all"],
        "density": plan.got.get("density"),
    }
    for term in budget:
        assert plan.got[term] == pytest.approx(measured[term], rel=1e-9)
    assert max(plan.got[term] / asked for term, asked in budget.items()) == pytest.approx(1, abs=0.05)
    assert before["parameters"]["density"] == 1
    assert model.head.weight.shape[0] == 10


def test_a_time_budget(task: mg.Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, own = run(task, config(ms=1e6, train=replace(SHORT, epochs=0)))
    assert mg.graph.plan_of(model).got["ms"] < 1e6
    assert own.observations["before"]["parameters"]["all"] == own.observations["dense"]["parameters"]["all"]
    with pytest.raises(BudgetError, match="cannot be met"):
        methods["channels"].check(task, config(ms=1e-6))


@pytest.mark.parametrize("score", ["magnitude", "gradient", "random"])
def test_scores(task: mg.Task, score: str) -> None:
    model, _ = run(task, config(flops=0.5, score=score, dense=replace(SHORT, epochs=0), train=replace(SHORT, epochs=0)))
    assert mg.graph.plan_of(model).got["flops"] == pytest.approx(0.5, abs=0.03)


def test_the_weakest_channels_go(task: mg.Task) -> None:
    def marked() -> nn.Module:
        model = build()
        with torch.no_grad():
            for parameter in (model.inner.weight, model.inner.bias):
                parameter[::2].mul_(0.01)
            model.outer.weight[:, ::2].mul_(0.01)
        return model

    settings = config(density=0.5, exclude=("stem",), dense=replace(SHORT, epochs=0), train=replace(SHORT, epochs=0))
    model, _ = run(replace(task, build=marked), settings)
    plan = mg.graph.plan_of(model)
    assert plan.kept["inner.weight"]["0"] == list(range(1, 32, 2))
    assert "stem.weight" not in plan.kept
    assert model.stem.weight.shape[0] == 16


@pytest.mark.parametrize("killed_after", range(1, len(STAGES)))
def test_a_run_goes_on_after_any_stage_and_ends_in_the_same_bits(task: mg.Task, tmp_path: Path, killed_after: int) -> None:
    settings = config(flops=0.5, recalibrate=0)
    whole, own = run(task, settings, tmp_path / "run")
    assert sorted(path.stem for path in (tmp_path / "run" / "stages").iterdir()) == sorted(STAGES)
    for stage in STAGES[killed_after:]:
        (tmp_path / "run" / "stages" / f"{stage}.safetensors").unlink()
    again, other = run(task, settings, tmp_path / "run")
    assert_same(whole, again)
    assert other.observations == own.observations
    assert mg.graph.plan_of(again).kept == mg.graph.plan_of(whole).kept
    assert_same(whole, run(task, settings)[0])  # and without a directory


def test_recalibration_is_a_stage_of_its_own(task: mg.Task, tmp_path: Path) -> None:
    settings = config(flops=0.5, recalibrate=2, train=replace(SHORT, epochs=0))
    model, _ = run(task, settings, tmp_path / "run")
    plain, _ = run(task, replace(settings, recalibrate=0))
    assert (tmp_path / "run" / "stages" / "recalibrate.safetensors").exists()
    assert not torch.equal(model.norm.running_mean, plain.norm.running_mean)
    assert torch.equal(model.stem.weight, plain.stem.weight)
    assert_same(model, run(task, settings, tmp_path / "run")[0])


def test_recovery_distils_from_the_dense_model(task: mg.Task) -> None:
    plain, _ = run(task, config(flops=0.5))
    distilled, _ = run(task, config(flops=0.5, train=replace(SHORT, distill=0.5)))
    assert not torch.equal(plain.head.weight, distilled.head.weight)
    assert all(torch.isfinite(p).all() for p in distilled.parameters())


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"pattern": "nm:2:4"}, PatternError, "its pattern is channel, not nm:2:4"),
        ({"scope": "layer"}, UnknownNameError, "no scope of the method 'channels' named 'layer'"),
        ({"layers": ("head",)}, SelectorError, "takes exclude"),
        ({"protect": ("head",)}, SelectorError, "takes exclude"),
        ({"allow_empty": True}, SelectorError, "takes exclude"),
        ({"round_to": 0}, BudgetError, "round_to, batch and rounds are at least 1"),
        ({"rounds": 0}, BudgetError, "round_to, batch and rounds are at least 1"),
        ({"ms": 3.0, "rounds": 2}, BudgetError, "leave ms out"),
        ({"batch": 0}, BudgetError, "round_to, batch and rounds are at least 1"),
    ],
)
def test_settings_that_mean_nothing_here(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        config(flops=0.5, **settings)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({}, BudgetError, "at least one of density, params, flops"),
        ({"flops": 0.0}, BudgetError, "Nothing would be left"),
        ({"flops": 50}, BudgetError, r"Did you mean 0\.5"),
        ({"flops": 0.00001}, BudgetError, "cannot be met"),
        ({"ms": 0.0}, BudgetError, "ms is a time in milliseconds"),
        ({"flops": 0.5, "exclude": ("nine",)}, SelectorError, "meets no layer"),
        ({"flops": 0.5, "exclude": ("*",)}, MicrogliaError, "no channels that can be removed"),
    ],
)
def test_what_does_not_fit_shows_before_training(
    task: mg.Task, settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        methods["channels"].check(task, config(**settings))


def test_a_model_with_a_nan_is_refused(task: mg.Task) -> None:
    def broken() -> nn.Module:
        model = build()
        with torch.no_grad():
            model.inner.weight[0, 0, 0, 0] = torch.nan
        return model

    with pytest.raises(ScoreError, match="NaN"):
        run(replace(task, build=broken, pretrained=True), config(flops=0.5))


@pytest.mark.parametrize("term", ["flops", "ms"])
@pytest.mark.parametrize("name", ["magnitude", "gradual"])
def test_masks_have_no_such_budget(task: mg.Task, term: str, name: str) -> None:
    with pytest.raises(
        BudgetError, match=r"budgets of removed channels: masks .channel. save neither. Take the method 'channels'"
    ):
        methods[name].check(task, methods[name].config(**{term: 0.5, "pattern": "channel"}))


def test_such_a_budget_alone_means_this_method() -> None:
    for prune in ({"flops": 0.5}, {"ms": 3.0, "pattern": "channel"}, {"flops": 0.5, "scope": "global"}):
        recipe = resolve({"prune": prune})
        assert recipe.method == "channels"
        assert isinstance(method_config(recipe), ChannelsConfig)
    with pytest.raises(BudgetError, match="'magnitude' takes density or params"):  # the default
        resolve({"prune": {"flops": 0.5, "pattern": "nm:2:4"}})
    assert resolve({"prune": {"density": 0.5, "pattern": "channel"}}).method == "magnitude"
    with pytest.raises(BudgetError, match=r"masks .unstructured. save neither"):
        resolve({"method": "magnitude", "prune": {"flops": 0.5}})
    assert resolve({"method": "channels-global", "prune": {"flops": 0.5}}).prune["scope"] == "global"


def test_what_went_is_shown_layer_by_layer(task: mg.Task, tmp_path: Path) -> None:
    small = mg.prune_channels(build(), task.example, mg.Budget(flops=0.5), round_to=1)
    removed = removal(build(), small)
    shapes = {layer["name"]: (layer["before"], layer["after"]) for layer in removed["layers"]}
    assert set(shapes) == {"stem.weight", "inner.weight", "outer.weight", "head.weight"}
    for name, (before, after) in shapes.items():
        assert before == list(build().get_parameter(name).shape)
        assert after == list(small.get_parameter(name).shape)
    assert channels(removed["layers"][-1]) == (10, 10)
    table = removal_table(removed)
    assert table.row_count == 4
    assert "got flops" in table.caption
    first = draw_removed(removed, "network: $a_b$", tmp_path / "a.png").read_bytes()
    assert first == draw_removed(removed, "network: $a_b$", tmp_path / "b.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    mg.methods.OneShot(small, density=0.5)
    assert removal(build(), small)["layers"] == removed["layers"]  # masked since, the same shapes


@pytest.mark.parametrize("term", ["flops", "params", "density"])
def test_rounds_remove_a_part_each_and_reach_the_budget(task: mg.Task, tmp_path: Path, term: str) -> None:
    settings = config(**{term: 0.25}, rounds=2)
    model, own = run(task, settings, tmp_path / "run")
    plan = mg.graph.plan_of(model)
    assert plan.asked == {term: 0.25}
    assert plan.got[term] == pytest.approx(0.25, rel=0.1)
    assert plan.parameters == tuple(own.observations[name]["parameters"]["all"] for name in ("dense", "before"))
    assert plan.macs == tuple(own.observations[name]["macs"]["total"] for name in ("dense", "before"))
    stages = {path.stem for path in (tmp_path / "run" / "stages").iterdir()}
    assert stages == {*STAGES, "prune-1", "recalibrate-1", "recalibrate", "train-1"}
    mg.save(model, tmp_path / "model")
    assert_same(model, mg.load(tmp_path / "model", build()))
    for stage in ("train-1", "prune", "before-observed", "train"):
        (tmp_path / "run" / "stages" / f"{stage}.safetensors").unlink()
    assert_same(model, run(task, settings, tmp_path / "run")[0])


class Shuffle(Network):
    """Sizes written into its forward: it comes back as a graph."""

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(images)))
        x = x.reshape(x.shape[0], 2, 8, *x.shape[2:]).transpose(1, 2).reshape(x.shape[0], 16, *x.shape[2:])
        return self.head(self.outer(torch.relu(self.inner(x))).mean((2, 3)))


def test_a_model_that_becomes_a_graph(task: mg.Task, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = Shuffle().state_dict()

    def make() -> nn.Module:
        model = Shuffle()
        model.load_state_dict(start)
        model.microglia_source = {"name": "mine"}
        return model

    shuffled = replace(task, build=make)
    settings = config(flops=0.4, recalibrate=1)
    model, own = run(shuffled, settings, tmp_path / "run")
    assert mg.graph.plan_of(model).kind == "graph"
    assert model.microglia_source == {"name": "mine"}
    assert own.observations["before"]["macs"]["total"] / own.observations["dense"]["macs"]["total"] < 0.45
    (tmp_path / "run" / "stages" / "train.safetensors").unlink()
    assert_same(model, run(shuffled, settings, tmp_path / "run")[0])
    assert len(removal(make(), model)["layers"]) == 4
    with pytest.raises(MicrogliaError, match="comes back from a cut as a graph, which cannot be cut again"):
        methods["channels"].check(shuffled, replace(settings, rounds=2))
    assert (
        mg.graph.plan_of(run(shuffled, replace(settings, rounds=2, keep_class=True, density=0.7, flops=None))[0]).kind
        == "module"
    )
