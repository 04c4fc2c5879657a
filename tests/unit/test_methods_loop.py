"""One loop of one's own, with every pruner in turn: nothing is another but its class and its settings."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import MicrogliaError
from microglia.core.masks import SCORES
from microglia.dynamic import gates_of
from microglia.methods import (
    Acdc,
    AtInit,
    Awg,
    Ccp,
    Dcp,
    Ddnp,
    DeepHoyer,
    DeepR,
    Dsr,
    Fbs,
    FilterNorms,
    Fpgm,
    Ftwt,
    Gal,
    Gradual,
    GroupLasso,
    Hrank,
    Obd,
    Obs,
    OneShot,
    Pas,
    Pdp,
    Pfp,
    Polarization,
    PrunerProtocol,
    Scop,
    Sfp,
    Slimming,
    Smart,
    SparseTraining,
    Sss,
    Taylor,
    Thinet,
    WoodFisher,
)
from microglia.scores import Evidence
from microglia.train.optim import FitConfig, make_optimizers

STEPS = 12
BLOCKS = {"pattern": "block:4x2", "density": 0.5}
SETTINGS: dict[type, dict[str, Any]] = {
    OneShot: {"density": 0.5},
    AtInit: {"density": 0.5, "score": "snip"},
    Gradual: {"density": 0.5},
    SparseTraining: {"density": 0.5, "every": 3},
    Smart: {**BLOCKS, "search": 0.5},
    Pas: {**BLOCKS, "search": 0.5},
    Pdp: {**BLOCKS, "search": 0.5},
    Awg: {**BLOCKS, "updates": 2},
    Acdc: {**BLOCKS, "compress": (0.2, 0.7), "decompress": (0.5,)},
    Ftwt: {"r": 0.8},
    Fbs: {"flops": 0.5},
    Ddnp: {"flops": 0.5},
    Slimming: {"density": 0.5},
    GroupLasso: {"flops": 0.5},
    Polarization: {"flops": 0.5},
    Sfp: {"density": 0.5, "updates": 3},
    Fpgm: {"flops": 0.4, "updates": 3},
    Hrank: {"density": 0.5, "frozen": 0.2},
    Thinet: {"density": 0.5},
    Dcp: {"density": 0.5, "classifiers": 1},
    Scop: {"density": 0.5},
    Gal: {"density": 0.5},
    Sss: {"density": 0.5},
    Taylor: {"density": 0.5, "every": 3},
    DeepHoyer: {"flops": 0.5},
    FilterNorms: {"density": 0.5, "rule": "greedy"},
    Ccp: {"density": 0.5},
    Pfp: {"density": 0.5},
    Dsr: {"density": 0.5, "every": 3, "threshold": 0.02},
    DeepR: {"density": 0.5, "temperature": 1e-4},
    Obd: {"density": 0.5},
    Obs: {"density": 0.5, "together": 64},
    WoodFisher: {"density": 0.5, "updates": 3},
}
"""Every pruner there is, with the settings of its own."""
EVERY = pytest.mark.parametrize("kind", list(SETTINGS), ids=lambda kind: kind.__name__)
OWN = pytest.mark.parametrize("kind", [Smart, Pas, Ftwt, Ddnp], ids=lambda kind: kind.__name__)
MEMBERS = (
    "penalty", "step", "finish", "param_groups", "optimizers", "weights_to_train", "replaces_step", "state_dict",
    "load_state_dict", "report",
)  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 1, 8, 8, generator=generator), torch.randint(10, (32,), generator=generator)


def made(kind: type, model: nn.Module, **settings: Any) -> PrunerProtocol:
    evidence = Evidence([images()], functional.cross_entropy, torch.Generator().manual_seed(0))
    known = {"total_steps": STEPS, "example_inputs": images()[0][:1], "evidence": evidence}
    pruner: PrunerProtocol = kind(model, **known, **(SETTINGS[kind] | settings))
    return pruner


def train(model: nn.Module, pruner: PrunerProtocol, optimizers: list[torch.optim.Optimizer], steps: int = STEPS) -> None:
    """The loop, as `PrunerProtocol` shows it."""
    x, y = images()
    model.train()
    for _ in range(steps):
        loss = functional.cross_entropy(model(x), y) + pruner.penalty()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        pruner.step(optimizers[0])


def own_of(pruner: PrunerProtocol) -> list[nn.Parameter]:
    return [p for group in pruner.param_groups() for p in group["params"]]


def test_every_exported_pruner_is_in_the_loop() -> None:
    exported = {name for name in mg.methods.__all__ if hasattr(getattr(mg.methods, name), "param_groups")}
    bases = {"ChannelPruner", "Pruner", "PrunerProtocol", "SearchedPruner", "UnitPruner"}
    # A search needs the call `search(measure)` before the loop; weight sharing leaves no masks. Each has its own tests.
    elsewhere = {"Amc", "EagleEye", "MetaPruning", "WeightSharing"}
    assert exported - bases - elsewhere == {kind.__name__ for kind in SETTINGS}


def check_that_weights_and_own_parameters_share_nothing(
    kind: type, model: nn.Module, pruner: PrunerProtocol, before: set[int]
) -> None:
    own, weights = {id(p) for p in own_of(pruner)}, {id(p) for p in pruner.weights_to_train()}
    assert not own & weights
    assert weights == {id(p) for p in model.parameters()} - own
    assert kind in (Smart, Pas, Ftwt, Fbs, Ddnp, Dcp, Scop, Gal, Sss, Taylor) or not own
    assert len(weights) == len(before)
    inside = [id(p) for optimizer in pruner.optimizers() for group in optimizer.param_groups for p in group["params"]]
    assert sorted(inside) == sorted(own)  # each once


@EVERY
def test_every_pruner_goes_through_one_and_the_same_loop(kind: type) -> None:
    model = network()
    before = {id(p) for p in model.parameters()}
    pruner = made(kind, model)
    assert all(callable(getattr(pruner, member)) for member in MEMBERS)
    check_that_weights_and_own_parameters_share_nothing(kind, model, pruner, before)
    optimizers = [torch.optim.SGD(pruner.weights_to_train(), lr=0.05, momentum=0.9), *pruner.optimizers()]
    weights, own = [p.detach().clone() for p in pruner.weights_to_train()], own_of(pruner)
    learned = [p.detach().clone() for p in own]
    train(model, pruner, optimizers)
    moved = any(not torch.equal(p, q) for p, q in zip(weights, pruner.weights_to_train(), strict=True))
    assert moved is (kind not in (Ddnp, Scop))  # whose model rests while widths are learned
    still = all(torch.equal(p, q) for p, q in zip(learned, own, strict=True))
    assert still is (kind is Taylor or not own)  # whose gates are only read
    pruner.finish()
    pruner.finish()  # twice does no harm
    if kind in (Ftwt, Fbs):
        assert gates_of(model)
    else:
        assert 0.2 < mg.masks_of(model).density < 0.8
    assert all(p.requires_grad for p in pruner.weights_to_train())
    assert model.training
    assert not hasattr(model, SCORES)
    assert isinstance(pruner.report(), dict)


@EVERY
def test_the_optimizer_need_not_be_given(kind: type) -> None:
    model, (x, y) = network().train(), images()
    pruner = made(kind, model)
    optimizer = torch.optim.SGD([{"params": pruner.weights_to_train()}], lr=0.05)
    for group in pruner.param_groups():
        optimizer.add_param_group(group)
    for _ in range(STEPS):
        loss = functional.cross_entropy(model(x), y) + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
    pruner.finish()
    assert mg.masks_of(model) or gates_of(model)


@EVERY
def test_an_interrupted_loop_ends_in_the_same_bits(kind: type) -> None:
    def start() -> tuple[nn.Module, PrunerProtocol, list[torch.optim.Optimizer]]:
        model = network()
        pruner = made(kind, model)
        return model, pruner, [torch.optim.SGD(pruner.weights_to_train(), lr=0.05, momentum=0.9), *pruner.optimizers()]

    model, pruner, optimizers = start()
    train(model, pruner, optimizers, 5)
    saved = deepcopy((model.state_dict(), pruner.state_dict(), [o.state_dict() for o in optimizers]))
    train(model, pruner, optimizers, STEPS - 5)
    pruner.finish()
    again, other, others = start()
    other.load_state_dict(saved[1])  # first: its masks may have other names in a later phase
    again.load_state_dict(saved[0])
    for optimizer, state in zip(others, saved[2], strict=True):
        optimizer.load_state_dict(state)
    train(again, other, others, STEPS - 5)
    other.finish()
    mine, theirs = model.state_dict(), again.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# ------------------------------------------------------------------------------------------------------- plain groups
@OWN
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer_takes_the_groups_with_their_rate_and_decay(kind: type, optimizer: Any) -> None:
    pruner = made(kind, network())
    theirs = optimizer([{"params": pruner.weights_to_train()}], lr=1e-9, weight_decay=0.7)
    for group in pruner.param_groups():
        assert set(group) <= {"params", "lr", "weight_decay", "momentum"}  # what torch itself knows
        theirs.add_param_group(group)
    for mine, group in zip(pruner.param_groups(), theirs.param_groups[1:], strict=True):
        assert (group["lr"], group["weight_decay"]) == (mine["lr"], mine["weight_decay"])
        assert mine["lr"] > 1e-9
        assert mine["weight_decay"] < 0.7


@pytest.mark.parametrize("kind", [Smart, Pas])
def test_scores_move_by_their_own_rate_in_plain_descent(kind: type) -> None:
    model, (x, y) = network().train(), images()
    pruner = made(kind, model, mask_lr=0.02)
    optimizer = torch.optim.SGD([{"params": pruner.weights_to_train(), "lr": 0.5}], weight_decay=0.3)
    optimizer.add_param_group(*pruner.param_groups())
    (scores,) = own_of(pruner)
    before = scores.detach().clone()
    (functional.cross_entropy(model(x), y) + pruner.penalty()).backward()
    optimizer.step()
    assert scores.grad is not None
    torch.testing.assert_close(scores.detach(), before - 0.02 * scores.grad)


@pytest.mark.parametrize("kind", [Smart, Pas])
@pytest.mark.parametrize(
    ("name", "expected"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_the_optimizer_of_scores_is_the_one_that_the_method_names(kind: type, name: str, expected: type) -> None:
    (optimizer,) = made(kind, network(), mask_optimizer=name, mask_lr=0.03).optimizers()
    assert type(optimizer) is expected
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.03, 0.0)


@pytest.mark.parametrize("first", ["sgd", "adam"])
def test_our_loop_holds_own_rates_and_lays_states_out_as_before(first: Any) -> None:
    """A state of 0.1 has the scores in an optimizer of their own, or as the second group of the first one's kind."""
    pruner = made(Smart, network(), mask_lr=0.03)
    config = FitConfig(optimizer=first, lr=0.2, weight_decay=1e-3)
    optimizers = make_optimizers(config, [{"params": pruner.weights_to_train()}], pruner.optimizers())
    assert [len(o.param_groups) for o in optimizers] == ([1, 1] if first == "sgd" else [2])
    group = optimizers[-1].param_groups[-1]
    assert (group["lr"], group["constant_lr"], group["weight_decay"]) == (0.03, 0.03, 0.0)
    assert "constant_lr" not in optimizers[0].param_groups[0]
    assert type(optimizers[-1]) is torch.optim.Adam


def test_a_resting_head_stays_at_rest_in_an_optimizer_of_its_own() -> None:
    model = network()
    pruner = made(Ftwt, model, cooldown=0.5)
    mine = torch.optim.Adam(pruner.weights_to_train(), lr=1e-3)
    (theirs,) = pruner.optimizers()
    train(model, pruner, [mine, theirs], STEPS // 2)
    assert theirs.param_groups[0]["lr"] == 0
    assert mine.param_groups[0]["lr"] == 1e-3


# ---------------------------------------------------------------------------------------------------------------- DDNP
def test_ddnp_leaves_the_model_as_it_was_until_it_masks_channels() -> None:
    model, (x, _) = network(), images()
    before = deepcopy(model.state_dict())
    pruner = made(Ddnp, model)
    train(model, pruner, [torch.optim.SGD(pruner.weights_to_train(), lr=0.5, weight_decay=0.1), *pruner.optimizers()])
    after = {
        name.replace("parametrizations.", "").replace(".original", ""): value for name, value in model.state_dict().items()
    }
    assert all(torch.equal(after[name], value) for name, value in before.items())  # running statistics too
    pruner.finish()
    small = mg.shrink(model.eval(), x[:1])
    dense = sum(p.numel() for p in network().parameters())
    assert sum(p.numel() for p in small.parameters()) < dense
    torch.testing.assert_close(small(x), model(x), atol=1e-5, rtol=1e-5)


def test_ddnp_draws_gates_for_training_alone() -> None:
    model, (x, y) = network(), images()
    pruner = made(Ddnp, model)
    (optimizer,) = pruner.optimizers()
    functional.cross_entropy(model(x), y)
    drawn = pruner.state_dict()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))  # the last gates
    functional.cross_entropy(model(x), y)  # one step, one draw
    assert torch.equal(drawn["generator"], pruner.state_dict()["generator"])
    pruner.step(optimizer)
    functional.cross_entropy(model(x), y)
    assert not torch.equal(drawn["generator"], pruner.state_dict()["generator"])


def test_the_rate_of_ddnp_widths_falls_along_a_cosine() -> None:
    model = network()
    pruner = made(Ddnp, model, search_lr=0.01)
    (optimizer,) = pruner.optimizers()
    rates = []
    for _ in range(STEPS):
        train(model, pruner, [optimizer], 1)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates[STEPS // 2 - 1] == [pytest.approx(0.005), 0.01]
    assert rates[-1] == [pytest.approx(0.0), 0.01]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"example_inputs": None}, "give example_inputs"),
        ({"evidence": None}, "give evidence with batches"),
        ({"total_steps": 0}, "total_steps of Ddnp"),
        ({"flops": 1e-4}, "cannot be met"),
        ({"flops": None}, "takes flops"),
        ({"density": 0.5}, "not density"),
        ({"sparsity": 0.5}, "say density"),
    ],
)
def test_ddnp_says_what_it_needs_and_leaves_the_model_alone(settings: dict[str, Any], text: str) -> None:
    model = network()
    known: dict[str, Any] = {"total_steps": 3, "example_inputs": images()[0][:1], "evidence": Evidence([images()])}
    with pytest.raises(MicrogliaError, match=text):
        Ddnp(model, **known | {"flops": 0.5} | settings)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
