"""Every registered method x pattern x kind of network, on a few real digits: budget, masks, files, resumption."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microglia as mg
from microglia.core.errors import MicrogliaError, SelectorError
from microglia.core.patterns import parse_pattern
from microglia.data import ImageData
from microglia.dynamic import gate_plan, gates_of
from microglia.graph import ShrinkError
from microglia.methods import methods
from microglia.methods.what import taken
from microglia.scores.behind import NORMS
from microglia.storage.run import Run
from microglia.storage.validation import adapter_of
from microglia.tasks.classification import ImageSource
from microglia.tasks.roles import with_roles
from microglia.tasks.task import CLASSIFICATION, CrossEntropy

PATTERNS = ["unstructured", "block:4x2", "block:8x1", "nm:2:4", "channel"]
DENSITY = 0.4


def made_by(outcome: str) -> list[tuple[str, str]]:
    """Returns the (method, pattern) that the method says end so; presets of methods with many rounds take two patterns."""
    few = ("unstructured", "block:4x2")
    return [
        (name, pattern)
        for name, method in methods.items()
        for pattern in PATTERNS
        if method.outcome(pattern) == outcome
        and (pattern in few or method.original == name or method.original not in ("at-init", "tickets", "woodfisher"))
    ]


MASKING, REMOVING, GATING = (made_by(outcome) for outcome in ("masked", "shrunk", "gated"))
SHORT = {
    "score_batch_size": 32, "search_epochs": 2, "images": 64, "every": 2, "candidates": 4, "population": 4, "iterations": 2,
    "episodes": 4, "warmup": 2, "tolerance": 0.08, "fraction": 0.4, "together": 64, "updates": 2,
    "estimator": "fisher", "curvature": "fisher",
    "compress": (0.2, 0.8), "decompress": (0.5,),  # six steps have no room for the fifteen phases of its own schedule
}  # fmt: skip
"""Settings that make a method's search short, for the methods that take them."""
OWN = {
    "obs": {"least": 0.5},
    **{name: {"rate": 0.4} for name in ("tickets", "imp", "lr-rewinding")},  # two levels instead of five
    **{name: {"rounds": 3} for name in ("snip-iterative", "synflow")},  # instead of a hundred
}
"""Further settings of one method."""


def test_every_method_is_here() -> None:
    assert {name for name, _ in MASKING + REMOVING + GATING} == set(methods)
    assert len(MASKING) >= 112


class Residual(nn.Module):
    """A stem, one block with a sum, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(images)))
        return self.head((x + torch.relu(self.inner(x))).mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(12, 10))


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 16, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


NETWORKS = {"mlp": mlp, "conv": conv, "residual": Residual, "depthwise": depthwise}
FEW = {
    **dict.fromkeys(["gdp", "l1", "deephoyer", "ccp", "pfp"], ("residual", "depthwise")),
    **dict.fromkeys(["dsr", "deep-r"], ("conv",)),
}
"""Short methods that share their code with another one here: the networks that are enough for them."""


def networks(name: str, pattern: str) -> Collection[str]:
    """Returns the networks on which a method is tried with a pattern.

    Blocks of another shape take the way of ``block:4x2``, and the presets of ``oneshot`` that of ``oneshot`` after their scores
    and with their scope: one network each.
    """
    if pattern == "block:8x1" or (methods[name].original == "oneshot" != name and pattern in ("nm:2:4", "channel")):
        return ("conv",)
    return FEW.get(name, NETWORKS)


def on_networks(cases: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Returns (method, pattern, network) of the cases."""
    return [(name, pattern, kind) for kind in NETWORKS for name, pattern in cases if kind in networks(name, pattern)]


@pytest.fixture(scope="module")
def digits() -> ImageData:
    data = mg.data.load_data("digits")
    few = torch.arange(96)
    return ImageData(
        name="digits",
        classes=data.classes,
        train=data.train.subset(few),
        validation=data.validation.subset(few[:32]),
        test=data.test.subset(few[:32]),
        normalization=data.normalization,
        augmentation=data.augmentation,
    )


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of a kind of network share their dense network, as those of a sweep do: the first one trains it."""
    return tmp_path_factory.mktemp("starts")


def begun(folder: Path, name: str, config: Any, kind: str, starts: Path) -> Run:
    run = Run(folder / "run", {"method": name, "config": asdict(config)})
    run.shared = starts / kind / hashlib.sha256(repr(config.dense).encode()).hexdigest()
    return run


def make_task(kind: str, data: ImageData) -> mg.Task:
    """Returns a task as a recipe makes it: its layers' roles are known."""

    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return NETWORKS[kind]()

    example = data.train.images[:1] / 255
    return with_roles(mg.Task(f"{kind} on digits", build, ImageSource(data), CrossEntropy(), CLASSIFICATION, example))


def config_of(name: str, pattern: str) -> Any:
    method = methods[name]
    short = {"epochs": 2, "batch_size": 32, "lr": 0.05}
    known = taken(method.config)
    budget = {"density": DENSITY} if "density" in known else {"flops": 0.8 if method.outcome(pattern) == "gated" else 0.5}
    budget = {} if parse_pattern(pattern).fixed_density is not None else budget
    fields = (
        {"pattern": pattern, "dense": short, "train": short}
        | {key: SHORT[key] for key in SHORT if key in known}
        | OWN.get(name, {})
    )
    return adapter_of(method.config).validate_python({**method.defaults, **fields, **budget})


def largest_unit(model: nn.Module, pattern: str) -> int:
    return max(int(parse_pattern(pattern).sizes(layer.shape).max()) for layer in mg.core.layers.prunable_layers(model).values())


def no_sequence(config: Any, model: nn.Module) -> str | None:
    """Returns why a method that goes from block to block refuses a network: no sequence, or N:M that does not divide."""
    if "blocks" not in config.takes.needs:
        return None
    if not isinstance(model, nn.Sequential):
        return "Residual has no blocks to find"
    widths = [layer.sides[1] for layer in mg.core.layers.prunable_layers(model).values()]
    return "needs a multiple of 4 inputs" if config.pattern == "nm:2:4" and any(width % 4 for width in widths) else None


@pytest.mark.parametrize(("name", "pattern", "kind"), on_networks(MASKING))
def test_method(name: str, pattern: str, kind: str, digits: ImageData, starts: Path, tmp_path: Path) -> None:
    task, config = make_task(kind, digits), config_of(name, pattern)
    if refused := no_sequence(config, task.build()):
        with pytest.raises(MicrogliaError, match=refused):
            methods[name].check(task, config)
        return
    run = begun(tmp_path, name, config, kind, starts)
    model = methods[name].procedure(task, run, config)
    masks = mg.masks_of(model)
    layers = mg.core.layers.prunable_layers(model, exclude=config.exclude)  # ShrinkBench's leave the classifier alone

    # The budget is met exactly, or as near as whole units and one unit per layer allow.
    assert set(masks) == set(layers)
    if pattern == "nm:2:4":
        for mask in masks.values():
            rows = parse_pattern(pattern).reduce(mask.float())
            real = parse_pattern(pattern).sizes(mask.shape).sum(1)
            assert torch.equal(rows.sum(1).long(), real.clamp(max=2))
    else:
        one_order = config.scope == "global" and "blocks" not in config.takes.needs  # otherwise each layer is rounded to units
        slack = largest_unit(model, pattern) * (1 if one_order else len(layers))
        assert abs(masks.kept - round(DENSITY * masks.total)) <= (0 if pattern == "unstructured" else slack)
    for layer_name, layer in layers.items():
        assert masks[layer_name].any() or config.allow_empty
        assert not layer.weight[~masks[layer_name]].any()
        assert not layer.raw[~masks[layer_name]].any()  # enforced below the mask too
        units = parse_pattern(pattern).reduce(masks[layer_name].float())
        if pattern != "nm:2:4":
            assert torch.isin(units, torch.tensor([0.0, 1.0])).all()  # whole units only

    # It learned something and was observed.
    assert 0 <= mg.evaluate(model, task)["accuracy"] <= 1
    assert run.observations["dense"]["parameters"]["density"] == 1

    # What is saved reads back bit for bit, folded too.
    mg.save(model, tmp_path / "model")
    again = mg.load(tmp_path / "model", task.build())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    folded, images = mg.fold(again), task.example.repeat(3, 1, 1, 1)
    assert all(torch.equal(mg.core.layers.prunable_layers(folded)[n].weight, layer.weight) for n, layer in layers.items())
    torch.testing.assert_close(folded.eval()(images), model.eval()(images))

    # A finished run only reads its stages.
    run.close()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "stages").iterdir()}
    resumed = methods[name].procedure(task, Run(tmp_path / "run", {"method": name, "config": asdict(config)}), config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "stages").iterdir()} == before
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "pattern", "kind"), on_networks(REMOVING))
def test_method_that_removes(name: str, pattern: str, kind: str, digits: ImageData, starts: Path, tmp_path: Path) -> None:
    task, config = make_task(kind, digits), config_of(name, pattern)
    if "norm" in config.takes.needs and not any(isinstance(m, NORMS) for m in task.build().modules()):
        with pytest.raises(ShrinkError, match="no channel of Sequential that can go has a norm with a scale: take"):
            methods[name].check(task, config)
        return
    run = begun(tmp_path, name, config, kind, starts)
    model = methods[name].procedure(task, run, config)
    plan = mg.graph.plan_of(model)
    dense = task.build()

    # The budget is met as near as whole channels allow, and the model is smaller in fact.
    searched = "search" in run.observations
    if searched:
        freeze = run.observations["search"]["freeze"]
        assert freeze["kept"] == round(DENSITY * freeze["units"])
    elif config.density is None:
        assert abs(plan.got["flops"] - 0.5) < 0.1  # of networks this small one channel is much
    else:
        assert 0 < plan.got["density"] <= 1
        assert abs(plan.got["density"] - DENSITY) < 0.15
    if not searched:
        assert run.observations["before"]["parameters"]["all"] < sum(p.numel() for p in dense.parameters())
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())
    assert not mg.masks_of(model)
    assert 0 <= mg.evaluate(model, task)["accuracy"] <= 1

    # What is saved reads back bit for bit into a freshly built dense model.
    mg.save(model, tmp_path / "model")
    again = mg.load(tmp_path / "model", dense)
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    images = task.example.repeat(3, 1, 1, 1)
    assert torch.equal(again.eval()(images), model.eval()(images))

    # A finished run only reads its stages.
    run.close()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "stages").iterdir()}
    resumed = methods[name].procedure(task, Run(tmp_path / "run", {"method": name, "config": asdict(config)}), config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "stages").iterdir()} == before
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in model.state_dict().items())
    assert mg.graph.plan_of(resumed).kept == plan.kept


@pytest.mark.parametrize("kind", [kind for kind in NETWORKS if kind != "mlp"])
@pytest.mark.parametrize(("name", "pattern"), GATING)
def test_method_that_gates(name: str, pattern: str, kind: str, digits: ImageData, starts: Path, tmp_path: Path) -> None:
    task, config = make_task(kind, digits), config_of(name, pattern)
    run = begun(tmp_path, name, config, kind, starts)
    model = methods[name].procedure(task, run, config)

    # The targets fit the budget before the training; all weights stay, beside them are the heads.
    assert run.observations["estimate"]["honest"] <= 0.8
    gates = gates_of(model)
    assert [row["layer"] for row in run.observations["routes"]["layers"]] == list(gates)
    heads = sum(p.numel() for gate in gates.values() for p in gate.parameters())
    assert heads > 0
    assert sum(p.numel() for p in model.parameters()) == heads + sum(p.numel() for p in task.build().parameters())
    assert 0 <= mg.evaluate(model, task)["accuracy"] <= 1

    # What is saved reads back bit for bit into a freshly built dense model, gates included.
    mg.save(model, tmp_path / "model")
    again = mg.load(tmp_path / "model", task.build())
    assert gate_plan(again) == gate_plan(model)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    images = task.example.repeat(3, 1, 1, 1)
    assert torch.equal(again.eval()(images), model.eval()(images))

    # A finished run only reads its stages.
    run.close()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "stages").iterdir()}
    resumed = methods[name].procedure(task, Run(tmp_path / "run", {"method": name, "config": asdict(config)}), config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "stages").iterdir()} == before
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "pattern"), GATING)
def test_a_network_without_convolutions_has_nothing_to_gate(name: str, pattern: str, digits: ImageData) -> None:
    with pytest.raises(SelectorError, match="no convolution to gate"):
        methods[name].check(make_task("mlp", digits), config_of(name, pattern))


ORIGINALS = [
    (name, pattern)
    for cases in (MASKING, REMOVING, GATING)
    for name, pattern in dict(reversed(cases)).items()  # its first pattern with this outcome
    if methods[name].original == name
]


@pytest.mark.parametrize(("name", "pattern"), ORIGINALS)
def test_method_trains_in_bfloat16(name: str, pattern: str, digits: ImageData, starts: Path, tmp_path: Path) -> None:
    kind, config = "residual", config_of(name, pattern)
    if no_sequence(config, NETWORKS[kind]()):
        kind = "conv"
    half = {part: replace(getattr(config, part), precision="bfloat16") for part in ("dense", "train")}
    config = replace(config, **half)
    model = methods[name].procedure(make_task(kind, digits), begun(tmp_path, name, config, kind, starts), config)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
