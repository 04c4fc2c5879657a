"""Pruners stepped in anybody's loop, and what their configs refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import BudgetError, PatternError, SelectorError, UnknownNameError
from microglia.core.schedules import schedules
from microglia.methods import methods


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 10))


def loop(model: nn.Module, pruner: Any, steps: int) -> list[int]:
    """Trains on noise with momentum and weight decay; returns the kept weights after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    kept = []
    for _ in range(steps):
        inputs = torch.randn(16, 20, generator=generator)
        targets = torch.randint(10, (16,), generator=generator)
        loss = functional.cross_entropy(model(inputs), targets) + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step(optimizer)
        kept.append(pruner.masks.kept)
        for layer in mg.core.layers.prunable_layers(model).values():  # momentum and decay never bring a removed weight back
            removed = ~mg.masks_of(model)[layer.name] if mg.masks_of(model) else torch.zeros(layer.shape, dtype=torch.bool)
            state = optimizer.state.get(layer.raw, {})
            assert not layer.raw[removed].any()
            assert "momentum_buffer" not in state or not state["momentum_buffer"][removed].any()
    return kept


@pytest.mark.parametrize("schedule", list(schedules))
def test_gradual_follows_its_schedule_to_the_count(schedule: str) -> None:
    model = network()
    total = 20 * 30 + 30 * 30 + 30 * 10
    pruner = mg.methods.Gradual(model, density=0.1, total_steps=40, schedule=schedule, begin=0.25, end=0.75, updates=5)
    kept = loop(model, pruner, 40)
    expected, density = [], total
    due = {14: 1 / 5, 18: 2 / 5, 22: 3 / 5, 26: 4 / 5, 30: 1.0}
    for step in range(1, 41):
        if step in due:
            density = round(schedules[schedule](due[step], total, total // 10))
        expected.append(density)
    assert kept == expected
    assert pruner.finish().kept == total // 10
    assert kept == sorted(kept, reverse=True)


def test_gradual_masks_are_nested() -> None:
    model = network()
    pruner = mg.methods.Gradual(model, density=0.05, total_steps=20, updates=10, end=1.0)
    before = pruner.masks
    for _ in range(20):
        loop(model, pruner, 1)
        assert pruner.masks.nested_in(before)
        before = pruner.masks


def test_gradual_finishes_a_training_that_was_cut_short() -> None:
    model = network()
    pruner = mg.methods.Gradual(model, density=0.1, total_steps=100)
    loop(model, pruner, 3)
    assert pruner.masks.density > 0.5
    assert pruner.finish().kept == 180


def test_gradual_goes_on_from_its_state() -> None:
    def run(interrupt: bool) -> mg.core.masks.MaskSet:
        model = network()
        pruner = mg.methods.Gradual(model, density=0.2, total_steps=12, updates=6, end=1.0, score="random")
        for step in range(12):
            if interrupt and step == 5:
                state, weights = pruner.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
                model = network()
                pruner = mg.methods.Gradual(model, density=0.2, total_steps=12, updates=6, end=1.0, score="random")
                model.load_state_dict(weights)
                pruner.load_state_dict(state)
            pruner.step()
        return pruner.finish()

    assert run(interrupt=True).same(run(interrupt=False))


def test_gradual_reaches_an_n_of_m_pattern() -> None:
    model = network()
    pruner = mg.methods.Gradual(model, pattern="nm:2:4", total_steps=10, updates=4, end=1.0)
    loop(model, pruner, 10)
    rows = pruner.finish()["0.weight"].view(-1, 4)
    assert (rows.sum(1) == 2).all()


def test_oneshot_by_keyword_pattern_object_and_budget() -> None:
    assert mg.methods.OneShot(network(), density=0.25).masks.kept == 450
    assert mg.methods.OneShot(network(), pattern=mg.Channel(), density=0.5, scope="layer").masks["0.weight"].any(1).sum() == 15
    model = network()
    everything = sum(p.numel() for p in model.parameters())
    kept = mg.methods.OneShot(model, params=0.5).masks.kept
    assert abs((kept + 70) / everything - 0.5) <= 1 / everything  # ShrinkBench's fraction to keep, to within one weight


def test_params_and_density_together_take_the_tighter() -> None:
    assert mg.methods.OneShot(network(), params=0.9, density=0.2).masks.kept == 360
    assert mg.methods.OneShot(network(), params=0.1, density=0.9).masks.kept < 360


def test_excluded_protected_and_given_layers() -> None:
    model = network()
    excluded = mg.methods.OneShot(model, density=0.1, exclude=["4"])
    assert set(excluded.masks) == {"0.weight", "2.weight"}
    assert excluded.masks.kept == 150
    protected = mg.methods.OneShot(network(), density=0.5, protect=["4"]).masks
    assert protected["4.weight"].all()
    assert protected.kept == 900
    given = mg.methods.OneShot(network(), scope={"0.weight": 0.5, "2.weight": 0.1, "4.weight": 1.0}).masks
    assert [int(m.sum()) for m in given.values()] == [300, 90, 300]


def test_pruning_again_only_removes_more() -> None:
    model = network()
    first = mg.methods.OneShot(model, density=0.5).masks
    second = mg.methods.OneShot(model, density=0.2, score="random").masks
    assert second.nested_in(first)
    assert second.kept == 360
    with pytest.raises(BudgetError, match=r"only .* alive"):
        mg.methods.OneShot(model, density=0.9)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({}, BudgetError, "at least one of density, params"),
        ({"density": 0.0}, BudgetError, "Nothing would be left"),
        ({"density": 20}, BudgetError, r"Did you mean 0\.2"),
        ({"density": 0.5, "pattern": "block:64x64"}, PatternError, "fits no layer"),
        ({"density": 0.5, "pattern": "blok"}, PatternError, "block:OUTxIN"),
        ({"density": 0.3, "pattern": "nm:2:4"}, BudgetError, "keeps 0.5 of the weights by itself"),
        ({"density": 0.5, "layers": ["conv*"]}, SelectorError, r"Layers here: 0\.weight"),
        ({"density": 0.5, "protect": ["9"]}, SelectorError, "meets no layer"),
        ({"density": 0.5, "score": "magnitud"}, UnknownNameError, "Did you mean 'magnitude'"),
        ({"density": 0.5, "scope": "globl"}, UnknownNameError, "Did you mean 'global'"),
        ({"params": 0.01}, BudgetError, "outside the prunable weights"),
        ({"density": 0.5, "scope": {"0.weight": 0.5}}, BudgetError, "they are the budget"),
        ({"scope": {"0.weight": 0.5}}, SelectorError, "missing"),
    ],
)
def test_wrong_settings_end_in_one_sentence(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        mg.methods.OneShot(network(), **settings)


def test_gradual_refuses_times_out_of_order() -> None:
    with pytest.raises(BudgetError, match="0 <= begin <= end <= 1"):
        mg.methods.Gradual(network(), density=0.5, total_steps=10, begin=0.9, end=0.1)


def test_every_method_has_a_description_and_valid_defaults() -> None:
    for name, method in methods.items():
        assert method.description.endswith("."), name
        budget = "density" if "density" in method.config.takes.fields else "flops"
        assert method.config(**{**method.defaults, budget: 0.5})
