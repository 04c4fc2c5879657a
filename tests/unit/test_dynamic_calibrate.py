"""The common threshold of the heads: budgets that trained gates meet."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microglia.dynamic import Counter, Flow, GatePlan, attach_gates, calibrate, find_sites, gates_of, record

BATCHES = 3
SHARES = {"layers.0": 0.8, "layers.1": 0.5, "layers.2": 0.6}


class Chain(nn.Module):
    """Three convolutions one after another, so that the masks of one change what the next head sees."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 32, 24)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


def gated(seed: int, bias: float) -> tuple[nn.Module, Counter, list[tuple[Tensor, Tensor]]]:
    """A chain whose heads look at their input, and keep more or less by a common bias."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        plain = Chain().eval()
    example = torch.randn(2, 3, 8, 8, generator=generator)
    flow = Flow(plain, example)
    plan = GatePlan(tuple(find_sites(flow, plain).sites), softmax=False)
    counter = Counter(plain, flow, plan, example)
    model = attach_gates(plain, plan, generator)
    for gate in gates_of(model).values():
        with torch.no_grad():
            gate.bias += bias
    batches = [(torch.randn(16, 3, 8, 8, generator=generator), torch.zeros(16)) for _ in range(BATCHES)]
    return model, counter, batches


def cost(model: nn.Module, counter: Counter, batches: Any, count: Any) -> float:
    costs = counter(record(model, batches).masks)
    return float(costs.of(count).mean()) / costs.dense


@pytest.mark.parametrize("count", ["honest", "paper"])
@pytest.mark.parametrize(("flops", "bias"), [(0.3, 0.2), (0.5, 0.2), (0.7, -0.2), (0.9, -0.2)])
def test_the_operations_come_to_what_was_asked(flops: float, bias: float, count: Any) -> None:
    model, counter, batches = gated(0, bias)
    assert abs(cost(model, counter, batches, count) - flops) > 0.05
    before = {layer: gate.bias.clone() for layer, gate in gates_of(model).items()}
    moved = calibrate(model, batches, counter, SHARES, flops=flops, count=count)
    assert cost(model, counter, batches, count) == pytest.approx(flops, abs=0.02)
    for layer, gate in gates_of(model).items():
        torch.testing.assert_close(gate.bias - before[layer], torch.full_like(gate.bias, moved[layer]))


def test_each_layer_keeps_its_share_times_one_factor() -> None:
    model, counter, batches = gated(4, 0.0)
    for gate in gates_of(model).values():  # as after a short training: all logits of a layer close together
        with torch.no_grad():
            gate.weight.mul_(0.01)
            gate.bias.copy_(0.5 + 0.01 * gate.bias)
    calibrate(model, batches, counter, SHARES, flops=0.4)
    found = {layer: float(mask.float().mean()) for layer, mask in record(model, batches).masks.items()}
    factors = [found[layer] / share for layer, share in SHARES.items()]
    assert max(factors) - min(factors) < 0.05
    assert cost(model, counter, batches, "honest") == pytest.approx(0.4, abs=0.02)


def test_what_is_met_stays() -> None:
    model, counter, batches = gated(1, 0.0)
    calibrate(model, batches, counter, SHARES, flops=0.5)
    masks = record(model, batches).masks
    assert all(abs(step) < 0.01 for step in calibrate(model, batches, counter, SHARES, flops=0.5).values())
    again = record(model, batches).masks
    assert sum(int((again[layer] != mask).sum()) for layer, mask in masks.items()) <= BATCHES * 16


def test_it_leaves_modes_weights_and_statistics_alone() -> None:
    model, counter, batches = gated(2, 0.1)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items() if not name.endswith("gate.bias")}
    calibrate(model, batches, counter, SHARES, flops=0.6)
    assert model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(("flops", "kept"), [(1.1, 1.0), (0.0, 0.0)])
def test_out_of_reach_keeps_all_or_nothing(flops: float, kept: float) -> None:
    model, counter, batches = gated(3, 0.0)
    calibrate(model, batches, counter, SHARES, flops=flops)
    masks = record(model, batches).masks
    assert {float(mask.float().mean()) for mask in masks.values()} == {kept}
