"""Heads fitted to their targets before any training."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.errors import MicrogliaError
from microglia.dynamic import Flow, GatePlan, Passage, attach_gates, find_sites, fit_heads, gates_of, listening
from microglia.dynamic.fitting import RIDGE


class Chain(nn.Module):
    """Two normed convolutions; one channel of the input never changes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def gated(seed: int, *, width: int = 8, r: float = 0.8, softmax: bool = False) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        plain = Chain(width).eval()
    images = torch.randn(96, 3, 6, 6, generator=generator) * torch.rand(96, 3, 1, 1, generator=generator)
    images[:, 2] = 0.5
    plan = GatePlan(tuple(find_sites(Flow(plain, images[:2]), plain).sites), softmax=softmax).with_r(r)
    return attach_gates(plain, plan, generator), [(part, torch.zeros(len(part))) for part in images.split(40)]


def heard(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """What each head sees and should say when no mask acts."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hear(passage: Passage) -> None:
        found.setdefault(passage.gate.site.layer, []).append((passage.embedded, passage.target()))

    with torch.no_grad(), listening(model, hear, fade=0.0):
        for x, _ in batches:
            model(x)
    return {layer: tuple(map(torch.cat, zip(*parts, strict=True))) for layer, parts in found.items()}  # type: ignore[misc]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.integers(2, 12), st.floats(0.3, 0.95), st.booleans())
def test_a_head_is_where_the_loss_has_no_slope(seed: int, width: int, r: float, softmax: bool) -> None:
    model, batches = gated(seed, width=width, r=r, softmax=softmax)
    fit_heads(model, batches)
    for layer, (embedded, wanted) in heard(model, batches).items():
        gate = gates_of(model)[layer]
        x, weight = embedded.double(), gate.weight.detach().double()
        mean, deviation = x.mean(0), x.std(0, correction=0)
        still = deviation < 1e-6
        assert not weight[:, still].any()
        w = (weight * deviation).requires_grad_()
        b = (gate.bias.detach().double() + weight @ mean).requires_grad_()
        inputs = torch.where(still, 0.0, (x - mean) / torch.where(still, 1.0, deviation))
        entropy = functional.binary_cross_entropy_with_logits(inputs @ w.T + b, wanted.double(), reduction="none").mean(0).sum()
        loss = entropy + RIDGE * (w.square().sum() + b.square().sum())
        slopes = torch.autograd.grad(loss, (w, b))
        start = math.log(2) * wanted.shape[1]
        assert max(float(slope.abs().max()) for slope in slopes) < 2e-2
        assert loss.item() < start


def test_fitted_heads_follow_their_inputs() -> None:
    model, batches = gated(0)
    random = agreement(model, batches)
    told = fit_heads(model, batches)
    fitted, always = agreement(model, batches), usual(model, batches)
    assert told == pytest.approx(fitted)
    for layer, value in fitted.items():
        assert value > random[layer]
        assert value > always[layer]  # an answer that is the same for every input
    assert sum(fitted.values()) > sum(always.values()) + 0.02


def agreement(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    gates = gates_of(model)
    with torch.no_grad():
        return {n: float(((gates[n].logits(e) > 0) == w).double().mean()) for n, (e, w) in heard(model, batches).items()}


def usual(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    often = {layer: wanted.double().mean(0) for layer, (_, wanted) in heard(model, batches).items()}
    return {layer: float(torch.maximum(rate, 1 - rate).mean()) for layer, rate in often.items()}


def test_filters_that_never_fire_are_switched_off_and_stay_finite() -> None:
    model, batches = gated(1)
    norm = dict(model.named_modules())["norm"]
    with torch.no_grad():
        norm.weight[3], norm.bias[3] = 0.0, -1.0  # type: ignore[index]
    fit_heads(model, batches)
    embedded, wanted = heard(model, batches)["first"]
    gate = gates_of(model)["first"]
    assert not wanted[:, 3].any()
    assert not (gate.logits(embedded)[:, 3] > 0).any()
    assert all(torch.isfinite(p).all() for g in gates_of(model).values() for p in g.parameters())


@pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 3, 6, 6), None)]])
def test_no_image_is_refused(batches: list[tuple[Tensor, Any]]) -> None:
    with pytest.raises(MicrogliaError, match="at least one batch"):
        fit_heads(gated(3)[0], batches)


def test_heads_of_half_precision_are_fitted_as_well() -> None:
    model, batches = gated(0, width=24)
    half = copy.deepcopy(model).bfloat16()
    fine, coarse = fit_heads(model, batches), fit_heads(half, [(x.bfloat16(), y) for x, y in batches])
    assert all(coarse[layer] > agreement - 0.06 for layer, agreement in fine.items())
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())


def test_every_module_is_in_its_own_mode_again() -> None:
    model, batches = gated(0)
    model.train()
    model.get_submodule("norm").eval()
    fit_heads(model, batches)
    with pytest.raises(MicrogliaError, match="not object"):
        fit_heads(model, [(object(), None)])
    assert model.training
    assert not model.get_submodule("norm").training


def test_it_changes_heads_alone_and_repeats_itself() -> None:
    first, batches = gated(2)
    second, _ = gated(2)
    first.train()
    before = {name: value.clone() for name, value in first.state_dict().items() if "gate" not in name}
    fit_heads(first, iter(batches))
    fit_heads(second, batches)
    assert first.training
    assert all(torch.equal(first.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert all(p.grad is None for p in first.parameters())
