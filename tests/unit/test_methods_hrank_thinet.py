"""HRank and ThiNet: which channels go and when, what stays to the bit, what the next layer misses least."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import BudgetError, ScoreError, UnknownNameError
from microglia.methods import Hrank, Thinet
from microglia.methods.thinet import contributions, greedy, least_squares
from microglia.scores import Evidence

STEPS = 6


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12),
        nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


def images() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    return torch.randn(16, 1, 6, 6, generator=made), torch.randint(10, (16,), generator=made)


def made(kind: Any, model: nn.Module, steps: int = STEPS, **settings: Any) -> Any:
    budget = {} if {"density", "flops", "params", "rates"} & set(settings) else {"density": 0.5}
    evidence = Evidence([images()], functional.cross_entropy, torch.Generator().manual_seed(0))
    return kind(model, total_steps=steps, example_inputs=images()[0][:1], evidence=evidence, **budget, **settings)


def descend(model: nn.Module, pruner: Any, steps: int, optimizer: torch.optim.Optimizer) -> None:
    x, y = images()
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step(optimizer)


def alive(model: nn.Module) -> list[int]:
    return [int(model[k].weight.flatten(1).any(1).sum()) for k in (0, 3)]


# ---------------------------------------------------------------------------------------------------------------- hrank
def test_groups_lose_their_channels_one_after_the_other_and_what_is_zero_stays_zero() -> None:
    model = network()
    pruner = made(Hrank, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    assert alive(model) == [4, 12]
    gone = ~pruner.target[:8]
    descend(model, pruner, 2, optimizer)
    assert alive(model) == [4, 12]
    assert not model[1].weight[gone].any()  # norm and bias with it
    assert not model[1].bias[gone].any()
    descend(model, pruner, 1, optimizer)  # half of the training is over
    assert alive(model) == [4, 6]
    descend(model, pruner, 3, optimizer)
    pruner.finish()
    assert torch.equal(pruner.kept, pruner.target)
    small = mg.shrink(model, images()[0])
    assert [small[0].out_channels, small[3].out_channels] == [4, 6]
    torch.testing.assert_close(small.eval()(images()[0]), model.eval()(images()[0]))


def test_the_lowest_ranks_of_the_dense_network_go() -> None:
    model = network()
    with torch.no_grad():
        model[1].weight[:3] = 0
        model[1].bias[:3] = -1  # maps of zeros
    pruner = made(Hrank, model, order="all-at-once")
    assert not pruner.target[:3].any()
    assert alive(model) == [4, 6]
    assert not pruner.values[:3].any()


@pytest.mark.parametrize("frozen", [0.25, 0.4])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_filters_are_unchanged_to_the_bit_under_decay_and_momentum(frozen: float, optimizer: str) -> None:
    model = network()
    pruner = made(Hrank, model, frozen=frozen)
    own: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    if optimizer == "adamw":
        own = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    before, rests = model[0].weight.detach().clone(), pruner.rests[:8]
    assert int(rests.sum()) == int(frozen * 8)
    assert sum(pruner.report()["frozen"].values()) == int(pruner.rests.sum())
    assert (pruner.values[:8][rests].min() >= pruner.values[:8][~rests]).all()  # the highest ranks
    descend(model, pruner, STEPS, own)
    assert torch.equal(model[0].weight[rests], before[rests])
    others = pruner.target[8:] & ~pruner.rests[8:]
    assert others.any()
    moved = (model[3].weight != network()[3].weight).flatten(1).any(1)
    assert moved[others].all()


def test_variants_take_other_channels_at_the_same_counts() -> None:
    found = {}
    for variant in ("hrank", "edge", "random", "reverse"):
        pruner = made(Hrank, network(), variant=variant)
        found[variant] = pruner.target
        assert [int(part.sum()) for part in pruner.target.split([8, 12])] == [4, 6]
    ranks = made(Hrank, network()).values[:8]
    order = ranks.argsort()
    assert set(found["hrank"][:8].nonzero().flatten().tolist()) == set(order[4:].tolist())
    assert set(found["reverse"][:8].nonzero().flatten().tolist()) == set(order[:4].tolist())
    assert set(found["edge"][:8].nonzero().flatten().tolist()) == set(order[2:6].tolist())  # half from each end
    assert torch.equal(found["random"], made(Hrank, network(), variant="random").target)


def test_rates_are_one_for_each_group() -> None:
    pruner = made(Hrank, network(), rates=(0.3, 0.6))
    assert [int(part.sum()) for part in pruner.target.split([8, 12])] == [8 - 2, 12 - 7]
    with pytest.raises(BudgetError, match=r"rates has 3 fractions.* in 2 groups: .*the order 0\.weight, 3\.weight"):
        made(Hrank, network(), rates=(0.1, 0.2, 0.3))
    with pytest.raises(BudgetError, match="give one of both"):
        made(Hrank, network(), rates=(0.1, 0.2), density=0.5)
    with pytest.raises(BudgetError, match=r"each rate in \[0, 1\)"):
        made(Hrank, network(), rates=(0.1, 1.0))
    with pytest.raises(UnknownNameError, match="variant of HRank"):
        made(Hrank, network(), variant="middle")


@pytest.mark.parametrize("kind", [Hrank, Thinet])
def test_batches_are_asked_for(kind: Any) -> None:
    with pytest.raises(ScoreError, match="batches"):
        kind(network(), total_steps=3, example_inputs=images()[0], density=0.5)


# --------------------------------------------------------------------------------------------------------------- thinet
def test_an_exact_opposite_pair_goes_first() -> None:
    samples = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)).double() + 1
    samples[:, 2] = -samples[:, 5]
    samples[:, [2, 5]] *= 0.9
    assert (~greedy(samples, 4)).nonzero().flatten().tolist() == [2, 5]
    cost = samples[:, [2, 5]].sum(1).square().sum()
    assert float(cost) == 0


def test_each_greedy_choice_adds_least_and_least_squares_is_the_optimum() -> None:
    samples = torch.randn(200, 7, generator=torch.Generator().manual_seed(1)).double()
    gone: list[int] = []
    for count in range(6, 2, -1):
        costs = {c: float(samples[:, [*gone, c]].sum(1).square().sum()) for c in range(7) if c not in gone}
        gone.append(min(costs, key=costs.get))
        assert set((~greedy(samples, count)).nonzero().flatten().tolist()) == set(gone)
    kept = greedy(samples, 4)
    factors, total = least_squares(samples, kept), samples.sum(1)
    torch.testing.assert_close(factors, torch.linalg.lstsq(samples[:, kept], total).solution)
    residual = total - samples[:, kept] @ factors
    assert residual.norm() <= (total - samples[:, kept].sum(1)).norm()
    twins = torch.cat([samples[:, :1], samples[:, :1], torch.zeros(200, 1).double()], 1)
    torch.testing.assert_close(least_squares(twins, torch.tensor([True, False, True])), torch.tensor([2.0, 1.0]).double())


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.Conv2d(3, 4, (1, 2), dilation=2, bias=False)],
)
def test_the_parts_of_channels_add_up_to_the_output(layer: nn.Conv2d) -> None:
    inputs = torch.randn(2, 3, 7, 7)
    output = layer(inputs)
    spots = output[0, 0].numel()
    drawn = torch.tensor([0, 1, 1]), torch.tensor([0, 3, 2]), torch.tensor([0, spots - 1, spots // 2])
    parts = contributions(layer, inputs, layer.weight, drawn)
    assert parts.shape == (3, 3)
    torch.testing.assert_close(parts.sum(1).float(), output.flatten(2)[drawn[0], drawn[1], drawn[2]])


def test_channels_that_nothing_hears_go_and_the_outputs_stay() -> None:
    model, (x, _) = network().eval(), images()
    with torch.no_grad():
        model[1].weight[[1, 2, 5, 7]] = 0
        model[1].bias[[1, 2, 5, 7]] = -1  # maps of zeros
        model[3].weight[[0, 3, 4, 6, 8, 10]] = 0
        model[3].bias[[0, 3, 4, 6, 8, 10]] = -1
    wanted = model(x).detach()
    pruner = made(Thinet, model, positions=40)
    pruner.finish()
    assert pruner.kept[:8].nonzero().flatten().tolist() == [0, 3, 4, 6]
    assert pruner.kept[8:].nonzero().flatten().tolist() == [1, 2, 5, 7, 9, 11]
    small = mg.shrink(model, x)
    torch.testing.assert_close(small.eval()(x), wanted, rtol=1e-4, atol=1e-5)


def test_rescaling_brings_the_outputs_nearer() -> None:
    (x, _), errors = images(), {}
    wanted = network().eval()(x)
    for rescale in (True, False):
        model = network().eval()
        pruner = made(Thinet, model, rescale=rescale, positions=40)
        pruner.finish()
        errors[rescale] = float((model.eval()(x) - wanted).detach().square().mean())
        assert [int(part.sum()) for part in pruner.kept.split([8, 12])] == [4, 6]
    assert errors[True] < errors[False]
    with pytest.raises(BudgetError, match="positions is at least 1"):
        made(Thinet, network(), positions=0)
