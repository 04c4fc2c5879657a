"""Static masks at the gates: the baseline, heads that start from it, gates on first convolutions, blocks of filters."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microglia as mg
from gated import counter_of, images, network, plan_of
from microglia.core.errors import BudgetError, FileError, MicrogliaError, SelectorError
from microglia.data import ImageData
from microglia.dynamic import (
    Counter,
    Flow,
    GatePlan,
    Gathered,
    attach_gates,
    blocks_of,
    find_sites,
    gate_plan,
    gates_of,
    record,
    shares,
    start_static,
    static_masks,
    targets,
)
from microglia.lab.recipe import Recipe, as_dict, identity_of, resolve
from microglia.methods import FtwtConfig, methods
from microglia.storage.run import Run
from microglia.tasks.classification import ImageSource
from microglia.tasks.task import CLASSIFICATION, CrossEntropy

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def batches(count: int = 12) -> list[tuple[Tensor, Tensor]]:
    return [(images(count, seed=3), torch.zeros(count))]


def prepared(name: str = "residual", r: float = 0.8, **fields: Any) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """A gated network with its shares and the static masks of its targets' fractions."""
    model = network(name)
    plan = plan_of(model, images(1), r)
    attach_gates(model, GatePlan(plan.sites, r=plan.r, **fields), torch.Generator().manual_seed(0))
    share = shares(model, batches(), 12, torch.device("cpu"))
    kept = {layer: float(targets(part, r).double().mean()) for layer, part in share.items()}
    return model, share, static_masks(share, kept, counter(name))


@functools.cache
def counter(name: str = "residual") -> Counter:  # a trace takes long
    return counter_of(network(name), images(1))


# ------------------------------------------------------------------------------------------------------------- the masks
def test_masks_keep_the_largest_mean_mass() -> None:
    share = {"a": torch.tensor([[0.25, 0.5, 0.25, 0.0], [0.25, 0.5, 0.25, 0.0]])}  # a tie
    assert static_masks(share, {"a": 0.5}, counter())["a"].tolist() == [True, True, False, False]
    assert static_masks(share, {"a": 0.7}, counter())["a"].tolist() == [True, True, True, False]
    assert static_masks(share, {"a": 0.0}, counter())["a"].tolist() == [False, True, False, False]  # one stays


@pytest.mark.parametrize("count", ["honest", "paper"])
def test_masks_of_a_budget_are_the_largest_that_fit(count: Any) -> None:
    _, share, _ = prepared()
    kept = {layer: 0.5 + 0.05 * number for number, layer in enumerate(share)}
    masks = static_masks(share, kept, counter(), flops=0.6, count=count)
    spent = counter()({layer: mask[None] for layer, mask in masks.items()}).of(count)[0] / counter().dense
    assert 0.5 < spent <= 0.6
    fewer = static_masks(share, kept, counter(), flops=0.4, count=count)
    assert all(not (fewer[layer] & ~masks[layer]).any() for layer in masks)  # nested
    assert all(mask.all() for mask in static_masks(share, kept, counter(), flops=1.5, count=count).values())
    with pytest.raises(BudgetError, match="one unit in each layer costs more"):
        static_masks(share, kept, counter(), flops=1e-4, count=count)


def test_a_gated_network_that_starts_static_computes_what_the_static_masks_leave() -> None:
    """At its first step: the same outputs as the network whose filters are masked by hand, for every input."""
    model, share, masks = prepared()
    start_static(model, share, masks)
    x = images(5, seed=8)
    by_hand = network("residual")
    modules = dict(by_hand.named_modules())
    for site in gate_plan(model).sites:  # type: ignore[union-attr]
        mask = masks[site.layer].float()[:, None, None]
        modules[site.carrier].register_forward_hook(lambda module, args, out, mask=mask: out * mask)
    assert torch.equal(model(x), by_hand(x))
    assert not all(bool(mask.all()) for mask in masks.values())
    for layer, mask in record(model, batches()).masks.items():
        assert torch.equal(mask, masks[layer].expand_as(mask))


def test_the_start_is_the_best_constant_with_the_signs_of_the_mask() -> None:
    model, share, masks = prepared()
    start_static(model, share, masks)
    for layer, gate in gates_of(model).items():
        likely = targets(share[layer], 0.8).double().mean(0).clamp(0.5 / 12, 1 - 0.5 / 12)
        odds, bias = (likely / (1 - likely)).log().float(), gate.bias.detach()
        agreed = (odds.abs() >= 0.1) & ((odds > 0) == masks[layer])
        torch.testing.assert_close(bias[agreed], odds[agreed])
        assert torch.all(bias[~agreed].abs() == torch.tensor(0.1))
        assert torch.equal(bias > 0, masks[layer])
        assert not gate.weight.any()


def test_routes_open_up_while_heads_learn() -> None:
    model, share, masks = prepared("resnet8", softmax=False)
    start_static(model, share, masks)
    pruner = mg.methods.Ftwt(model.train(), total_steps=30, cooldown=1.0, head_lr=1.0)
    optimizer = torch.optim.SGD(pruner.parameters(), lr=1.0, momentum=0.9)
    for step in range(30):
        model(images(16, seed=step))
        optimizer.zero_grad()
        pruner.penalty().backward()  # type: ignore[union-attr]
        optimizer.step()
        pruner.step(optimizer)
    pruner.finish()
    routes = record(model.eval(), [(images(16, seed=50), torch.zeros(16))]).masks
    assert any(len(torch.unique(mask, dim=0)) > 1 for mask in routes.values())


# ---------------------------------------------------------------------------------------------------------- static gates
def test_a_static_gate_costs_nothing_and_gathers_to_the_same(tmp_path: Path) -> None:
    model, share, masks = prepared(static=True)
    start_static(model, share, masks)
    x = images(3).double()
    assert all(gate.weight.numel() == 0 for gate in gates_of(model).values())
    plain = network("residual")
    free = Counter(plain, counter().flow, gate_plan(model), images(1))  # type: ignore[arg-type]
    assert free.heads == 0
    mg.save(model, tmp_path / "model")
    again = mg.load(tmp_path / "model", network("residual"))
    assert gate_plan(again) == gate_plan(model)
    model = model.double()
    fast = Gathered(model, x[:1])
    torch.testing.assert_close(fast(x), model(x), **EXACT)
    assert fast.macs == 3 * (int(free({layer: mask[None] for layer, mask in masks.items()}).honest[0]) - free.rest)


def test_a_plan_that_says_nothing_new_is_written_as_before() -> None:
    plan = plan_of(network("plain"), images(1))
    assert set(plan.to_dict()) == {"sites", "pool", "softmax", "rule", "r", "keep"}
    layer = plan.sites[0].layer
    new = GatePlan(plan.sites, blocks={layer: 4}, static=True)
    assert GatePlan.from_dict(json.loads(json.dumps(new.to_dict()))) == new


@pytest.mark.parametrize(
    "wrong",
    [
        {"blocks": {"0": 3}},
        {"blocks": {"0": 0}},
        {"blocks": {"none": 4}},
        {"static": 1},
        {"keep": {"0": 3}, "blocks": {"0": 4}},
    ],
)
def test_a_damaged_plan_is_refused(wrong: dict[str, Any]) -> None:
    values = json.loads(json.dumps(plan_of(network("plain"), images(1)).to_dict()))  # its first layer has eight filters
    with pytest.raises(FileError, match="The plan of the gates is damaged"):
        GatePlan.from_dict({**values, **wrong})


# ---------------------------------------------------------------------------------------------- first convolutions, blocks
@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("residual", ["one", "three", "five"]),
        ("plain", ["0", "3", "5", "10", "13"]),
        ("branches", ["stem", "left", "right", "after", "last"]),
    ],
)
def test_gates_on_first_convolutions(name: str, places: list[str]) -> None:
    """Nothing that a sum reads: neither the stem of a residual network nor the last convolution of a block."""
    model = network(name)
    flow = counter(name).flow
    everywhere = [site.layer for site in find_sites(flow, model).sites]
    found = find_sites(flow, model, places="first")
    assert [site.layer for site in found.sites] == [layer for layer in everywhere if layer in places]
    if name == "residual":
        assert found.left_out["two"] == "a sum reads it, and gates are for first convolutions"


def test_blocks_where_a_layer_has_two() -> None:
    sites = plan_of(network("residual"), images(1)).sites  # 8, 8, 8, 12, 12, 20, 20 filters
    assert set(blocks_of(sites, 4).values()) == {4}
    assert len(blocks_of(sites, 4)) == 7
    assert len(blocks_of(sites, 6)) == 2
    assert blocks_of(sites, 1) == {}
    with pytest.raises(SelectorError, match="the widest has 20: give a smaller block"):
        blocks_of(sites, 16)


@pytest.mark.parametrize("name", ["residual", "depthwise", "plain"])
@pytest.mark.parametrize("double", [True, False])
def test_blocks_gather_to_what_the_masks_leave(name: str, double: bool) -> None:
    model = network(name)
    plan = plan_of(model, images(1))
    attach_gates(model, GatePlan(plan.sites, r=plan.r, blocks=blocks_of(plan.sites, 4)), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for gate in gates_of(model).values():
            gate.weight.normal_(0, 30, generator=torch.Generator().manual_seed(5))
            gate.weight -= gate.weight.mean(1, keepdim=True)
            gate.bias.fill_(0.2)
    x = images(4, seed=2)
    model, x = (model.double(), x.double()) if double else (model, x)
    fast = Gathered(model, x[:1])
    out = torch.cat([fast(one) for one in x.split(1)])
    torch.testing.assert_close(out, model(x), **(EXACT if double else {"rtol": 1e-4, "atol": 1e-4}))
    torch.testing.assert_close(fast(x), model(x), **(EXACT if double else {"rtol": 1e-4, "atol": 1e-4}))
    routes = record(model, [(x, torch.zeros(4))])
    for layer, mask in routes.masks.items():
        for chosen in (mask, routes.targets[layer]):
            block = chosen.unflatten(1, (-1, gates_of(model)[layer].block))
            assert torch.equal(block.all(2), block.any(2))  # whole blocks
    assert max(gate.block for gate in gates_of(model).values()) == 4
    assert any(0 < mask.double().mean() < 1 for mask in routes.masks.values())


def test_blocks_on_large_maps_gather_to_what_the_masks_leave() -> None:
    """Where a whole input has many pixels, which oneDNN convolves, and where weights are read where they lie."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.Sigmoid(), nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(),
            nn.Conv2d(64, 48, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5),
        ).eval()  # fmt: skip
    x = torch.rand(1, 3, 48, 48)
    sites = find_sites(Flow(model, x), model, layers=("2", "4")).sites
    attach_gates(model, GatePlan(sites, blocks=blocks_of(sites, 16)))
    with torch.no_grad():
        for gate, bias in zip(gates_of(model).values(), ([1, -1, -1, 1], [-1, 1, 1]), strict=True):
            gate.weight.zero_()
            gate.bias.copy_(torch.tensor(bias))
    with torch.no_grad():
        torch.testing.assert_close(Gathered(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_share_of_a_block_is_the_sum_of_its_filters() -> None:
    single, blocks = prepared()[1], prepared(blocks={"one": 4})[1]
    torch.testing.assert_close(blocks["one"], single["one"].unflatten(1, (2, 4)).sum(2))
    assert torch.equal(blocks["stem"], single["stem"])


# ------------------------------------------------------------------------------------------------------------- the method
def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(32 * 36, 10),
        )  # fmt: skip


@pytest.fixture(scope="module")
def task() -> mg.Task:
    data, few = mg.data.load_data("digits"), torch.arange(96)
    parts = {s: getattr(data, s).subset(few[: len(getattr(data, s))]) for s in ("train", "validation", "test")}
    small = ImageData(name="digits", classes=10, **parts, normalization=data.normalization, augmentation=data.augmentation)
    return mg.Task("digits", build, ImageSource(small), CrossEntropy(), CLASSIFICATION, data.train.images[:1] / 255)


def execute(task: mg.Task, directory: Path | None = None, **settings: Any) -> tuple[nn.Module, Run]:
    short = mg.FitConfig(epochs=2, batch_size=32, lr=0.05)
    config = FtwtConfig(**{"dense": short, "train": short, "images": 96} | settings)
    run = Run(directory, {"config": repr(config)})
    model = methods["ftwt"].procedure(task, run, config)
    run.close()
    return model, run


@pytest.mark.parametrize("settings", [{"r": 0.7}, {"flops": 0.6}, {"flops": 0.7, "block": 4, "gates": "first"}])
def test_the_static_baseline_meets_the_budget_with_one_route(task: mg.Task, tmp_path: Path, settings: dict[str, Any]) -> None:
    model, run = execute(task, tmp_path, mode="static", **settings)
    routes = run.observations["routes"]
    assert (routes["routes"], routes["heads"], routes["honest"]["std"]) == (1, 0, 0)
    assert routes["honest"]["mean"] == pytest.approx(run.observations["static"]["honest"])  # trained, and still the same masks
    if flops := settings.get("flops"):
        assert flops - 0.1 < routes["honest"]["mean"] <= flops
    again, told = execute(task, tmp_path, mode="static", **settings)  # finished: only read
    assert told.observations == run.observations
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_heads_that_start_static_decide_at_first_as_the_baseline(task: mg.Task) -> None:
    """Equal outputs before the first step, bit for bit: rates so small that nothing moves."""
    still: dict[str, Any] = {"train": mg.FitConfig(epochs=0, batch_size=32), "r": 0.7}
    static, _ = execute(task, mode="static", **still)
    dynamic, run = execute(task, initial="static", **still)
    x = task.data.batches("test", 32).epoch(0)
    for inputs, _labels in x:
        assert torch.equal(static(inputs), dynamic(inputs))
    assert run.observations["routes"]["routes"] == 1
    assert all(gate.weight.numel() for gate in gates_of(dynamic).values())


def test_a_start_that_is_stopped_goes_on_in_the_same_bits(task: mg.Task, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"flops": 0.6, "initial": "static", "calibrate": True, "softmax": False}
    expected, whole = execute(task, tmp_path / "whole", **settings)
    (tmp_path / "cut" / "stages").mkdir(parents=True)
    for stage in ("dense", "dense-observed", "estimate", "static"):  # as if it had been killed after the heads were set
        for file in (tmp_path / "whole" / "stages").glob(f"{stage}.*"):
            (tmp_path / "cut" / "stages" / file.name).write_bytes(file.read_bytes())
    model, resumed = execute(task, tmp_path / "cut", **settings)
    assert resumed.observations == whole.observations
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "static", "initial": "static"}, "static or fitted where heads are trained; got 'static' with mode 'static'"),
        ({"initial": "dense"}, "initial is random, fitted or static.*'dense'"),
        ({"gates": "last"}, "gates is all or first.*'last'"),
        ({"block": 0}, "block is the number of filters.*got 0"),
    ],
)
def test_a_config_that_means_nothing(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        FtwtConfig(r=0.8, **settings)


@pytest.mark.parametrize("settings", [{"initial": "static"}, {"mode": "static"}])
def test_a_loop_of_one_s_own_starts_heads_itself(settings: dict[str, Any]) -> None:
    with pytest.raises(MicrogliaError, match="start_static"):
        mg.methods.Ftwt(nn.Conv2d(3, 4, 3), r=0.8, total_steps=4, example_inputs=torch.zeros(1, 3, 8, 8), **settings)


def test_later_settings_at_their_defaults_leave_the_identity_of_earlier_runs() -> None:
    def recipe(**prune: Any) -> Recipe:
        return resolve({"model": "resnet8", "data": "digits", "method": "ftwt", "prune": {"r": 0.8, **prune}})

    plain, first = recipe(), recipe(gates="first")
    assert not {"gates", "block"} & set(as_dict(plain)["prune"])
    assert as_dict(first)["prune"]["gates"] == "first"
    assert identity_of(plain) == identity_of(recipe(gates="all", block=1)) != identity_of(first)
