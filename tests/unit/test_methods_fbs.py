"""FBS: the boosted output, exact numbers of channels, who trains the heads, the budget, gathered execution, resumption."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from gated import SHAPE, images, network
from microglia.core.errors import BudgetError, SelectorError
from microglia.data import ImageData
from microglia.dynamic import (
    Counter,
    Flow,
    GatePlan,
    Gathered,
    attach_gates,
    choose_density,
    find_sites,
    gate_plan,
    gates_of,
    record,
)
from microglia.methods import Fbs, FbsConfig, methods
from microglia.methods.fbs import plan_gates
from microglia.storage.run import Run
from microglia.tasks.classification import ImageSource
from microglia.tasks.task import CLASSIFICATION, CrossEntropy


class Block(nn.Module):
    """A convolution with a norm and one with a bias, both followed by an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.head = nn.Conv2d(16, 20, 3), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def block(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Block()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    return model.eval()


@pytest.fixture(scope="module")
def plan() -> GatePlan:
    model = block()
    return plan_gates(model, Flow(model, images(1)), FbsConfig(flops=0.5), images(1))[0]


def boosted(plan: GatePlan, keep: int = 7) -> nn.Module:
    model = attach_gates(block(), plan, torch.Generator().manual_seed(1))
    for gate in gates_of(model).values():
        gate.keep = keep
        nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(2))
    return model


def test_the_output_is_the_formula(plan: GatePlan) -> None:
    model, x = boosted(plan), images(4)
    first, second = gates_of(model).values()

    def layer(x: Tensor, normed: Tensor, beta: Tensor, gate: Any) -> Tensor:
        """Spec 8.1 with a norm whose scale stays: relu(pi gamma n + [pi > 0] beta)."""
        saliency = functional.relu(x.mean((2, 3)) @ gate.weight.T + gate.bias)
        best = saliency.topk(7, dim=1)
        pi = torch.zeros_like(saliency).scatter_(1, best.indices, best.values)[:, :, None, None]
        return functional.relu(pi * normed + (pi > 0) * beta[:, None, None])

    plain = block()
    normed = plain.norm(plain.first(x)) - plain.norm.bias[:, None, None]
    y = layer(x, normed, plain.norm.bias, first)
    inner = functional.conv2d(y, plain.second.weight)
    expected = plain.head(layer(y, inner, plain.second.bias, second).mean((2, 3)))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_at_most_the_asked_number_of_channels_and_none_without_saliency(plan: GatePlan) -> None:
    model = boosted(plan)
    masks = record(model, [(images(8), torch.zeros(8))]).masks
    assert all((mask.sum(1) <= 7).all() for mask in masks.values())
    with torch.no_grad():
        for gate in gates_of(model).values():
            gate.weight.zero_()
            gate.bias.fill_(-1).narrow(0, 0, 3).fill_(1)  # three channels have a saliency
    masks = record(model, [(images(8), torch.zeros(8))]).masks
    assert all((mask.sum(1) == 3).all() for mask in masks.values())


@pytest.mark.parametrize("name", ["residual", "depthwise", "branches"])
def test_gathered_execution_is_equal(name: str) -> None:
    model = network(name)
    sites = find_sites(Flow(model, images(1)), model).sites
    plan = GatePlan(sites, softmax=False, boost=True, keep={site.layer: site.outputs // 2 for site in sites})
    attach_gates(model, plan, torch.Generator().manual_seed(0))
    for gate in gates_of(model).values():
        nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(3))
    model, x = model.double(), images(3).double()
    fast = Gathered(model, x[:1])
    torch.testing.assert_close(fast(x), model(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(fast(x[:1]), model(x[:1]), rtol=1e-11, atol=1e-11)
    fast.limits.update(dict.fromkeys((site.layer for site in sites), 0.0))  # each layer whole, then masked
    torch.testing.assert_close(fast(x), model(x), rtol=1e-11, atol=1e-11)


def test_the_task_trains_the_heads_through_kept_channels_alone(plan: GatePlan) -> None:
    model, x = boosted(plan), images(1)
    kept = record(model, [(x, torch.zeros(1))]).masks
    functional.cross_entropy(model(x), torch.tensor([1])).backward()
    for layer, gate in gates_of(model).items():
        assert gate.bias.grad is not None
        assert not gate.bias.grad[~kept[layer][0]].any()
        assert gate.bias.grad.any()


def test_the_penalty_is_the_lasso(plan: GatePlan) -> None:
    model = boosted(plan).train()
    pruner = Fbs(model, flops=0.5, lasso=0.5, total_steps=4, lower=0.0)
    heard = []
    for gate in gates_of(model).values():
        own = gate._wire.listener
        gate.listen(lambda passage, own=own: (heard.append(passage.logits), own(passage)))
    model(images(6))
    expected = 0.5 * sum(float(logits.clamp(min=0).sum(1).mean()) for logits in heard)
    assert float(pruner.penalty()) == pytest.approx(expected, rel=1e-6)
    assert pruner.penalty() == 0.0


def test_kept_channels_fall_to_the_budget(plan: GatePlan) -> None:
    model = attach_gates(block(), plan)
    pruner = Fbs(model, flops=0.5, total_steps=8, lower=0.5)
    keeps = []
    for _ in range(8):
        keeps.append([gate.keep for gate in gates_of(model).values()])
        pruner.step()
    assert keeps[0] == [16, 20]
    assert keeps[4] == keeps[7] == list(plan.keep.values())
    assert all(later <= earlier for a, b in itertools.pairwise(keeps) for earlier, later in zip(a, b, strict=True))
    again = Fbs(attach_gates(block(), plan), flops=0.5, total_steps=8, lower=0.5)
    pruner.load_state_dict({"steps": 2})
    again.load_state_dict(pruner.state_dict())
    assert [gate.keep for gate in again.gates.values()] == keeps[2]
    assert [gate.keep for gate in gates_of(again.finish()).values()] == keeps[7]


def test_the_density_is_the_largest_that_fits() -> None:
    model = network("residual")
    flow = Flow(model, images(1))
    plan = GatePlan(find_sites(flow, model).sites, softmax=False, boost=True)
    counter = Counter(model, flow, plan, images(1))

    def cost(keep: dict[str, int]) -> float:
        masks = {s.layer: torch.arange(s.outputs)[None] < keep[s.layer] for s in plan.sites}
        return float(counter(masks).honest[0]) / counter.dense

    density, keep = choose_density(plan, 0.5, counter)
    assert cost(keep) <= 0.5
    more = {site.layer: -int(-(density + 1e-4) * site.outputs // 1) for site in plan.sites}
    assert cost(more) > 0.5
    assert choose_density(plan, 1.2, counter) == (1.0, {site.layer: site.outputs for site in plan.sites})
    with pytest.raises(BudgetError, match="one filter a layer"):
        choose_density(plan, 0.001, counter)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"lasso": -1.0}, "lasso is 0 or more"), ({"lower": 2.0}, "lower a fraction"),
     ({"count": "all"}, "count is honest or paper"),
     ({"density": 0.5}, "takes flops, and not density: all weights stay")],
)  # fmt: skip
def test_a_config_that_means_nothing(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        FbsConfig(flops=0.5, **settings)


def test_what_is_refused(plan: GatePlan) -> None:
    with pytest.raises(BudgetError, match="needs example_inputs"):
        Fbs(block(), flops=0.5, total_steps=3)
    with pytest.raises(BudgetError, match="takes flops, the fraction of the operations"):
        Fbs(block(), total_steps=3, example_inputs=images(1))
    with pytest.raises(BudgetError, match="gates that boost"):
        Fbs(attach_gates(block(), GatePlan(plan.sites)), flops=0.5, total_steps=3)
    with pytest.raises(SelectorError, match="no convolution to gate"):
        Fbs(nn.Sequential(nn.Flatten(), nn.Linear(432, 5)), flops=0.5, total_steps=3, example_inputs=torch.zeros(1, *SHAPE))


def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip


def test_an_interrupted_training_ends_in_the_same_bits(tmp_path: Path) -> None:
    data, few = mg.data.load_data("digits"), torch.arange(96)
    parts = {s: getattr(data, s).subset(few) for s in ("train", "validation", "test")}
    small = ImageData(name="digits", classes=10, **parts, normalization=data.normalization, augmentation=data.augmentation)
    task = mg.Task("digits", build, ImageSource(small), CrossEntropy(), CLASSIFICATION, data.train.images[:1] / 255)
    config = FbsConfig(flops=0.6, dense=mg.FitConfig(epochs=0), train=mg.FitConfig(epochs=2, batch_size=32, lr=0.05))

    def run_in(directory: Path, stop: int | None = None) -> tuple[nn.Module, Run]:
        run = Run(directory, {"config": repr(config)})
        log = run.log

        def interrupt(stage: str, rows: list[dict[str, Any]]) -> None:
            log(stage, rows)
            if stage == "train" and len(rows) == stop:
                raise KeyboardInterrupt

        run.log = interrupt  # type: ignore[method-assign]
        try:
            return methods["fbs"].procedure(task, run, config), run
        finally:
            run.close()

    expected, whole = run_in(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "cut", stop=1)
    model, resumed = run_in(tmp_path / "cut")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())
    assert resumed.observations == whole.observations
    assert gate_plan(model) == gate_plan(expected)
    assert whole.observations["routes"]["honest"]["mean"] <= whole.observations["estimate"]["honest"] + 1e-9
    assert 0.5 < whole.observations["estimate"]["honest"] <= 0.6
