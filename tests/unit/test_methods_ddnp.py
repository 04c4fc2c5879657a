"""DDNP: the prefix and its gradient, ranks, a frozen backbone, the budget, stages that are resumed, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microglia as mg
from microglia.core.errors import BudgetError, MicrogliaError, PatternError, SelectorError
from microglia.data import ImageData
from microglia.graph.channels.coupled import CoupledChannels
from microglia.methods import ddnp
from microglia.methods.ddnp import DdnpConfig, Prefix, Search, energies, ranks, whole_widths
from microglia.storage.files import digest
from microglia.storage.run import Progress, Run
from microglia.tasks.classification import ImageSource
from microglia.tasks.task import CLASSIFICATION, CrossEntropy

SHORT = mg.FitConfig(epochs=1, batch_size=32, lr=0.05)
STAGES = ["dense", "dense-observed", "search", "prune", "before-observed", "train"]


class Network(nn.Module):
    """A stem, a residual block with batch norm, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.inner = nn.Conv2d(24, 48, 3, padding=1, bias=False)
        self.between = nn.BatchNorm2d(48)
        self.outer = nn.Conv2d(48, 24, 3, padding=1)
        self.head = nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(images)))
        return self.head((x + self.outer(torch.relu(self.between(self.inner(x))))).mean((2, 3)))


def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network()


@pytest.fixture(scope="module")
def task() -> mg.Task:
    data, few = mg.data.load_data("digits"), torch.arange(96)
    parts = {split: getattr(data, split).subset(few) for split in ("train", "validation", "test")}
    images = ImageData(
        name="digits", classes=data.classes, **parts, normalization=data.normalization, augmentation=data.augmentation
    )
    example = data.train.images[:1] / 255
    return mg.Task("network on digits", build, ImageSource(images), CrossEntropy(), CLASSIFICATION, example)


def config(**settings: Any) -> DdnpConfig:
    short = {"dense": SHORT, "train": SHORT, "score_batch_size": 32, "search_epochs": 3, "search_share": 0.5}
    return DdnpConfig(**{"flops": 0.5, **short, **settings})


def run(task: mg.Task, settings: DdnpConfig, directory: Path | None = None, seed: int = 0) -> tuple[nn.Module, Run]:
    own = Run(directory, {"flops": settings.flops}, seed=seed)
    try:
        return ddnp.ddnp(task, own, settings), own
    finally:
        own.close()


def assert_same(model: nn.Module, other: nn.Module) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# ------------------------------------------------------------------------------------------------------------ the prefix
@pytest.mark.parametrize("size", [1, 7, 40, 64, 300])
@pytest.mark.parametrize("width", [0.0, 0.013, 0.2, 0.507, 0.95, 0.999, 1.0])
def test_the_prefix_sums_to_the_width_within_its_ramp(size: int, width: float) -> None:
    order = torch.arange(size)
    mask = Prefix.apply(torch.tensor([width]), order, [size], 0.0)
    half, whole = int(0.05 * size), int(width * size + 0.5)
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert bool((mask.diff() <= 0).all())  # of ranked channels
    assert bool((mask[: max(0, whole - half)] == 1).all())
    assert not mask[whole + half :].any()
    interior = half > 0 and half <= whole <= size - half
    assert abs(float(mask.sum()) - width * size) <= (0.1 if interior else 0.5 + 1e-4)
    floored = Prefix.apply(torch.tensor([width]), order, [size], 0.025)
    torch.testing.assert_close(floored, (mask + 0.025).clamp(max=1))


def test_the_step_is_the_formula() -> None:
    size, width = 100, 0.503
    mask = Prefix.apply(torch.tensor([width]), torch.arange(size), [size], 0.0)
    x = (width * size - torch.arange(45, 55) - 0.5).clamp(-5, 5) / 10
    torch.testing.assert_close(mask[45:55], -2 * x**3 + 1.5 * x + 0.5)


def test_the_gradient_of_a_width_is_the_mean_of_the_masks() -> None:
    lengths, generator = [4, 30, 1], torch.Generator().manual_seed(0)
    widths = torch.tensor([0.3, 0.6, 0.9], requires_grad=True)
    weights = torch.randn(35, generator=generator)
    (Prefix.apply(widths, torch.randperm(35, generator=generator), lengths, 0.025) * weights).sum().backward()
    torch.testing.assert_close(widths.grad, torch.stack([part.mean() for part in weights.split(lengths)]))


def test_ranks_are_a_permutation_of_each_group() -> None:
    importance = torch.randn(60, generator=torch.Generator().manual_seed(0))
    importance[5:9] = 0.5  # ties
    lengths = [10, 1, 49]
    for own, place in zip(importance.split(lengths), ranks(importance, lengths).split(lengths), strict=True):
        assert sorted(place.tolist()) == list(range(len(own)))
        assert bool((own[place.argsort()].diff() <= 0).all())
    # Scattered back, the mask of the ranks is the mask of the most important channels.
    mask = Prefix.apply(torch.tensor([0.3, 1.0, 0.2]), ranks(importance, lengths), lengths, 0.0)
    assert set(mask[:10].nonzero().flatten().tolist()) == set(importance[:10].topk(3).indices.tolist())


# ------------------------------------------------------------------------------------------------------------ the search
def test_energy_is_the_sum_of_squares_where_channels_are_read(task: mg.Task) -> None:
    model = build().eval()
    images, targets = next(iter(task.data.batches("train", 16).epoch(0)))
    channels = CoupledChannels(model, task.example)
    energy = energies(model, channels, [(images[:8], targets[:8]), (images[8:], targets[8:])], torch.device("cpu"))
    with torch.no_grad():
        x = torch.relu(model.norm(model.stem(images)))
        y = torch.relu(model.between(model.inner(x)))
        z = (x + model.outer(y)).mean((2, 3))
    wanted = {24: x.square().sum((0, 2, 3)) + z.square().sum(0), 48: y.square().sum((0, 2, 3))}
    for length, part in zip(channels.lengths, energy.split(channels.lengths), strict=True):
        torch.testing.assert_close(part.float(), wanted[length], rtol=1e-4, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_grouped_convolutions_and_linear_layers_have_energies() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
    ).eval()  # fmt: skip
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    channels = CoupledChannels(model, images[:1])
    assert bool((energies(model, channels, [(images, None)], torch.device("cpu")) > 0).any())


def test_the_backbone_is_bit_identical_after_the_search(task: mg.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build().train()
    searched: list[nn.Module] = []
    epoch = ddnp._epoch

    def noting(own: Search, step: Any, *rest: Any) -> float:
        assert not step.model.training
        assert not step.model.norm.training
        searched.append(step.model)
        return epoch(own, step, *rest)

    monkeypatch.setattr(ddnp, "_epoch", noting)
    before, modes = digest(model.state_dict()), [module.training for module in model.modules()]
    found = ddnp.search(task, Run(), config(), model, Progress(None, lambda state: None))
    assert digest(model.state_dict()) == before
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(found["report"]["history"]) == 3

    def raw(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("parametrizations.", "").removesuffix(".original"): value for name, value in state.items()}

    assert digest(raw(searched[-1].state_dict())) == before  # what was searched on, below its gates
    assert not any(parameter.requires_grad for parameter in searched[-1].parameters())


def test_gates_move_both_networks_and_draw_from_their_own_generator(task: mg.Task) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    found = {}
    for seed in (0, 0, 1):
        ddnp.search(task, Run(seed=seed), config(), build(), Progress(None, lambda state: found.update({seed: state})))  # noqa: B023
    fresh = Search(CoupledChannels(build(), task.example), config(), torch.ones(72), torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(3), expected)
    for name, parameter in fresh.named_parameters():
        assert not torch.equal(found[0]["networks"][name], parameter), name
        assert not torch.equal(found[0]["networks"][name], found[1]["networks"][name]), name


def test_the_search_lowers_its_loss_and_drops_channels_that_do_nothing(task: mg.Task) -> None:
    model = build()
    with torch.no_grad():  # half of the inner channels
        model.between.weight[::2] = 1e-3
    settings = config(search_epochs=40, search_lr=1e-2, search_share=0.34)
    found = ddnp.search(task, Run(), settings, model, Progress(None, lambda state: None))
    losses = [row["loss"] for row in found["report"]["history"]]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert max(found["report"]["widths"].values()) < 0.95
    lengths = CoupledChannels(model, task.example).lengths
    inner = found["kept"].split(lengths)[lengths.index(48)]
    assert int(inner[1::2].sum()) > int(inner[::2].sum())


# ---------------------------------------------------------------------------------------------------------- the procedure
@pytest.mark.parametrize("flops", [1.0, 0.7, 0.5, 0.25, 0.1])
def test_the_budget_is_met_by_whole_channels(task: mg.Task, flops: float) -> None:
    channels = CoupledChannels(build(), task.example)
    for widths in ([0.9, 0.9], [0.95, 0.3], [0.05, 0.99]):
        counts = whole_widths(channels, torch.tensor(widths), flops)
        kept = torch.cat([torch.arange(size) < n for size, n in zip(channels.lengths, counts, strict=True)])
        one = 1 / int(counts.max())  # a channel of the wider group
        assert int(counts.min()) >= 1
        assert abs(float(channels.macs(kept.double())) / flops - 1) <= max(0.01, one)


def test_the_budget_is_met_by_what_is_measured(task: mg.Task) -> None:
    settings = config(train=replace(SHORT, epochs=0))
    model, own = run(task, settings)
    plan, dense, before = mg.graph.plan_of(model), own.observations["dense"], own.observations["before"]
    assert plan.asked == {"flops": 0.5}
    assert plan.got["flops"] == pytest.approx(before["macs"]["total"] / dense["macs"]["total"], rel=1e-9)
    assert plan.got["flops"] == pytest.approx(0.5, rel=0.01)
    assert before["parameters"]["all"] < dense["parameters"]["all"]
    counts = own.observations["widths"]["counts"]
    assert sorted(counts.values()) == sorted([model.stem.weight.shape[0], model.inner.weight.shape[0]])
    assert model.head.weight.shape[0] == 10


def test_excluded_layers_keep_their_shape(task: mg.Task) -> None:
    model, _ = run(task, config(exclude=("stem",), flops=0.6))
    assert model.stem.weight.shape[0] == 24
    assert mg.graph.plan_of(model).got["flops"] == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("killed_after", [2, 3])
def test_a_run_goes_on_and_ends_in_the_same_bits(task: mg.Task, tmp_path: Path, killed_after: int) -> None:
    whole, own = run(task, config(), tmp_path / "run")
    assert sorted(path.stem for path in (tmp_path / "run" / "stages").iterdir()) == sorted(STAGES)
    for stage in STAGES[killed_after:]:
        (tmp_path / "run" / "stages" / f"{stage}.safetensors").unlink()
    again, other = run(task, config(), tmp_path / "run")
    assert_same(whole, again)
    assert other.observations == own.observations
    assert mg.graph.plan_of(again).kept == mg.graph.plan_of(whole).kept
    assert_same(whole, run(task, config())[0])  # the same seed, without a directory


def test_a_killed_search_goes_on_from_its_last_pass(task: mg.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, own = run(task, config())
    epoch, passes = ddnp._epoch, []

    def killed(*all: Any) -> float:
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return epoch(*all)

    monkeypatch.setattr(ddnp, "_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(task, config(), tmp_path / "run")
    again, other = run(task, config(), tmp_path / "run")
    assert len(passes) == 4  # two, the one that was killed, and that again
    assert_same(whole, again)
    assert other.observations["widths"] == own.observations["widths"]


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"flops": None}, BudgetError, "flops, the kept fraction"),
        ({"density": 0.5}, BudgetError, "not density"),
        ({"flops": 50.0}, BudgetError, "Did you mean 0.5"),
        ({"flops": 1e-4}, BudgetError, "one channel in each group"),
        ({"pattern": "block:4x2"}, PatternError, "its pattern is channel, not block:4x2"),
        ({"layers": ("stem",)}, SelectorError, "takes exclude"),
        ({"search_share": 0.0}, BudgetError, "search_share"),
        ({"search_epochs": 0}, BudgetError, "search_epochs"),
    ],
)
def test_what_is_refused(task: mg.Task, settings: dict[str, Any], error: type[MicrogliaError], text: str) -> None:
    with pytest.raises(error, match=text):
        ddnp.fits(task, config(**settings))
