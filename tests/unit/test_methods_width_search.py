"""Searches over widths: the sliced evaluator, the vectors near a budget, a search that is killed, EagleEye."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microglia as mg
from microglia.core.budget import Budget
from microglia.core.errors import BudgetError, ScoreError
from microglia.graph import ShrinkError
from microglia.graph.channels.coupled import CoupledChannels
from microglia.methods import EagleEye, Evaluator, SearchedConfig, SearchedPruner, WidthSpace, method, methods
from microglia.methods.channel_procedure import fits
from microglia.methods.width_procedure import measuring, searched_widths
from microglia.storage.run import Progress, Run
from microglia.tasks.classification import ImageSource
from microglia.tasks.task import CLASSIFICATION, CrossEntropy


class Residual(nn.Module):
    """A stem, one block with a sum, a depthwise and a grouped layer, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.second = nn.BatchNorm2d(12)
        self.back = nn.Conv2d(12, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.last = nn.Conv2d(8, 10, 1)
        self.head = nn.Linear(10, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(images)))
        x = x + self.back(torch.relu(self.second(self.inner(x))))
        x = torch.relu(self.last(self.grouped(torch.relu(self.depthwise(x)))))
        return self.head(x.mean((2, 3)))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    return model.eval()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def make_task() -> mg.Task:
    data = mg.data.load_data("digits")
    few = torch.arange(64)
    data = replace(data, **{name: getattr(data, name).subset(few) for name in ("train", "validation", "test")})
    return mg.Task("digits", network, ImageSource(data), CrossEntropy(), CLASSIFICATION, data.train.images[:1] / 255)


def space(model: nn.Module, **settings: Any) -> WidthSpace:
    return WidthSpace(CoupledChannels(model, images()), Budget(flops=settings.pop("flops", 0.5)), **settings)


# --------------------------------------------------------------------------------------------------------- the evaluator
@pytest.mark.parametrize("seed", range(4))
def test_a_sliced_candidate_computes_what_the_physically_cut_model_does(seed: int) -> None:
    model = network(seed).double()
    x = images().double()
    units = CoupledChannels(model, x)
    values = torch.rand(units.count, generator=torch.Generator().manual_seed(seed))
    found = WidthSpace(units, Budget(flops=0.5)).distinct(3, torch.Generator().manual_seed(seed))
    assert len(found) == 3
    for widths in found:
        kept = torch.cat(
            [v >= v.sort(descending=True).values[w - 1] for v, w in zip(values.split(units.lengths), widths, strict=True)]
        )
        sliced = units.sliced(model, kept)
        masked = network(seed).double()
        mg.core.masks.mask(masked, units.masks(kept))
        for name in units.companions:
            raw = masked.get_parameter(name)
            raw.data.copy_(units.companion(name, raw.data, kept))
        cut = mg.shrink(masked, x, clear=True)
        assert {n: p.shape for n, p in sliced.named_parameters()} == {n: p.shape for n, p in cut.named_parameters()}
        assert sum(p.numel() for p in sliced.parameters()) < sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(sliced.eval()(x), cut.eval()(x), rtol=0, atol=1e-6)
        total = mg.measure(cut.float(), x[:1].float(), latency=False).macs.total
        dense = mg.measure(network(seed), x[:1].float(), latency=False).macs.total
        assert total / dense == pytest.approx(units.fraction("flops", widths), abs=1e-9)


def test_slices_are_cut_from_the_weights_given_and_these_stay() -> None:
    first, other = network(0), network(7)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    units = CoupledChannels(first, images())
    kept = torch.cat([torch.arange(size) % 2 == 0 for size in units.lengths])
    small = units.sliced(other, kept)
    assert torch.equal(small.stem.weight, other.stem.weight[::2])
    small.stem.weight.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


class Fixed(nn.Module):
    """Its forward has a width of its own, which no slice changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)).reshape(-1, 16))


def test_classes_that_cannot_follow_are_told_before_anything_is_evaluated() -> None:
    with pytest.raises(ShrinkError, match="Width vectors of Fixed cannot be evaluated by slices: its forward does not follow"):
        EagleEye(Fixed(), total_steps=1, example_inputs=torch.zeros(2, 8), density=0.5)


def test_a_vector_is_measured_once() -> None:
    calls: list[tuple[int, ...]] = []

    def measure(widths: tuple[int, ...]) -> float:
        calls.append(widths)
        return -abs(widths[0] - 2.5)

    with Evaluator(measure) as evaluate:
        assert evaluate([(1,), (2,), (1,)]) == [-1.5, -0.5, -1.5]
        assert evaluate([(3,), (2,)]) == [-0.5, -0.5]
        assert list(evaluate.values) == [(1,), (2,), (3,)]
    assert calls == [(1,), (2,), (3,)]


def test_processes_find_the_same_values() -> None:
    vectors = [(number,) for number in range(12)]
    begun = []
    with Evaluator(lambda widths: widths[0] ** 2 / 3, processes=2, begin=lambda: begun.append(1)) as evaluate:
        assert evaluate(vectors) == [number**2 / 3 for number in range(12)]
    assert begun == []  # in the workers only


def test_an_error_in_a_process_arrives() -> None:
    def measure(widths: tuple[int, ...]) -> float:
        raise BudgetError(f"no {widths[0]}")

    with Evaluator(measure, processes=2) as evaluate, pytest.raises(BudgetError, match="no 3"):
        evaluate([(3,)])


class Killed(Exception):
    """Stands for a kill."""


def killed_and_resumed(task: mg.Task, config: Any, kind: type[SearchedPruner], after: int) -> tuple[Any, Any, list[int]]:
    """Returns reports of a search that nothing interrupts and of one that is killed, and how many each attempt measured."""
    counts = [0, 0, 0]

    def search(number: int, progress: Progress | None, limit: int | None = None) -> Any:
        measure = measuring(task, Run(seed=3), config)

        def counted(small: nn.Module) -> float:
            if limit is not None and counts[number] == limit:
                raise Killed
            counts[number] += 1
            return measure(small)

        made = kind(task.build(), config, total_steps=1, example_inputs=task.example)
        made.search(counted, progress, seed=3)
        made.finish()
        return made.report()

    whole, states = search(0, None), []
    with pytest.raises(Killed):
        search(1, Progress(None, states.append), limit=after)
    return whole, search(2, Progress(states[-1], states.append)), counts


def test_a_search_that_is_killed_goes_on_and_ends_the_same() -> None:
    config = methods["eagleeye"].config(flops=0.5, candidates=6, tolerance=0.02, images=32, recalibrate=1)
    whole, resumed, counts = killed_and_resumed(make_task(), config, EagleEye, after=4)
    assert resumed == whole
    assert counts == [6, 4, 2]


# ------------------------------------------------------------------------------------------------------------- the space
@pytest.mark.parametrize("flops", [0.35, 0.5, 0.8])
def test_candidates_are_feasible_and_distinct(flops: float) -> None:
    made = space(network(), flops=flops, below=0.01, above=0.01, kept=(0.2, 1.0))
    found = made.distinct(8, torch.Generator().manual_seed(0))
    assert len(set(found)) == len(found) == 8
    for widths in found:
        assert abs(made.units.fraction("flops", widths) - flops) <= made.above + 1e-9
        assert all(1 <= width <= size for width, size in zip(widths, made.units.lengths, strict=True))
        assert all(width >= 0.2 * size - 0.5 for width, size in zip(widths, made.units.lengths, strict=True))


def test_widths_are_multiples_where_asked() -> None:
    made = space(network(), below=0.05, above=0.05, round_to=2)
    for widths in made.distinct(5, torch.Generator().manual_seed(0)):
        assert widths[1] % 2 == widths[3] % 2 == 0  # of 12 and 10 channels


def test_draws_far_from_the_budget_are_shifted_to_it() -> None:
    made = space(network(), flops=0.06, below=0.01, above=0.01)
    assert made.distinct(3, torch.Generator().manual_seed(0))
    assert made.rejected > 0


@pytest.mark.parametrize(("flops", "rates"), [(0.001, (0.0, 1.0)), (0.5, (0.0, 0.1)), (0.9, (0.5, 0.7))])
def test_a_budget_that_no_vector_meets_is_told(flops: float, rates: tuple[float, float]) -> None:
    with pytest.raises(BudgetError, match=rf"No width vector meets the budget \(flops {flops}\): .* leaves flops .* to flops"):
        EagleEye(network(), total_steps=1, example_inputs=images(), flops=flops, rates=rates)


# -------------------------------------------------------------------------------------------------------------- eagleeye
def test_the_best_on_the_split_wins_with_the_largest_filters() -> None:
    model = network()
    pruner = EagleEye(model, total_steps=1, example_inputs=images(), density=0.5, candidates=8)
    wanted = pruner.units.names.index("inner.weight")
    pruner.search(lambda small: float(small.inner.out_channels))
    pruner.finish()
    report = pruner.report()
    assert report["counts"]["inner.weight"] == max(found["widths"][wanted] for found in report["candidates"])
    (round_,) = report["rounds"]
    assert round_["best"] == report["counts"]["inner.weight"] >= round_["median"]
    assert round_["candidates"] == len(report["candidates"])
    assert report["density"] == pytest.approx(0.5, abs=0.03)
    norms = network().inner.weight.abs().flatten(1).sum(1)
    kept = mg.masks_of(model)["inner.weight"].flatten(1).all(1)
    assert norms[kept].min() > norms[~kept].max() if not kept.all() else True
    small = mg.shrink(model, images(), clear=True)
    torch.testing.assert_close(small.eval()(images()), model.eval()(images()))


def test_of_equal_values_the_widest_counts() -> None:
    pruner = EagleEye(network(), total_steps=1, example_inputs=images(), flops=0.5, candidates=6, tolerance=0.1)
    pruner.search(lambda small: 1.0)
    fractions = [pruner.units.fraction("flops", widths) for widths in pruner.values]
    assert pruner.units.fraction("flops", pruner.widths) == max(fractions) > min(fractions)


def test_statistics_are_estimated_anew_for_every_candidate() -> None:
    task = make_task()
    config = methods["eagleeye"].config(flops=0.5, images=64, recalibrate=2)
    model = network()
    with torch.no_grad():
        model.norm.running_mean.fill_(1e4)  # nothing is left of the images
        model.norm.running_var.fill_(1e-6)
    value = measuring(task, Run(), config)(model)
    assert abs(float(model.norm.running_mean.mean())) < 100
    assert 0 <= value <= 1
    assert value == mg.evaluate(model, task, "validation")["accuracy"]


def test_a_lower_metric_is_better_where_the_task_says_so() -> None:
    task = replace(make_task(), metrics={"loss": CLASSIFICATION["loss"]})
    config = methods["eagleeye"].config(flops=0.5, images=64, recalibrate=0)
    model = network()
    value = measuring(task, Run(), config)(model)
    assert value == -mg.evaluate(model, task, "validation")["loss"]


def test_wrong_words_are_told() -> None:
    kind = methods["eagleeye"].config
    with pytest.raises(BudgetError, match="candidates is at least 1; got 0"):
        kind(flops=0.5, candidates=0)
    with pytest.raises(BudgetError, match="rates are two removed fractions"):
        kind(flops=0.5, rates=(0.7, 0.2))
    with pytest.raises(BudgetError, match="images and processes are at least 1"):
        kind(flops=0.5, processes=0)
    with pytest.raises(BudgetError, match=r"tolerance is in \[0, 1\)"):
        kind(flops=0.5, tolerance=-0.1)
    with pytest.raises(ScoreError, match="does not take score"):
        kind(flops=0.5, score="l2")
    with pytest.raises(BudgetError, match="cuts to a budget: give density, params or flops"):
        EagleEye(network(), total_steps=1, example_inputs=images())
    pruner = EagleEye(network(), total_steps=1, example_inputs=images(), flops=0.5, tolerance=0.02)
    with pytest.raises(BudgetError, match=r"EagleEye has no widths yet: call search\(measure\) before finish"):
        pruner.finish()


# ------------------------------------------------------------------------------------------------------------- the seam
@dataclass(frozen=True)
class ToyConfig(SearchedConfig):
    """Of a search from elsewhere."""


class Widest(SearchedPruner):
    """Evaluates two vectors."""

    Config = ToyConfig

    def explore(self, evaluate: Evaluator, generator: torch.Generator) -> None:
        self.note(evaluate(self.space.distinct(2, generator)))


def test_a_search_from_elsewhere_is_a_method(tmp_path: Path) -> None:
    @method("toy-widths", ToyConfig, check=fits(Widest))
    def toy(task: mg.Task, run: Run, config: ToyConfig) -> nn.Module:
        """Toy."""
        return searched_widths(task, run, config, Widest)

    try:
        short = mg.FitConfig(epochs=1, batch_size=32, lr=0.01)
        config = ToyConfig(flops=0.5, tolerance=0.05, images=32, dense=short, train=short, processes=2)
        task = make_task()
        methods["toy-widths"].check(task, config)
        run = Run(tmp_path / "run", {})
        model = methods["toy-widths"].procedure(task, run, config)
        assert len(run.observations["candidates"]["candidates"]) == 2
        plan = mg.graph.plan_of(model)
        assert plan.got["flops"] == pytest.approx(0.5, abs=0.05)
        widths = run.observations["widths"]
        assert sum(widths["counts"].values()) < sum(widths["widths"].values())
    finally:
        del methods._items["toy-widths"]
