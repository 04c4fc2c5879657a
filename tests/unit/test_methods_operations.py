"""Budgets of multiply-accumulates for methods that choose units while they train: met by the count of the smaller model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import BudgetError, ScoreError
from microglia.graph import plan_of
from microglia.measure import count_macs
from microglia.methods import Acdc, Awg, Pas, Pdp, Smart, UnitPruner, methods
from microglia.methods.limits import Operations, OwnCosts
from microglia.methods.search_observed import Search
from microglia.storage.run import Run
from microglia.tasks.task import CLASSIFICATION, CrossEntropy

EVERY = [Smart, Pdp, Pas, Awg, Acdc]
STEPS = 6
OWN: dict[type, dict[str, Any]] = {
    Smart: {"search": 0.8, "mask_lr": 0.3}, Pdp: {"search": 0.8}, Pas: {"search": 0.8, "mask_lr": 0.2},
    Awg: {"search": 1.0, "updates": 2}, Acdc: {"compress": (0.2, 0.8), "decompress": (0.5,)},
}  # fmt: skip


class Mixed(nn.Module):
    """A stream that is summed, a depthwise and a grouped convolution, a classifier: every way in which channels couple."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 16, 3, padding=1)
        self.wide, self.depthwise = nn.Conv2d(16, 40, 1), nn.Conv2d(40, 40, 3, groups=40)
        self.narrow, self.grouped = nn.Conv2d(40, 32, 1), nn.Conv2d(32, 32, 1, groups=8)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + torch.relu(self.inner(x)))
        x = torch.relu(self.depthwise(torch.relu(self.wide(x))))
        return self.head(torch.relu(self.grouped(torch.relu(self.narrow(x)))).mean((2, 3)))


X = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(5, (8,), generator=torch.Generator().manual_seed(2))


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU(), nn.Flatten(), nn.Linear(864, 5)
    )


def macs_of_chain(one: int, two: int) -> int:
    return 25 * 9 * 3 * one + 9 * 9 * one * two + 9 * two * 5


def pruner_of(kind: type[UnitPruner], model: nn.Module, **settings: Any) -> UnitPruner:
    evidence = mg.scores.Evidence([(X, Y)], functional.cross_entropy, torch.Generator().manual_seed(0))
    known = {"total_steps": STEPS, "example_inputs": X[:1], "evidence": evidence, "pattern": "channel", **OWN.get(kind, {})}
    return kind(model, **known | settings)


def train(model: nn.Module, pruner: UnitPruner, steps: int, optimizers: list[torch.optim.Optimizer] | None = None) -> Any:
    optimizers = optimizers or [torch.optim.SGD(pruner.weights_to_train(), lr=0.05, momentum=0.9), *pruner.optimizers()]
    for _ in range(steps):
        loss = functional.cross_entropy(model(X), Y) + pruner.penalty()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        pruner.step(optimizers[0])
    return optimizers


# -------------------------------------------------------------------------------------------------------- every method
@pytest.mark.parametrize("kind", EVERY)
def test_the_smaller_model_has_the_operations_asked_and_a_resumed_search_the_same_bits(kind: type[UnitPruner]) -> None:
    model = Mixed()
    dense = count_macs(model, X[:1]).total
    pruner = pruner_of(kind, model, flops=0.5)
    optimizers = train(model, pruner, 3)
    saved = copy.deepcopy((model.state_dict(), [o.state_dict() for o in optimizers], pruner.state_dict()))
    train(model, pruner, STEPS - 3, optimizers)
    masks, told = pruner.finish(), pruner.report()
    small = mg.shrink(model.eval(), X[:1])
    assert told["flops"] == pytest.approx(0.5, rel=0.01)
    assert count_macs(small, X[:1]).total == round(told["flops"] * dense)

    again = Mixed()
    resumed = pruner_of(kind, again, flops=0.5)
    others = [torch.optim.SGD(resumed.weights_to_train(), lr=0.05, momentum=0.9), *resumed.optimizers()]
    resumed.load_state_dict(saved[2])
    again.load_state_dict(saved[0])
    for optimizer, state in zip(others, saved[1], strict=True):
        optimizer.load_state_dict(state)
    train(again, resumed, STEPS - 3, others)
    assert resumed.finish().same(masks)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


class Largest(UnitPruner):
    """A method from elsewhere: the largest units by magnitude, after a search that softens nothing."""

    softens = False

    def factors(self) -> Tensor:
        return torch.ones(self.units.count)

    def ranking(self) -> Tensor:
        return self.units.reduce({name: w.abs() for name, w in self.raw_weights.items()}, "mean")


@pytest.mark.parametrize("flops", [0.7, 0.3])
def test_a_method_from_elsewhere_has_the_budget_too(flops: float) -> None:
    model = chain()
    pruner = pruner_of(Largest, model, flops=flops)
    pruner.finish()
    one, two = (int(part.sum()) for part in torch.split(pruner.kept, list(pruner.units.lengths)))
    assert macs_of_chain(one, two) / macs_of_chain(64, 96) == pytest.approx(pruner.report()["flops"], rel=1e-12)
    assert pruner.report()["flops"] == pytest.approx(flops, rel=0.01)


# --------------------------------------------------------------------------------------------------------- the choice
def test_the_choice_is_the_nearest_prefix_of_the_order_or_comes_near_by_exchanges() -> None:
    pruner = pruner_of(Largest, chain(), flops=0.4)
    units, target = pruner.units, 0.4 * macs_of_chain(64, 96)
    for seed in range(4):
        scores = torch.randn(160, generator=torch.Generator().manual_seed(seed))
        scores[3], scores[70] = torch.inf, -torch.inf
        kept = pruner.limit.choose(scores)
        assert kept[3]
        assert not kept[70]
        counts = [int(part.sum()) for part in torch.split(kept, [64, 96])]
        for part, own in zip(torch.split(kept, [64, 96]), torch.split(scores, [64, 96]), strict=True):
            assert own[part].min() >= own[~part].max()  # the best of each group
        best = torch.tensor(
            [int(part.argmax()) + start for part, start in zip(torch.split(scores, [64, 96]), (0, 64), strict=True)]
        )
        order = scores.index_fill(0, best, torch.inf).argsort(descending=True, stable=True).tolist()
        prefixes = [[sum(u < 64 for u in order[:n]), sum(u >= 64 for u in order[:n])] for n in range(2, 160)]
        nearest = min(prefixes, key=lambda own: abs(macs_of_chain(*own) - target))
        if abs(macs_of_chain(*nearest) / target - 1) <= 0.01:
            assert counts == nearest
        assert macs_of_chain(*counts) == pytest.approx(target, rel=0.01)
    assert int(units.macs_at(torch.tensor([[64, 96], [5, 7]]))[1]) == macs_of_chain(5, 7)
    with pytest.raises(ScoreError, match="channels"):
        pruner.limit.choose(torch.full((160,), torch.nan))


def test_smart_ends_in_the_exact_choice_and_weighs_channels_by_what_they_would_save() -> None:
    model = chain()
    pruner = pruner_of(Smart, model, flops=0.5, search=1.0, final_temp=1e-5)
    optimizers = None
    for _ in range(STEPS - 1):
        optimizers = train(model, pruner, 1, optimizers)
        keep, weights = pruner.limit.soft(pruner.ranking().detach())
        assert float((pruner.factors().detach().double() * weights).sum()) == pytest.approx(keep, rel=1e-4)
        one, two = (int(part.sum()) for part in torch.split(pruner.limit.choose(pruner.ranking()), [64, 96]))
        assert macs_of_chain(one, two) == pytest.approx(0.5 * macs_of_chain(64, 96), rel=0.01)
        saved = [macs_of_chain(one, two) - macs_of_chain(one - 1, two), macs_of_chain(one, two) - macs_of_chain(one, two - 1)]
        assert float(weights[0] / weights[-1]) == pytest.approx(saved[0] / saved[1], rel=1e-5)
    chosen = pruner.limit.choose(pruner.ranking())
    assert float((pruner.factors().detach() - chosen.float()).abs().max()) < 0.05


def test_a_budget_of_all_operations_keeps_every_channel() -> None:
    pruner = pruner_of(Smart, chain(), flops=1.0)
    assert float(pruner.factors().detach().min()) == 1
    pruner.finish()
    assert bool(pruner.kept.all())
    assert pruner.report()["flops"] == 1


def test_awg_goes_to_the_budget_by_equal_parts_of_the_operations() -> None:
    model = Mixed()
    pruner = pruner_of(Awg, model, flops=0.4, updates=3, max_sparsity=1.0)
    optimizers, seen = None, []
    for _ in range(STEPS):
        optimizers = train(model, pruner, 1, optimizers)
        seen.append(pruner.limit.told(pruner.kept)["flops"])
    assert [seen[0], seen[2], seen[4]] == pytest.approx([0.8, 0.6, 0.4], rel=0.01)


def test_pas_pays_for_the_product_of_widths() -> None:
    pruner = pruner_of(Pas, chain(), flops=0.5, strength=3.0)
    with torch.no_grad():
        pruner.soft.scores.copy_(torch.tensor([1.0] * 6 + [0.0] * 58 + [1.0] * 10 + [0.0] * 86))
    left = macs_of_chain(6, 10) / macs_of_chain(64, 96)
    assert float(pruner.penalty().detach()) == pytest.approx(3.0 * (left / 0.5 - 1) ** 2, rel=1e-5)


def test_a_density_of_the_operations_is_the_same_budget() -> None:
    kept = []
    for budget in ({"flops": 0.5}, {"density": 0.5, "cost": "macs"}):
        pruner = pruner_of(Largest, chain(), **budget)
        pruner.finish()
        assert isinstance(pruner.limit, Operations)
        kept.append(pruner.kept)
    assert torch.equal(*kept)
    assert isinstance(pruner_of(Largest, chain(), density=0.5).limit, OwnCosts)


@pytest.mark.parametrize("kind", [Smart, Acdc])
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x2"])
def test_of_masks_the_operations_of_kept_weights_are_counted(kind: type[UnitPruner], pattern: str) -> None:
    model = Mixed()
    pruner = pruner_of(kind, model, pattern=pattern, flops=0.5, exclude=("stem",))
    train(model, pruner, 1)
    pruner.finish()
    counted = count_macs(model, X[:1])
    assert counted.effective / counted.total == pytest.approx(0.5, rel=1e-3 if pattern == "unstructured" else 0.02)
    assert pruner.masks.density < 0.6


def test_a_recipe_has_the_budget_and_its_result_says_what_came_out(tmp_path: Path) -> None:
    source = mg.tasks.loaders(train=[(X, Y), (X, Y)], validation=[(X, Y)], test=[(X, Y)])
    task = mg.Task("noise", chain, source, CrossEntropy(), CLASSIFICATION, X[:1])
    config = methods["smart"].config(
        pattern="channel", flops=0.5, search=1.0, dense=mg.FitConfig(epochs=0), train=mg.FitConfig(epochs=1, batch_size=8)
    )
    methods["smart"].check(task, config)
    run = Run(tmp_path / "run", {"flops": 0.5})
    small = methods["smart"].procedure(task, run, config)
    plan = plan_of(small)
    assert plan.asked == {"flops": 0.5}
    assert plan.got["flops"] == pytest.approx(0.5, rel=0.01)
    assert count_macs(small, task.example).total / count_macs(chain(), task.example).total == plan.got["flops"]
    assert run.observations["search"]["flops"] == plan.got["flops"]
    assert Search(flops=0.5).flops == 0.5


# --------------------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"flops": 0.001},
            "flops=0.001 cannot be met: with one channel in each group, in 2 groups, the model still has 0.001469",
        ),
        ({"flops": 0.2, "max_sparsity": 0.5}, "at least 0.5 of the channels of each group"),
        (
            {"flops": 0.05, "pattern": "block:4x2", "exclude": ("0",)},
            "of the multiply-accumulates are outside the pruned layers",
        ),
        ({"flops": 0.5, "density": 0.5}, "give one of density, params and flops"),
        ({"flops": 0.5, "cost": "units"}, "leave cost out"),
        ({"flops": 0.5, "pattern": "nm:2:4"}, "leave density, params and flops out"),
        ({"flops": 0.5, "pattern": "block:4x2", "permute": True}, "give density or params, and not flops"),
        ({"flops": 50}, "Did you mean 0.5"),
        ({}, "needs"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_at_once(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(BudgetError, match=text):
        pruner_of(Smart, chain(), **settings)
