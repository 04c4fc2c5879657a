"""SSS and GAL: proximal steps that end in exact zeros, factors that are merged, a mask learned without labels."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microglia as mg
import thinning
from microglia.core.errors import BudgetError, UnknownNameError
from microglia.methods import Gal, Sss, methods
from microglia.methods.proximal import ProximalGradient
from microglia.methods.what import taken
from microglia.storage.run import Progress, Run
from microglia.tasks.classification import ImageSource
from microglia.tasks.task import CLASSIFICATION, CrossEntropy
from microglia.train.optim import FitConfig
from thinning import STEPS, images, network

descend = partial(thinning.descend, momentum=0.0)


def made(kind: Any, model: nn.Module, **settings: Any) -> Any:
    return kind(model, total_steps=STEPS, example_inputs=images()[0][:1], **settings)


# ------------------------------------------------------------------------------------------------------ proximal steps
def test_a_step_is_that_of_the_paper_and_the_first_is_a_soft_threshold() -> None:
    rate, strength, mu = 0.3, 0.5, 0.9
    start = torch.tensor([1.0, -0.4, 0.1, 0.0])
    factor, other = nn.Parameter(start.clone()), start.clone()
    optimizer = ProximalGradient([{"params": [factor], "lr": rate}], strength=strength, momentum=mu)
    velocity = torch.zeros(4)
    for number in range(12):
        gradient = torch.linspace(-1, 1, 4).roll(number) * 0.4
        factor.grad = gradient
        optimizer.step()
        found = other - rate * gradient
        found = found.sign() * (found.abs() - rate * strength).clamp_min(0)
        if number == 0:
            torch.testing.assert_close(optimizer.state[factor]["last"], found)
        velocity = found - other + mu * velocity
        other = found + mu * velocity
        torch.testing.assert_close(factor.detach(), other)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_the_optimum_of_a_quadratic_has_exact_zeros(momentum: float | None) -> None:
    aim = torch.tensor([1.0, -0.6, 0.2, -0.1, 0.0])
    factor = nn.Parameter(torch.ones(5))
    optimizer = ProximalGradient([{"params": [factor], "lr": 0.2}], strength=0.3, momentum=momentum)
    for _ in range(300):
        optimizer.zero_grad()
        ((factor - aim).square().sum() / 2).backward()
        optimizer.step()
    torch.testing.assert_close(factor.detach(), torch.tensor([0.7, -0.3, 0, 0, 0]), atol=1e-3, rtol=0)
    assert (factor[2:] == 0).all()


def test_an_interrupted_optimizer_goes_on() -> None:
    def run(stop: int | None) -> Tensor:
        factor = nn.Parameter(torch.ones(3))
        optimizer = ProximalGradient([{"params": [factor], "lr": 0.1}], strength=0.1, momentum=None)
        for number in range(8):
            if number == stop:
                state = deepcopy(optimizer.state_dict())
                optimizer = ProximalGradient([{"params": [factor], "lr": 0.7}], strength=9.0)
                optimizer.load_state_dict(state)
            factor.grad = factor.detach() - torch.tensor([0.5, 0.0, 2.0])
            optimizer.step()
        return factor.detach()

    assert torch.equal(run(None), run(4))


# ------------------------------------------------------------------------------------------------------------------ sss
def test_factors_are_merged_and_masked_channels_are_the_ones_removed() -> None:
    model, (x, _) = network(), images()
    pruner = made(Sss, model, density=0.5, scope="uniform")
    torch.testing.assert_close(model.eval()(x), network().eval()(x))  # factors of 1
    with torch.no_grad():
        pruner.factors.copy_(torch.linspace(0.1, 1.5, 20).roll(7))
        pruner.factors[pruner.factors < 0] = 0
        wanted = pruner.factors.clone()
    pruner.finish()
    assert pruner.kept[:8].sum() == 4
    assert torch.equal(pruner.kept[:8], wanted[:8] >= wanted[:8].sort().values[4])
    merged = model[3].weight.detach()
    torch.testing.assert_close(merged[pruner.kept[8:]], (network()[3].weight * wanted[:8].view(1, -1, 1, 1))[pruner.kept[8:]])
    small = mg.shrink(model, x)
    assert [small[0].out_channels, small[3].out_channels] == [4, 6]
    torch.testing.assert_close(small.eval()(x), model.eval()(x))


def test_without_a_budget_the_structures_of_factor_zero_go_and_nothing_changes() -> None:
    model, (x, _) = network(), images()
    pruner = made(Sss, model)
    with torch.no_grad():
        pruner.factors[[0, 3, 4, 9, 10]] = 0
    wanted = model.eval()(x).detach()
    pruner.finish()
    assert (~pruner.kept).nonzero().flatten().tolist() == [0, 3, 4, 9, 10]
    assert pruner.report()["zeros"] == 5
    torch.testing.assert_close(model.eval()(x), wanted)
    pruner = made(Sss, model := network())
    with torch.no_grad():
        pruner.factors.zero_()
    pruner.finish()
    assert [int(part.sum()) for part in pruner.kept.split([8, 12])] == [1, 1]


def test_a_strong_penalty_drives_factors_to_zero_and_none_leaves_them() -> None:
    zeros = {}
    for strength in (0.0, 0.5):
        model = network()
        pruner = made(Sss, model, strength=strength)
        descend(model, pruner, 25)
        zeros[strength] = pruner.report()["zeros"]
    assert zeros[0.0] == 0
    assert zeros[0.5] > 3


def test_channels_of_a_group_may_have_one_factor_together() -> None:
    model = network()
    pruner = made(Sss, model, structures="groups", flops=0.6)
    assert pruner.factors.shape == (2,)
    with torch.no_grad():
        pruner.factors.copy_(torch.tensor([0.2, 1.0]))
    assert torch.equal(pruner.ranking()[:8], torch.full((8,), 0.2).double().float().double())
    pruner.finish()
    assert int(pruner.kept[8:].sum()) == 12  # the group of the larger factor stays whole
    assert int(pruner.kept[:8].sum()) < 8
    with pytest.raises(UnknownNameError, match="structure with a factor"):
        made(Sss, network(), structures="blocks")
    with pytest.raises(BudgetError, match="factor_lr above 0"):
        made(Sss, network(), factor_lr=0.0)


# ------------------------------------------------------------------------------------------------------------------ gal
def test_labels_have_no_part_in_it() -> None:
    found = []
    for targets in (None, torch.zeros(16, dtype=torch.long)):
        model = network()
        pruner = made(Gal, model, density=0.5)
        descend(model, pruner, targets=targets)
        found.append(deepcopy(model.state_dict()))
    assert any(not torch.equal(value, network().state_dict().get(name, value)) for name, value in found[0].items())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_the_penalty_is_the_objective_and_each_side_gets_its_own_gradient() -> None:
    model, (x, _) = network(), images()
    pruner = made(Gal, model, adversarial=0.7)
    outputs = model.train()(x)
    assert not outputs.requires_grad
    dense, judge = network().eval()(x), pruner.discriminator
    masked = pruner._seen[1]
    real, fake = (judge(z).sigmoid() for z in (dense, masked))
    data = (masked - dense).square().sum(1).mean() / 2
    told = -(real.log() + (1 - fake).log()).mean()
    penalty = pruner.penalty()
    torch.testing.assert_close(penalty, data + 0.7 * (told - fake.log().mean()))
    wanted = torch.autograd.grad(data - 0.7 * fake.log().mean(), pruner.factors, retain_graph=True)[0]
    blind = -(judge(dense).sigmoid().log() + (1 - judge(masked.detach()).sigmoid()).log()).mean()
    theirs = torch.autograd.grad(0.7 * blind, judge[0].bias, retain_graph=True)[0]
    penalty.backward()
    torch.testing.assert_close(pruner.factors.grad, wanted)
    torch.testing.assert_close(judge[0].bias.grad, theirs)
    assert pruner.penalty() == 0.0  # once for each pass


def test_the_discriminator_learns_to_tell_the_outputs_apart() -> None:
    model, (x, _) = network(), images()
    pruner = made(Gal, model, discriminator_lr=0.02)
    with torch.no_grad():
        pruner.factors[8:] = 0.0  # outputs far from those of the dense network
    dense, masked = network().eval()(x), model.eval()(x)
    optimizer = pruner.optimizers()[1]
    model.train()
    for _ in range(60):
        model(x)
        optimizer.zero_grad()
        pruner.penalty().backward()
        optimizer.step()
    assert (pruner.discriminator(dense) > 0).float().mean() > 0.8
    assert (pruner.discriminator(masked) < 0).float().mean() > 0.8


def test_outputs_that_are_no_tensor_are_told() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.body(x), x

    with pytest.raises(BudgetError, match="Gal needs a model that returns one tensor; Two returns a tuple"):
        made(Gal, Two(), density=0.5)


# ------------------------------------------------------------------------------------------------------- killed, resumed
class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("name", ["gal", "dcp", "scop", "taylor", "deep-r"])
def test_a_killed_training_goes_on_and_ends_in_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = mg.data.load_data("digits")
    few = torch.arange(48)
    data = replace(data, **{part: getattr(data, part).subset(few) for part in ("train", "validation", "test")})
    task = mg.Task("digits", network, ImageSource(data), CrossEntropy(), CLASSIFICATION, data.train.images[:1] / 255)
    short = FitConfig(epochs=1, batch_size=16, lr=0.05, max_batches=2)
    known, stage = taken(methods[name].config), "train" if name == "deep-r" else "sparse"
    own = {"sparse_epochs": 2, "recalibrate": 0, "every": 2, "score_batch_size": 16}
    longer = short if stage == "sparse" else replace(short, epochs=2)
    config = methods[name].config(
        density=0.5, dense=replace(short, epochs=0), train=longer, **{key: own[key] for key in own if key in known}
    )
    whole = methods[name].procedure(task, Run(tmp_path / "whole", {}), config)
    save = Progress.save

    def killing(self: Progress, state: Any) -> None:
        save(self, state)
        if len(state.get("rows", ())) == 1:
            raise Killed

    run = Run(tmp_path / "killed", {})
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "save", killing)
        with pytest.raises(Killed):
            methods[name].procedure(task, run, config)
    run.close()
    assert list((tmp_path / "killed" / "stages").glob(f"{stage}.partial*"))
    again = methods[name].procedure(task, Run(tmp_path / "killed", {}), config)
    mine, theirs = whole.state_dict(), again.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
