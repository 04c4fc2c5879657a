"""Methods that train for channels to go: penalties, filters set to zero, thresholds; what cannot be ranked is told."""

from __future__ import annotations

import itertools
import math
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import BudgetError, ScoreError, UnknownNameError
from microglia.graph import ShrinkError
from microglia.methods import ChannelConfig, ChannelPruner, Fpgm, GroupLasso, Polarization, Sfp, Slimming, method, methods
from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.polarization import FALLBACK, polarized, threshold
from microglia.storage.run import Run
from microglia.tasks.classification import ImageSource
from microglia.tasks.task import CLASSIFICATION, CrossEntropy

STEPS = 6


@dataclass(frozen=True)
class ToyConfig(ChannelConfig):
    """Of a method from elsewhere."""


def make_task() -> mg.Task:
    data = mg.data.load_data("digits")
    few = torch.arange(48)
    parts = {name: getattr(data, name).subset(few) for name in ("train", "validation", "test")}
    data = replace(data, **parts)
    return mg.Task("digits", network, ImageSource(data), CrossEntropy(), CLASSIFICATION, data.train.images[:1] / 255)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip


def images() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    return torch.randn(16, 1, 6, 6, generator=made), torch.randint(10, (16,), generator=made)


def made(kind: type[ChannelPruner], model: nn.Module, steps: int = STEPS, **settings: Any) -> Any:
    budget = {} if {"density", "flops", "params"} & set(settings) else {"density": 0.5}
    return kind(model, total_steps=steps, example_inputs=images()[0][:1], **budget, **settings)


def descend(model: nn.Module, pruner: ChannelPruner, steps: int, **settings: Any) -> None:
    optimizer = torch.optim.SGD(pruner.weights_to_train(), **({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} | settings))
    x, y = images()
    model.train()
    for _ in range(steps):
        loss = functional.cross_entropy(model(x), y) + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step(optimizer)


EVERY = pytest.mark.parametrize("kind", [Slimming, GroupLasso, Polarization, Sfp, Fpgm])


# ------------------------------------------------------------------------------------------------------- what all share
@EVERY
def test_masked_channels_are_the_ones_removed(kind: type[ChannelPruner]) -> None:
    model, (x, _) = network(), images()
    pruner = made(kind, model, scope="uniform")
    descend(model, pruner, STEPS)
    pruner.finish()
    kept = pruner.kept.clone()
    assert kept.split([8, 12])[0].sum() == 4
    assert kept.split([8, 12])[1].sum() == 6
    small = mg.shrink(model, x)
    assert [small[0].out_channels, small[3].out_channels] == [4, 6]
    torch.testing.assert_close(small.eval()(x), model.eval()(x))
    report = pruner.report()
    assert report["widths"] == {"0.weight": 8, "3.weight": 12}
    assert report["counts"] == {"0.weight": 4, "3.weight": 6}
    assert report["density"] == 0.5
    assert pruner.penalty() == 0.0


@EVERY
@pytest.mark.parametrize("term", ["density", "params", "flops"])
def test_every_term_of_a_budget_is_met(kind: type[ChannelPruner], term: str) -> None:
    model, (x, _) = network(), images()
    pruner = made(kind, model, **{term: 0.5})
    pruner.finish()
    small, plan = mg.shrink(model, x), None
    plan = mg.graph.plan_of(small)
    got = {"params": plan.parameters[1] / plan.parameters[0], "flops": plan.macs[1] / plan.macs[0]}
    got["density"] = (small[0].out_channels + small[3].out_channels) / 20
    assert got[term] == pytest.approx(0.5, abs=0.08)


@EVERY
def test_a_budget_that_no_widths_meet_is_told_before_any_training(kind: type[ChannelPruner]) -> None:
    with pytest.raises(BudgetError, match="cannot be met"):
        made(kind, network(), flops=0.001)


@EVERY
def test_what_is_missing_is_told(kind: type[ChannelPruner]) -> None:
    with pytest.raises(BudgetError, match="give example_inputs, one batch of inputs"):
        kind(network(), total_steps=3, density=0.5)
    if kind is not Polarization:
        with pytest.raises(BudgetError, match="cuts to a budget: give density, params or flops"):
            kind(network(), total_steps=3, example_inputs=images()[0])
    with pytest.raises(ScoreError, match="does not take score: it ranks channels by values of its own"):
        made(kind, network(), score="l2")
    with pytest.raises(BudgetError, match="takes density, params or flops, and not ms"):
        made(kind, network(), ms=1.0)


def test_excluded_layers_stay() -> None:
    model = network()
    made(GroupLasso, model, exclude=["0"]).finish()
    assert mg.masks_of(model)["0.weight"].all()
    assert not mg.masks_of(model)["3.weight"].all()


# ------------------------------------------------------------------------------------------------------------ slimming
def test_the_penalty_of_slimming_pulls_by_the_sign() -> None:
    model = network()
    pruner = made(Slimming, model, strength=0.3)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2, 0, 0.5, 1, 1, 1, -1e-9]))
    pruner.penalty().backward()
    torch.testing.assert_close(model[1].weight.grad, 0.3 * model[1].weight.sign())
    assert model[1].weight.grad[2] == 0
    assert torch.equal(model[4].weight.grad, torch.full((12,), 0.3))
    assert model[0].weight.grad is None


def test_slimming_ranks_over_the_whole_network_by_the_size_of_scales() -> None:
    model = network()
    pruner = made(Slimming, model, initial_scale=0.5)
    assert (model[1].weight == 0.5).all()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.9, -0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.01]))
        model[4].weight.copy_(torch.linspace(0.0, 0.6, 12))
    pruner.finish()
    assert mg.masks_of(model)["0.weight"].flatten(1).all(1).tolist() == [True] * 7 + [False]
    assert mg.masks_of(model)["3.weight"].flatten(1).all(1).sum() == 3


def test_scales_shift_to_zero_under_the_penalty() -> None:
    sizes = {}
    for strength in (0.0, 0.05):
        model = network()
        descend(model, made(Slimming, model, strength=strength), 12)
        sizes[strength] = float(torch.cat([model[1].weight, model[4].weight]).detach().abs().mean())
    assert sizes[0.05] < 0.8 * sizes[0.0]


class Shared(nn.Module):
    """Two layers of one width, one norm for both, or two that share its scale."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.other = self.norm if twice else nn.BatchNorm2d(8)
        self.other.weight = self.norm.weight
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(images)))
        return self.head(torch.relu(self.other(self.second(x))).mean((2, 3)))


@pytest.mark.parametrize("kind", [Slimming, Polarization])
def test_models_whose_scales_rank_nothing_are_told(kind: type[ChannelPruner]) -> None:
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    with pytest.raises(ShrinkError, match="no channel of Sequential that can go has a norm with a scale: take group-lasso"):
        made(kind, plain)
    bare = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    with pytest.raises(ShrinkError, match="has a norm with a scale"):
        made(kind, bare)
    for twice in (True, False):
        with pytest.raises(ShrinkError, match=r"The scales (norm|other)\.weight serve several layers"):
            made(kind, Shared(twice=twice))
    with pytest.raises(BudgetError, match="strength is at least 0"):
        made(kind, network(), strength=-1.0)


# ---------------------------------------------------------------------------------------------------------- group lasso
def test_a_group_is_all_that_makes_and_reads_a_channel() -> None:
    model = network()
    pruner = made(GroupLasso, model)
    parts = [model[0].weight.flatten(1), model[0].bias[:, None], model[1].weight[:, None], model[1].bias[:, None]]
    parts.append(model[3].weight.transpose(0, 1).flatten(1))  # the columns that read it
    expected = torch.cat(parts, 1).square().sum(1)
    torch.testing.assert_close(pruner.squares()[:8], expected)
    strength = pruner.config.strength
    torch.testing.assert_close(pruner.penalty(), strength * pruner.squares().sqrt().sum())
    pruner.penalty().backward()
    wanted = strength * model[0].weight / expected.sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(model[0].weight.grad, wanted)


def test_the_ranked_form_pulls_the_least_channel_sixteen_times_as_hard_as_the_best() -> None:
    model = network()
    pruner = made(GroupLasso, model, form="ranked", strength=0.1)
    pruner.penalty().backward()
    pull = (model[0].weight.grad / model[0].weight).flatten(1)[:, 0]
    norms = pruner.squares()[:8]
    torch.testing.assert_close(pull[norms.argmax()], torch.tensor(0.1))
    torch.testing.assert_close(pull[norms.argmin()], torch.tensor(1.6))
    with pytest.raises(UnknownNameError, match="form of the group lasso"):
        made(GroupLasso, network(), form="squares")


def test_a_strong_group_lasso_drives_groups_to_zero() -> None:
    model = network()
    pruner = made(GroupLasso, model, strength=0.05)
    before = pruner.squares().detach().clone()
    descend(model, pruner, 12, lr=0.2)
    assert pruner.squares().mean() < 0.6 * before.mean()


# ------------------------------------------------------------------------------------------------------------ sfp, fpgm
def zero_rows(model: nn.Module) -> list[int]:
    return [int((~layer.weight.flatten(1).any(1)).sum()) for layer in (model[0], model[3])]


def test_filters_of_zeros_come_back_and_as_many_are_zero_again() -> None:
    model = network()
    pruner = made(Sfp, model, updates=3)
    descend(model, pruner, 2)  # the first of three choices is after the second of six steps
    assert zero_rows(model) == [4, 6]
    zeroed = pruner.zeroed.clone()
    descend(model, pruner, 1)
    rows = [layer.weight.flatten(1).any(1) for layer in (model[0], model[3])]
    assert torch.cat(rows)[zeroed].any()  # with weights again
    descend(model, pruner, 3)
    assert zero_rows(model) == [4, 6]
    pruner.finish()
    assert torch.equal(~pruner.kept, pruner.zeroed)
    assert [int(m.flatten(1).any(1).sum()) for n, m in mg.masks_of(model).items() if n != "8.weight"] == [4, 6]


def test_a_filter_of_zeros_does_not_come_back_by_old_momentum() -> None:
    model = network()
    pruner = made(Sfp, model, updates=1, steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = images()
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
        pruner.step(optimizer)
    gone = pruner.zeroed[:8]
    assert not optimizer.state[model[0].weight]["momentum_buffer"][gone].any()
    assert optimizer.state[model[0].weight]["momentum_buffer"][~gone].any()


def test_a_filter_of_zeros_comes_back_by_a_gradient_over_the_root_of_epsilon() -> None:
    gradients = []
    for epsilon in (1e-5, 1e-1):
        model = network()
        model[1].eps = epsilon
        nn.init.ones_(model[1].bias)  # past the ReLU
        made(Sfp, model).zero(torch.arange(20) >= 8)  # all filters of the first layer
        x, y = images()
        functional.cross_entropy(model.train()(x), y).backward()
        gradients.append(model[0].weight.grad)
    assert gradients[1].any()
    assert torch.allclose(gradients[0], 100 * gradients[1], rtol=1e-3)


def test_filters_at_the_median_rest_within_an_epoch_and_are_chosen_anew_at_its_end() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[5] = model[0].weight[[0, 1, 2, 3, 4, 6, 7]].mean(0)
    pruner = made(Fpgm, model, updates=2)
    assert zero_rows(model) == [4, 6]  # before the training
    assert pruner.zeroed[5]
    first = pruner.zeroed.clone()
    descend(model, pruner, 2)
    assert zero_rows(model) == [4, 6]
    assert torch.equal(pruner.zeroed, first)
    state = deepcopy(pruner.state_dict())
    assert torch.equal(state["zeroed"], first)
    descend(model, pruner, 4)
    assert zero_rows(model) == [4, 6]
    pruner.finish()
    assert torch.equal(~pruner.kept, pruner.zeroed)


def test_counts_of_updates_are_checked() -> None:
    with pytest.raises(BudgetError, match="updates is at least 1"):
        made(Sfp, network(), updates=0)


# --------------------------------------------------------------------------------------------------------- polarization
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 10])
@pytest.mark.parametrize("t", [-2.5, -2, -1, -0.3, 0, 0.7, 1.2, 1.4, 2, 3])
def test_the_least_of_the_regularizer_is_where_the_theorem_says(n: int, t: float) -> None:
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=torch.float64)
    found = t * corners.sum(1) - (corners - corners.mean(1, keepdim=True)).abs().sum(1)
    share = 0.5 - t / 4 if abs(t) <= 2 else float(t < -2)
    allowed = {math.floor(n * share), min(n, math.floor(n * share) + 1)} if 0 < share < 1 else {round(n * share)}
    least = corners[found <= found.min() + 1e-12].sum(1).unique().tolist()
    assert allowed & {int(count) for count in least}
    inside = torch.rand(200, n, generator=torch.Generator().manual_seed(n)).double()
    assert all(float(polarized(row, t)) >= float(found.min()) - 1e-12 for row in inside)  # concave: no inner point is lower


def test_the_regularizer_is_concave_and_knows_one_value() -> None:
    a, b = torch.rand(2, 50, 9, generator=torch.Generator().manual_seed(0)).double()
    for one, other in zip(a, b, strict=True):
        assert polarized((one + other) / 2, 1.3) >= (polarized(one, 1.3) + polarized(other, 1.3)) / 2 - 1e-12
    torch.testing.assert_close(polarized(torch.full((7,), 0.4), 1.2), torch.tensor(1.2 * 0.4 * 7))


def test_its_gradient_has_the_term_of_the_mean() -> None:
    scales = torch.rand(9, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    polarized(scales, 1.4).backward()
    signs = (scales - scales.mean()).sign()
    torch.testing.assert_close(scales.grad, 1.4 * scales.sign() - signs + signs.mean())
    assert signs.mean() != 0


def test_the_mean_is_that_of_the_whole_network_and_scales_stay_in_range() -> None:
    model = network()
    pruner = made(Polarization, model, strength=0.2, t=1.1)
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-0.2, 1.4, 8))
    everything = torch.cat([model[1].weight, model[4].weight])
    torch.testing.assert_close(pruner.penalty(), 0.2 * polarized(everything, 1.1))
    pruner.step()
    assert float(model[1].weight.detach().min()) == 0
    assert float(model[1].weight.detach().max()) == 1


def test_training_moves_scales_apart() -> None:
    model = network()
    pruner = made(Polarization, model, strength=0.3, t=1.0, initial_scale=0.5, steps=60)
    descend(model, pruner, 60, lr=0.05, weight_decay=0.0)
    scales = torch.cat([model[1].weight, model[4].weight]).detach()
    assert ((scales < 0.05) | (scales > 0.95)).float().mean() > 0.8
    assert (scales < 0.05).any()
    assert (scales > 0.95).any()


def test_the_threshold_is_the_first_dip_of_the_histogram() -> None:
    low, high = torch.tensor([0.005] * 20 + [0.015] * 5), torch.linspace(0.5, 0.9, 30)
    assert threshold(torch.cat([low, high])) == 0.02  # counts 20, 5, 0, 0
    assert threshold(torch.cat([low[:20], high])) == 0.01
    assert threshold(torch.linspace(0.3, 0.9, 50)) == 0.01  # empty bins on the left: nothing goes
    rising = torch.cat([torch.full((k + 1,), (k + 0.5) / 100) for k in range(100)])
    assert threshold(rising) == FALLBACK
    assert threshold(torch.tensor([5.0])) == 0.01  # outside the range


def test_without_a_budget_each_layer_is_cut_at_its_threshold_and_keeps_one_channel() -> None:
    model = network()
    pruner = Polarization(model, total_steps=3, example_inputs=images()[0])
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.001, 0.8, 0.003, 0.9, 0.7, 0.002, 0.85, 0.95]))
        model[4].weight.copy_(torch.linspace(0.0, 0.009, 12))
    pruner.finish()
    assert mg.masks_of(model)["0.weight"].flatten(1).any(1).tolist() == [False, True, False, True, True, False, True, True]
    assert mg.masks_of(model)["3.weight"].flatten(1).any(1).tolist() == [False] * 11 + [True]


def test_a_threshold_far_from_zero_is_warned_of() -> None:
    rising = torch.cat([torch.full((k + 1,), (k + 0.5) / 100) for k in range(23)])  # 276 scales, none set apart
    model = nn.Sequential(
        nn.Conv2d(1, 276, 1), nn.BatchNorm2d(276), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(276, 10)
    )
    with torch.no_grad():
        model[1].weight.copy_(rising)
    assert threshold(rising) == 0.23
    pruner = Polarization(model, total_steps=3, example_inputs=images()[0])
    with pytest.warns(UserWarning, match=r"those of 1\.weight at 0\.23: they have not come apart"):
        pruner.finish()
    assert int(pruner.kept.sum()) == 1  # the best one
    with pytest.raises(BudgetError, match="largest is above 0"):
        made(Polarization, network(), largest=0.0)


# ----------------------------------------------------------------------------------------------- a method from elsewhere
def test_a_method_of_ones_own_is_a_ranking_and_two_lines(tmp_path: Path) -> None:
    class Last(ChannelPruner):
        """Keeps the first channels of every group, and pulls at the biases."""

        def penalty(self) -> Tensor | float:
            return 0.0 if self.kept is not None else 1e-3 * self.raw["0.bias"].square().sum()

        def ranking(self) -> Tensor:
            return torch.arange(self.units.count, 0, -1).double()

    config = ChannelConfig(density=0.5, scope="uniform", train=mg.FitConfig(epochs=1, batch_size=16, lr=0.05, max_batches=2))
    config = replace(config, dense=config.train, sparse_epochs=2)
    task = make_task()
    try:
        method("toy-channels", ToyConfig, check=fits(Last))(lambda task, run, own: thinned(task, run, own, Last))
        run = Run(tmp_path / "run", {})
        model = methods["toy-channels"].procedure(task, run, config)
    finally:
        methods._items.pop("toy-channels", None)
    assert [model[0].out_channels, model[3].out_channels] == [4, 6]
    assert run.observations["widths"]["counts"] == {"0.weight": 4, "3.weight": 6}
    plan = mg.graph.plan_of(model)
    assert plan.asked == {"density": 0.5}
    assert plan.got == {"density": 0.5}
    assert [path.name for path in sorted((tmp_path / "run" / "stages").glob("*.safetensors"))] == [
        "before-observed.safetensors", "dense-observed.safetensors", "dense.safetensors", "prune.safetensors",
        "recalibrate.safetensors", "sparse.safetensors", "train.safetensors",
    ]  # fmt: skip
