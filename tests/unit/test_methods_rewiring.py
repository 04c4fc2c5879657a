"""DSR and Deep R: the number of weights is constant, signs are fixed, weights move to where most survive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import BudgetError
from microglia.methods import DeepR, Dsr
from microglia.scores import Evidence


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 1, 6, 6, generator=generator), torch.randint(10, (16,), generator=generator)


def made(kind: Any, model: nn.Module, **settings: Any) -> Any:
    evidence = Evidence(generator=torch.Generator().manual_seed(0))
    return kind(model, **{"density": 0.2, "total_steps": 24, "evidence": evidence} | settings)


def advance(model: nn.Module, pruner: Any, optimizer: torch.optim.Optimizer) -> None:
    x, y = batch()
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    assert not pruner.replaces_step()
    optimizer.step()
    pruner.step(optimizer)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


# ------------------------------------------------------------------------------------------------------------------ dsr
def test_the_number_in_the_network_is_constant_and_moves_between_layers() -> None:
    model = network()
    pruner = made(Dsr, model, every=2, threshold=0.05)
    optimizer, layers = momentum(model), pruner.layers
    before = {name: int(mask.sum()) for name, mask in mg.masks_of(model).items()}
    total = sum(before.values())
    for _ in range(12):
        advance(model, pruner, optimizer)
        masks = mg.masks_of(model)
        assert masks.kept == total
        assert all(not layers[name].raw[~mask].any() for name, mask in masks.items())
    assert {name: int(mask.sum()) for name, mask in masks.items()} != before
    assert pruner.report()["updates"] == 6
    assert pruner.report()["grown"] > 0


def test_all_below_the_threshold_go_and_growth_follows_what_survives() -> None:
    model = network()
    pruner = made(Dsr, model, every=1, threshold=0.1, drop=0.3)
    with torch.no_grad():
        pruner.layers["3.weight"].raw.mul_(0.3)  # most of it is below
    masks = mg.masks_of(model)
    small = {name: masks[name] & (layer.raw.detach().abs() < 0.1) for name, layer in pruner.layers.items()}
    staying = {name: masks[name] & ~small[name] for name in small}
    removed, survivors = sum(int(s.sum()) for s in small.values()), {name: int(s.sum()) for name, s in staying.items()}
    pruner._update(1, None)
    after = mg.masks_of(model)
    for name, kept in staying.items():
        assert after[name][kept].all()
        grown = int(after[name].sum()) - survivors[name]
        share = max(1, survivors[name]) / sum(max(1, count) for count in survivors.values())
        assert grown == pytest.approx(removed * share, abs=1.01)
        assert not pruner.layers[name].raw[after[name] & ~kept].any()  # they start at 0, those just removed too


@pytest.mark.parametrize(("threshold", "factor"), [(10.0, 0.5), (1e-9, 2.0)])
def test_the_threshold_doubles_or_halves_until_about_enough_go(threshold: float, factor: float) -> None:
    pruner = made(Dsr, network(), every=1, threshold=threshold, allow_empty=True)
    pruner._update(1, None)
    assert pruner.threshold == threshold * factor
    with pytest.raises(BudgetError, match="threshold is above 0"):
        made(Dsr, network(), threshold=0.0)


# --------------------------------------------------------------------------------------------------------------- deep r
def test_each_layer_keeps_its_number_and_every_weight_its_sign() -> None:
    model = network()
    pruner = made(DeepR, model, temperature=1e-3)
    optimizer, layers = momentum(model), pruner.layers
    before = {name: int(mask.sum()) for name, mask in mg.masks_of(model).items()}
    signs = {name: sign.clone() for name, sign in pruner.signs.items()}
    for _ in range(10):
        advance(model, pruner, optimizer)
        masks = mg.masks_of(model)
        assert {name: int(mask.sum()) for name, mask in masks.items()} == before
        for name, layer in layers.items():
            assert (layer.raw * signs[name] >= 0).all()
            assert not layer.raw[~masks[name]].any()
            assert not optimizer.state[layer.raw]["momentum_buffer"][~masks[name]].any()
    assert pruner.report()["rewired"] > 10


def test_a_step_is_the_pull_and_the_noise_of_the_optimizers_rate() -> None:
    model = network()
    pruner = made(DeepR, model, l1=0.01, temperature=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    layer = pruner.layers["1.weight"]
    before = layer.raw.detach().clone()
    pruner.step(optimizer)  # without a gradient step
    shrunk = (before.abs() - 0.5 * 0.01).clamp_min(0) * before.sign()
    torch.testing.assert_close(layer.raw.detach(), shrunk)
    assert pruner.report()["rewired"] == sum(int(((w != 0) & (w.abs() < 0.005)).sum()) for w in _weights(made, 0.0))
    pruner = made(DeepR, model := network(), l1=0.0, temperature=0.02)
    before = pruner.layers["1.weight"].raw.detach().clone()
    pruner.step(torch.optim.SGD(model.parameters(), lr=0.25))
    moved = (pruner.layers["1.weight"].raw.detach() - before)[(before != 0) & (pruner.layers["1.weight"].raw != 0)]
    assert 0 < float(moved.std()) < 2 * (2 * 0.25 * 0.02) ** 0.5
    with pytest.raises(BudgetError, match="at least 0"):
        made(DeepR, network(), l1=-1.0)


def _weights(make: Any, temperature: float) -> list[Tensor]:
    return [layer.raw.detach() for layer in make(DeepR, network(), temperature=temperature).layers.values()]
