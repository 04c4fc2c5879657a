"""Pruning at initialization and tickets as in the papers' code: counts of rounds, names, modes and chunks."""

from __future__ import annotations

import importlib
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import BudgetError
from microglia.lab.execute import execute
from microglia.lab.recipe import method_config, resolve
from microglia.methods import methods
from microglia.methods.at_init import counts_of, warn_of_explosion
from microglia.methods.procedure import evidence
from microglia.scores import scores
from microglia.storage.run import Run
from microglia.tasks.classification import image_task

at_init_room = importlib.import_module("microglia.methods.at_init")


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


# ------------------------------------------------------------------------------------------------------- modes and chunks
def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3, bias=False))


def test_snip_in_inference_mode_is_the_gradient_at_mean_0_and_variance_1() -> None:
    model, x, y = normed(), torch.randn(8, 4) * 3 + 1, torch.randint(3, (8,))
    evidence = mg.scores.Evidence([(x, y)], functional.cross_entropy)
    layers = mg.core.layers.prunable_layers(model)
    first, last = (layer.raw.detach().clone().requires_grad_() for layer in layers.values())
    hidden = functional.relu((x @ first.T) / math.sqrt(1 + model[1].eps))  # by hand: batch norm of untouched statistics
    loss = functional.cross_entropy(hidden @ last.T, y)
    expected = [(w * g).abs() for w, g in zip((first, last), torch.autograd.grad(loss, (first, last)), strict=True)]
    total = sum(e.sum() for e in expected)
    found = scores["snip-inference"](model, layers, evidence)
    for own, right in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(own, (right / total).detach())
    assert model.training  # left as it was
    train = scores["snip"](model, layers, evidence)
    assert any(not torch.allclose(found[name], train[name], rtol=0.1) for name in found)  # train mode stays the default
    assert methods["snip"].defaults["score"] == "snip"
    plain = nn.Sequential(nn.Linear(4, 3))  # without norms there is one mode
    layers = mg.core.layers.prunable_layers(plain)
    both = [scores[name](plain, layers, evidence) for name in ("snip", "snip-inference")]
    assert torch.equal(both[0]["0.weight"], both[1]["0.weight"])


def test_halves_of_grasp_are_those_of_the_examples_sorted_by_class() -> None:
    task = image_task("lenet-300-100", "digits")
    config = methods["grasp"].config(density=0.1, score_batch_size=16, per_class=5, halves=True)
    whole = list(evidence(task, Run(), config, per_class=5).batches)
    halves = list(evidence(task, Run(), config, per_class=5, halves=True).batches)
    assert [y.tolist() for _, y in halves] == [
        [c for c in range(5) for _ in range(5)],
        [c for c in range(5, 10) for _ in range(5)],
    ]
    x, y = (torch.cat([batch[i] for batch in whole]) for i in (0, 1))
    for inputs, targets in halves:  # the same examples
        for number in targets.unique():
            assert torch.equal(inputs[targets == number], x[y == number])
    with pytest.raises(BudgetError, match="per_class"):
        methods["at-init"].config(density=0.1, halves=True)


@pytest.mark.parametrize(("whole", "left", "warned"), [(2.3, 33_869.0, True), (2.3, 229.0, False), (2.3, 2.3, False)])
def test_a_mask_that_raises_the_loss_by_orders_of_magnitude_is_warned_of(whole: float, left: float, warned: bool) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_of_explosion(whole, left)
    assert bool(seen) is warned
    with pytest.warns(UserWarning, match="batch norm"):
        warn_of_explosion(whole, math.nan)  # not a number is no small loss


def test_the_loss_before_and_after_the_mask_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"model": "lenet-300-100", "method": "grasp", "prune": {"density": 0.1, "halves": True}, "train": {"epochs": 0}}
    monkeypatch.setattr(at_init_room, "EXPLODED", 1e-9)
    with pytest.warns(UserWarning, match="raises the loss"):
        told = execute(resolve(recipe | {"dense": {"epochs": 0}, "measure": {"latency": False}}))["initialization"]
    assert told["loss"]["dense"] == pytest.approx(math.log(10), abs=0.3)  # an untrained network of ten classes
    assert told["loss"]["masked"] > 0
