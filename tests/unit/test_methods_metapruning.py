"""MetaPruning: weights that a network makes for given widths, and the evolution on them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import BudgetError
from microglia.graph.channels.coupled import CoupledChannels
from microglia.methods import MetaPruning, PruningNet, methods
from microglia.methods.metapruning import OPTIONS, share, widths_of
from microglia.storage.run import Progress
from microglia.train.recover import recalibrate


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def made() -> tuple[nn.Module, PruningNet]:
    torch.manual_seed(0)
    model = mg.zoo.build("resnet8")
    return model, PruningNet(model, CoupledChannels(model, images()))


def test_options_are_those_of_the_code() -> None:
    assert [share(gene) for gene in (0, 1, OPTIONS - 1)] == [0.10, 0.13, 1.0]
    assert widths_of((0, 10, 30), (64, 64, 16)) == (6, 25, 16)
    assert widths_of((0,), (8,)) == (1,)


def test_made_weights_are_cropped_to_the_first_channels_and_depend_on_the_widths_around() -> None:
    _, net = made()
    narrow = tuple(size // 2 for size in net.sizes)
    weights, whole = net.weights(narrow), net.weights(net.sizes)
    for place in net.units.made:
        if place.name in weights and weights[place.name].ndim == 4:
            rows = weights[place.name].movedim(place.dim, 0).flatten(1).any(1)
            kept = torch.cat([net.kept(narrow), torch.ones(1, dtype=torch.bool)])[place.units]
            assert torch.equal(rows, kept)
    small = net.made(narrow)
    own = small.layer1[0].conv1.weight
    assert own.shape[:2] == (8, 8)
    torch.testing.assert_close(own, weights["layer1.0.conv1.weight"][:8, :8])
    assert not torch.allclose(own, whole["layer1.0.conv1.weight"][:8, :8], atol=1e-4)


def test_a_masked_step_and_the_sliced_model_compute_the_same() -> None:
    _, net = made()
    narrow = tuple(max(1, size // 3) for size in net.sizes)
    small = net.made(narrow).train()
    whole = torch.func.functional_call(deepcopy(net.body).train(), net.weights(narrow), (images(),))
    torch.testing.assert_close(small(images()), whole, rtol=1e-4, atol=1e-5)


def test_training_reaches_the_generators_only_and_statistics_matter() -> None:
    _, net = made()
    x, y = images(32), torch.arange(32) % 2
    x[y == 1] += 1.0
    trained = [p for p in net.parameters() if p.requires_grad]
    before = net.body.conv1.weight.clone()
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        functional.cross_entropy(net.train()(x), y).backward()
        optimizer.step()
    assert int(net.draws) == 30
    assert torch.equal(net.body.conv1.weight, before)
    small = net.made(tuple(size // 2 for size in net.sizes))
    recalibrate(small, [(x, y)], count=1)
    accuracy = (small.eval()(x)[:, :2].argmax(1) == y).float().mean()
    assert accuracy > 0.8
    norm = small.layer1[0].bn1
    assert (norm.weight == 1).all()
    assert not norm.bias.any()


def test_widths_of_a_training_follow_from_the_state() -> None:
    _, net = made()
    net.train()(images())
    state = deepcopy(net.state_dict())
    expected = net(images())
    net(images())
    net.load_state_dict(state)
    torch.testing.assert_close(net(images()), expected)


class Killed(Exception):
    """Stands for a kill."""


def test_the_evolution_goes_on_after_a_kill_meets_the_budget_and_finds_the_best() -> None:
    counts = [0, 0, 0]

    def search(number: int, progress: Progress | None, limit: int | None = None) -> Any:
        torch.manual_seed(0)
        model = mg.zoo.build("resnet8")
        settings: dict[str, Any] = {"population": 8, "parents": 3, "mutants": 4, "crossovers": 3, "iterations": 4}
        pruner = MetaPruning(model, total_steps=1, example_inputs=images(), flops=0.5, **settings)

        def measure(small: nn.Module) -> float:
            if counts[number] == limit:
                raise Killed
            counts[number] += 1
            return float(small.layer3[0].conv1.out_channels)

        pruner.search(measure, progress, seed=2)
        pruner.finish()
        return pruner, model

    pruner, model = search(0, None)
    report, states = pruner.report(), []
    with pytest.raises(Killed):
        search(1, Progress(None, states.append), limit=13)
    resumed, _ = search(2, Progress(states[-1], states.append))
    assert resumed.report() == report
    assert counts[1] + counts[2] == counts[0]
    for found in report["candidates"]:
        assert 0.45 - 1e-9 <= pruner.units.fraction("flops", found["widths"]) <= 0.5 + 1e-9
    assert len({tuple(found["widths"]) for found in report["candidates"]}) == len(report["candidates"]) == counts[0]
    assert len(report["rounds"]) == 4
    small = mg.shrink(model, images(), clear=True)
    assert small.layer3[0].conv1.out_channels == max(found["value"] for found in report["candidates"])


def test_a_population_of_one_is_told() -> None:
    with pytest.raises(BudgetError, match="population is at least 2, because a crossover needs two parents; got 1"):
        methods["metapruning"].config(flops=0.5, population=1)
    with pytest.raises(BudgetError, match=r"No width vector meets the budget \(flops 0.001\)"):
        MetaPruning(mg.zoo.build("resnet8"), total_steps=1, example_inputs=images(), flops=0.001)
