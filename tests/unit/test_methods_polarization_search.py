"""Polarization: the search for lambda and t, its short trainings and their durability; gates in place of norms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import BudgetError
from microglia.methods import Polarization, PolarizationConfig, methods
from microglia.methods.polarization_search import find_strengths
from microglia.storage.run import Run
from microglia.tasks.classification import ImageSource
from microglia.tasks.task import CLASSIFICATION, CrossEntropy
from microglia.train.fit import fit

X = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(10, (8,), generator=torch.Generator().manual_seed(2))


def falling(strength: float, t: float) -> float:
    """Fewer operations the larger both are: 1 at lambda 0, 0.3 at lambda 2e-4 and t 1.2."""
    return 1 - 3500 * strength - 0.2 * (t - 1.2)


# ------------------------------------------------------------------------------------------------------------ the search
@pytest.mark.parametrize("target", [0.4, 0.5, 0.63, 0.82])
def test_it_comes_within_delta_of_a_target(target: float) -> None:
    found = find_strengths(falling, target, probes=12, largest=2e-4, within=0.02)
    assert abs(falling(found.strength, found.t) - target) < 0.02
    assert len(found.probes) <= 8
    first = found.probes[0]
    assert (first.strength, first.t) == (1e-4, 1.2)
    assert len({(probe.strength, probe.t) for probe in found.probes}) == len(found.probes)


def test_lambda_is_bisected_at_the_first_t() -> None:
    found = find_strengths(falling, 0.57, probes=12, largest=2e-4, within=0.008)
    assert [probe.strength for probe in found.probes] == pytest.approx([1e-4, 1.5e-4, 1.25e-4])
    assert {probe.t for probe in found.probes} == {1.2}


def test_t_moves_by_a_tenth_where_lambda_is_near() -> None:
    found = find_strengths(falling, 0.595, probes=12, largest=2e-4, within=0.03)
    assert [probe.t for probe in found.probes] == pytest.approx([1.2, 1.3, 1.4])
    assert {probe.strength for probe in found.probes} == {1e-4}
    assert found.t == pytest.approx(1.4)


def test_a_target_between_two_steps_of_t_ends_the_search() -> None:
    with pytest.warns(
        UserWarning, match="0.57 of the operations were asked for, and the nearest of 4 short trainings .* leaves 0.56"
    ):
        found = find_strengths(falling, 0.57, probes=12, largest=2e-4, within=0.005)
    assert len(found.probes) == 4


def test_a_target_out_of_reach_is_told_and_the_nearest_counts() -> None:
    with pytest.warns(
        UserWarning, match=r"0\.05 of the operations were asked for, and the nearest of 4 short trainings .* leaves 0\.\d+"
    ):
        found = find_strengths(falling, 0.05, probes=4, largest=2e-4, within=0.02)
    assert len(found.probes) == 4
    assert found.strength == max(probe.strength for probe in found.probes)


def test_settings_of_the_search_are_checked() -> None:
    with pytest.raises(BudgetError, match="give flops, this fraction"):
        PolarizationConfig(density=0.5, probes=3)
    with pytest.raises(BudgetError, match="probes and probe_epochs are at least 0"):
        PolarizationConfig(flops=0.5, probes=-1)
    with pytest.raises(BudgetError, match="leave selection and initial_scale out"):
        PolarizationConfig(flops=0.5, gates=True, initial_scale=0.5)


# --------------------------------------------------------------------------------------------------------- the procedure
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10),
    )  # fmt: skip


def task() -> mg.Task:
    data = mg.data.load_data("digits")
    few = {name: getattr(data, name).subset(torch.arange(32)) for name in ("train", "validation", "test")}
    data = replace(data, **few)
    return mg.Task("digits", network, ImageSource(data), CrossEntropy(), CLASSIFICATION, data.train.images[:1] / 255)


def test_the_short_trainings_are_kept_and_a_killed_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = mg.FitConfig(epochs=1, batch_size=16, lr=0.05, max_batches=1)
    config = PolarizationConfig(flops=0.5, probes=2, train=training, dense=training, recalibrate=1)
    run, trained = Run(tmp_path / "run", {}), []
    room = __import__("microglia.methods.polarization", fromlist=["fit"])

    def counted(*args: object, **settings: object) -> object:
        trained.append(settings["title"])
        if len(trained) == 2:
            raise KeyboardInterrupt
        return fit(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        methods["polarization"].procedure(task(), run, config)
    with pytest.warns(UserWarning, match="short trainings under polarization"):
        model = methods["polarization"].procedure(task(), run, config)
    assert trained == ["probe"] * 3  # the first is not repeated
    probes = run.observations["widths"]["probes"]
    assert [probe["t"] for probe in probes] == [1.2, 1.2]
    assert all(0 < probe["flops"] <= 1 for probe in probes)
    plan = mg.graph.plan_of(model)
    assert plan.got["flops"] == pytest.approx(0.5, abs=0.1)


# ------------------------------------------------------------------------------------------------------------- the gates
class Shared(nn.Module):
    """One norm that serves two layers, and a layer without a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1)
        self.norm, self.linear = nn.BatchNorm2d(8), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.one(x)))
        x = functional.relu(self.norm(self.two(x)))
        logits: Tensor = self.linear(functional.relu(self.three(x)).mean((2, 3)))
        return logits


@pytest.mark.parametrize("make", [Shared, network])
def test_gates_change_nothing_at_first_and_are_merged_exactly(make: type[nn.Module]) -> None:
    model = make().eval()
    wanted = model(X)
    pruner = Polarization(model, total_steps=4, example_inputs=X[:1], density=0.5, gates=True)
    torch.testing.assert_close(model(X), wanted)
    gates = next(p for n, p in model.named_parameters() if p.shape == (pruner.units.count,))
    with torch.no_grad():
        gates.copy_(torch.linspace(0.1, 1.0, len(gates)))
        gates[:2] = 0.0
    changed = model(X)
    assert not torch.allclose(changed, wanted, atol=1e-3)
    assert pruner.gates is not None
    pruner.decided = torch.ones(pruner.units.count, dtype=torch.bool)
    pruner.gates.merge(model, pruner.raw)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in make().named_parameters()}
    torch.testing.assert_close(model(X), changed)


def test_a_net_whose_norms_are_shared_is_trained_and_cut_by_gates() -> None:
    model = Shared()
    pruner = Polarization(
        model, total_steps=20, example_inputs=X[:1], scope="global", density=0.5, gates=True, strength=0.3, t=1.0
    )
    optimizer = torch.optim.SGD(pruner.weights_to_train(), lr=0.1, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        (functional.cross_entropy(model.train()(X), Y) + pruner.penalty()).backward()
        optimizer.step()
        pruner.step(optimizer)
    assert float(pruner.scales[0].detach().min()) >= 0
    pruner.finish()
    small = mg.shrink(model, X, clear=True)
    torch.testing.assert_close(small.eval()(X), model.eval()(X))
    kept = small.one.out_channels + small.three.out_channels
    assert kept == pytest.approx(7, abs=1)
    assert sum(pruner.report()["scales"]["counts"]) == pruner.units.count
