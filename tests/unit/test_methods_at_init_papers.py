"""Pruning at initialization and tickets as in the papers' code: counts of rounds, names, modes and chunks."""

from __future__ import annotations

import pytest

from microglia.lab.recipe import method_config, resolve
from microglia.methods.at_init import counts_of


@pytest.mark.parametrize(("weights", "target", "rounds"), [(62_100, 621, 100), (1_000, 100, 7), (50_200, 5_020, 100)])
def test_what_goes_in_a_round_is_rounded_down(weights: int, target: int, rounds: int) -> None:
    """N - int((1 - rho^(k/n)) N), as Synaptic-Flow counts; a round to nearest would keep one less in about half of them."""
    rho = target / weights
    expected = [weights - int((1 - rho ** (k / rounds)) * weights) for k in range(1, rounds + 1)]
    found = counts_of("geometric", rounds, weights, target)
    assert found[:-1] == expected[:-1]
    assert found[-1] == target
    nearest = [round(weights * rho ** (k / rounds)) for k in range(1, rounds)]
    assert found[:-1] != nearest
    assert all(0 <= own - other <= 1 for own, other in zip(found, nearest, strict=False))


def test_two_rounds_by_hand() -> None:
    """1,000 to 100 in two rounds: sqrt(0.1) = 0.3162, int(683.77) = 683 go, 317 stay (316 to nearest)."""
    assert counts_of("geometric", 2, 1_000, 100) == [317, 100]
    assert counts_of("geometric", 1, 1_000, 100) == [100]


@pytest.mark.parametrize(("name", "to"), [("imp", "weights"), ("lr-rewinding", "learning-rate"), ("tickets", "weights")])
def test_imp_rewinds_weights_and_the_other_name_the_learning_rate(name: str, to: str) -> None:
    recipe = resolve({"model": "lenet-300-100", "method": name, "prune": {"density": 0.5}, "train": {"epochs": 2}})
    assert method_config(recipe).to == to
    again = {"density": 0.5, "to": "learning-rate"}  # a result of before carries it
    old = resolve({"model": "lenet-300-100", "method": "imp", "prune": again, "train": {"epochs": 2}})
    assert method_config(old).to == "learning-rate"
