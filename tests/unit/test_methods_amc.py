"""AMC: the agent, its budget wall in every episode, and a table of sensitivities that uniform widths do not know."""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest
import torch
from torch import nn

from microglia.core.errors import BudgetError
from microglia.methods import Amc, methods
from microglia.methods.ddpg import Ddpg
from microglia.storage.run import Progress


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def made(**settings: Any) -> Amc:
    settings = {"flops": 0.5, "episodes": 60, "warmup": 20, "round_to": 1} | settings
    return Amc(network(), total_steps=1, example_inputs=torch.zeros(2, 1, 6, 6), **settings)


def sensitive(small: nn.Module) -> float:
    """The middle layer may go, the others must stay."""
    return small[0].out_channels / 16 + small[5].out_channels / 16 - 0.2 * small[3].out_channels / 24


@pytest.mark.parametrize("flops", [0.2, 0.5, 0.9])
def test_the_budget_is_met_in_every_episode(flops: float) -> None:
    pruner = made(flops=flops, episodes=30, warmup=15)
    pruner.search(sensitive, seed=1)
    vectors = [found["widths"] for found in pruner.report()["candidates"]]
    assert vectors
    for widths in vectors:
        assert pruner.units.fraction("flops", widths) <= flops + 1e-9
        assert all(0.2 * size - 0.5 <= width <= size for width, size in zip(widths, (16, 24, 16), strict=True))
    fractions = [pruner.units.fraction("flops", widths) for widths in vectors]
    assert max(fractions) > 0.9 * flops  # the wall is where the budget is


def test_episodes_end_near_the_budget_where_asked() -> None:
    pruner = made(flops=0.5, episodes=30, warmup=20, tolerance=0.1)
    pruner.search(sensitive, seed=1)
    fractions = [pruner.units.fraction("flops", widths) for widths in pruner.values]
    assert max(fractions) <= 0.5 + 1e-9
    assert min(fractions) > 0.35  # a channel of the last group is what is missing
    loose = made(flops=0.5, episodes=30, warmup=20)
    loose.search(sensitive, seed=1)
    assert min(loose.units.fraction("flops", widths) for widths in loose.values) < 0.3


def test_the_agent_learns_what_uniform_widths_do_not_know() -> None:
    pruner = made(episodes=220, warmup=40)
    pruner.search(sensitive, seed=0)
    pruner.finish()
    report = pruner.report()
    rounds = [entry["median"] for entry in report["rounds"]]
    best = max(found["value"] for found in report["candidates"])
    share = next(s / 100 for s in range(100, 0, -1) if pruner.space.excess(pruner.space.at([s / 100] * 3)) <= 0)
    assert best > 1.8 * share  # the value of uniform widths
    assert mean(rounds[-10:]) > 1.3 * rounds[0]  # far better than the median of the random episodes
    assert report["counts"]["3.weight"] < report["counts"]["0.weight"] * 24 / 16


def test_equal_seeds_act_alike_and_a_killed_search_goes_on() -> None:
    states: list[Any] = []

    class Killed(Exception):
        """Stands for a kill."""

    def search(progress: Progress | None, limit: int | None) -> tuple[Any, int]:
        calls = 0

        def measure(small: nn.Module) -> float:
            nonlocal calls
            if calls == limit:
                raise Killed
            calls += 1
            return sensitive(small)

        pruner = made(episodes=24, warmup=8)
        pruner.search(measure, progress, seed=5)
        pruner.finish()
        return pruner.report(), calls

    whole, calls = search(None, None)
    with pytest.raises(Killed):
        search(Progress(None, states.append), 14)
    resumed, more = search(Progress(states[-1], states.append), None)
    assert resumed == whole
    assert more == calls - 14


def test_channels_of_the_least_mass_in_what_reads_them_go() -> None:
    pruner = made()
    expected = pruner.model[3].weight.detach().double().abs().sum((0, 2, 3))
    torch.testing.assert_close(pruner.ranking()[:16], expected)


def test_noise_stays_within_bounds_and_vanishes() -> None:
    agent = Ddpg(4, memory=100, seed=0)
    state = torch.zeros(4)
    drawn = [agent.act(state, 0.5, 0.2, 0.6) for _ in range(200)]
    assert 0.2 <= min(drawn) < 0.25
    assert 0.55 < max(drawn) <= 0.6
    calm = float(agent.actor(state).detach())
    assert agent.act(state, 1e-9, 0.0, 1.0) == pytest.approx(calm, abs=1e-6)
    assert agent.act(state, 1e-9, 0.9, 1.0) == pytest.approx(0.9)  # the nearest within bounds


def test_the_actor_moves_to_the_action_that_pays() -> None:
    agent, state = Ddpg(2, memory=500, seed=0), torch.ones(2)
    for _ in range(200):
        action = agent.random(0.0, 1.0)
        agent.remember([state], [action], 1 - abs(action - 0.85))
    before = float(agent.actor(state).detach())
    for _ in range(250):
        agent.update()
    assert abs(float(agent.actor(state).detach()) - 0.85) < 0.15 < abs(before - 0.85)


def test_numbers_out_of_range_are_told() -> None:
    kind = methods["amc"].config
    with pytest.raises(BudgetError, match="warmup is at least 1 and at most episodes; got 9 of 5"):
        kind(flops=0.5, episodes=5, warmup=9)
    with pytest.raises(BudgetError, match="least is the least kept fraction"):
        kind(flops=0.5, least=1.0)
    with pytest.raises(BudgetError, match=r"No width vector meets the budget \(flops 0.02\)"):
        made(flops=0.02)
