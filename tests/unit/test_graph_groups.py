"""Groups of a convolution that each lose channels of their own, as many as the others."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

import microglia as mg
from graph_checks import EXACT, agree, stir
from microglia.core.errors import FileError
from microglia.graph.cutting.cut import Cut
from microglia.graph.cutting.plan import replay
from microglia.graph.dims.analysis import Analysis
from microglia.graph.dims.trace import trace

HALF = mg.Budget(density=0.5)


def bottleneck(groups=4, seed=0):
    """A ResNeXt block: 24 channels into the grouped convolution, 32 out of it."""
    layers = (
        nn.Conv2d(3, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, padding=1, groups=groups),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 5, 1),
    )
    return stir(nn.Sequential(*layers), seed)


def image(seed=0):
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zeroed(model, norms):
    """The model with channels zero behind its norms: name -> which stay."""
    model = deepcopy(model)
    with torch.no_grad():
        for name, stay in norms.items():
            gone = sorted(set(range(len(model.get_parameter(f"{name}.weight")))) - set(stay))
            model.get_parameter(f"{name}.weight")[gone] = 0
            model.get_parameter(f"{name}.bias")[gone] = 0
    return model


def test_each_group_keeps_its_own_best_channels():
    """Against a plain loop over groups and channels, and against the model with the others zero."""
    model = bottleneck()
    generator = torch.Generator().manual_seed(3)
    score = {
        n: torch.rand(p.shape, generator=generator, dtype=torch.float64) for n, p in model.named_parameters() if p.ndim > 1
    }
    small = mg.prune_channels(model, image(), HALF, score=score, reduction="sum", round_to=1, within_groups=True)
    entering, leaving = [], []
    for group in range(4):
        rows = score["3.weight"][8 * group : 8 * group + 8]
        worth = [float(score["0.weight"][6 * group + c].sum() + rows[:, c].sum()) for c in range(6)]
        entering.append(sorted(sorted(range(6), key=lambda c, w=worth: -w[c])[:3]))
        worth = [float(rows[c].sum() + score["6.weight"][:, 8 * group + c].sum()) for c in range(8)]
        leaving.append(sorted(sorted(range(8), key=lambda c, w=worth: -w[c])[:4]))
    kept = mg.graph.plan_of(small).kept
    assert kept["3.weight"]["1"] == entering
    assert kept["1.weight"]["0"] == [6 * g + c for g in range(4) for c in entering[g]]
    assert kept["4.weight"]["0"] == kept["3.weight"]["0"] == [8 * g + c for g in range(4) for c in leaving[g]]
    assert small[3].groups == 4
    assert small[3].weight.shape == (16, 3, 3, 3)
    agree(small(image(1)), zeroed(model, {"1": kept["1.weight"]["0"], "4": kept["4.weight"]["0"]})(image(1)))


def test_whole_groups_go_unless_asked_and_few_wide_ones_are_thinned():
    assert mg.prune_channels(bottleneck(), image(), HALF, round_to=1)[3].groups == 2
    thinned = mg.prune_channels(bottleneck(groups=2), image(), HALF, round_to=1)
    assert (thinned[3].groups, thinned[3].weight.shape[1]) == (2, 6)
    assert isinstance(mg.graph.plan_of(thinned).kept["3.weight"]["1"][0], list)


def test_the_count_of_what_is_left_is_that_of_the_model():
    model = bottleneck()
    small = mg.prune_channels(model, image(), HALF, round_to=1, within_groups=True)
    plan = mg.graph.plan_of(small)
    assert plan.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (model, small))
    pixels = 36
    inside = 12 * 27 + 16 * 3 * 9 + 5 * 16
    assert plan.macs[1] == 2 * pixels * inside


@pytest.mark.parametrize("order", [(True, True), (True, False), (False, True), (False, False)])
def test_two_cuts_are_one_plan(order, tmp_path):
    """Within groups and whole groups one after the other: the plan of both gives the same model from the first."""
    model = bottleneck()
    small = model
    for within in order:
        small = mg.prune_channels(small, image(), mg.Budget(density=0.6), round_to=1, within_groups=within)
    assert small[3].weight.numel() < 0.4 * model[3].weight.numel()
    mg.save(small, tmp_path / "small")
    again = mg.load(tmp_path / "small", bottleneck(seed=5))
    assert torch.equal(again(image(1)), small(image(1)))
    replayed = replay(deepcopy(model), mg.graph.plan_of(small))
    assert all(torch.equal(a, b) for a, b in zip(replayed.state_dict().values(), small.state_dict().values(), strict=True))


def test_uneven_masks_leave_as_many_in_each_group():
    """Three, two, none and all eight outputs of the groups are masked: none can go. With two of the third, two of each do."""
    model = bottleneck()
    gone = [0, 3, 5, 9, 14, *range(24, 32)]
    mask = torch.ones_like(model[3].weight)
    mask[gone] = 0
    masked = deepcopy(model)
    with torch.no_grad():
        masked[3].weight.mul_(mask)
        masked[3].bias[gone] = 0
    even = deepcopy(masked)
    with torch.no_grad():
        even[3].weight[[16, 17]] = 0
    small = mg.shrink(masked, image())
    assert small[3].weight.shape[0] == 32
    assert "13 masked channels stay: the groups" in " ".join(mg.graph.plan_of(small).notes)
    agree(small(image(1)), masked(image(1)))
    small = mg.shrink(even, image())
    assert small[3].weight.shape[0] == 24
    assert "7 masked channels stay" in " ".join(mg.graph.plan_of(small).notes)
    agree(small(image(1)), even(image(1)))


def test_a_group_without_inputs_and_outputs_goes_whole():
    """Its channels do not count among those that stay for the others."""
    model = bottleneck()
    with torch.no_grad():
        for weight, gone in ((model[0], range(18, 24)), (model[3], range(24, 32))):
            weight.weight[list(gone)] = 0
        for norm, gone in ((model[1], range(18, 24)), (model[4], range(24, 32))):
            norm.weight[list(gone)] = norm.bias[list(gone)] = 0
        model[3].weight[[0, 9]] = model[3].bias[[0, 9]] = 0
        model[3].bias[24:] = 0
    small = mg.shrink(model, image())
    assert small[3].groups == 3
    assert small[3].weight.shape[0] == 24
    assert "2 masked channels stay: the groups" in " ".join(mg.graph.plan_of(small).notes)
    agree(small(image(1)), model(image(1)))


def test_cleared_channels_add_nothing_where_they_stay():
    """Against the model with the biases of all masked channels zero."""
    layers = nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 1, groups=2), nn.ReLU(), nn.Conv2d(12, 3, 1)
    model = stir(nn.Sequential(*layers))
    with torch.no_grad():
        model[2].weight[[0, 1, 6]] = 0
    small = mg.shrink(model, image(), clear=True)
    assert small[2].weight.shape[0] == 10
    with torch.no_grad():
        model[2].bias[[0, 1, 6]] = 0
    agree(small(image(1)), model(image(1)))


def test_groups_within_groups_are_thinned_and_stay():
    layers = (nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1, groups=4), nn.ReLU(), nn.Conv2d(64, 64, 1, groups=16),
              nn.Conv2d(64, 3, 1))  # fmt: skip
    small = mg.prune_channels(stir(nn.Sequential(*layers)), image(), HALF, round_to=1, within_groups=True)
    assert [small[2].groups, small[4].groups] == [4, 16]
    assert small[4].weight.shape == (32, 2, 1, 1)


class Named(nn.Module):
    """The grouped weight is a buffer, or has two names."""

    def __init__(self, buffer):
        super().__init__()
        self.enter, self.last, self.leave = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 32, 1, groups=4), nn.Conv2d(32, 5, 1)
        self.first = self.last
        if buffer:
            self.register_buffer("weight", torch.ones(32, 6, 1, 1))
        self.buffer = buffer

    def forward(self, x):
        x = self.enter(x).relu()
        x = nn.functional.conv2d(x, self.weight, groups=4) if self.buffer else self.last(x)
        return self.leave(x.relu())


@pytest.mark.parametrize("buffer", [False, True])
def test_two_cuts_of_a_weight_by_another_name(buffer):
    model = small = stir(Named(buffer))
    for _ in range(2):
        small = mg.prune_channels(small, image(), mg.Budget(density=0.6), round_to=1, within_groups=True)
    again = replay(deepcopy(model), mg.graph.plan_of(small))
    assert torch.equal(again(image(1)), small(image(1)))


class Noisy(nn.Module):
    """In training the weight is another tensor; the sizes are written in, so that it comes back as a graph."""

    def __init__(self):
        super().__init__()
        self.enter, self.mix, self.leave = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 32, 1, groups=2), nn.Conv2d(32, 5, 1)

    def forward(self, x):
        weight = self.mix.weight
        if self.training:
            weight = weight * (1 + 0.1 * torch.randn_like(weight))
        return self.leave(nn.functional.conv2d(self.enter(x).view(-1, 24, 6, 6), weight, groups=2).relu())


def test_training_code_that_cannot_follow_is_noted():
    small = mg.prune_channels(stir(Noisy()), image(), HALF, round_to=1)
    assert isinstance(mg.graph.plan_of(small).kept["mix.weight"]["1"][0], list)
    assert "In training Noisy runs this graph too" in " ".join(mg.graph.plan_of(small).notes)
    small.train()(image()).sum().backward()


def test_a_transposed_convolution():
    layers = (nn.Conv2d(3, 16, 1), nn.ReLU(), nn.ConvTranspose2d(16, 16, 2, stride=2, groups=4), nn.ReLU(), nn.Conv2d(16, 3, 1))
    model = stir(nn.Sequential(*layers))
    small = mg.prune_channels(model, image(), HALF, round_to=1, within_groups=True)
    assert small[2].weight.shape == (8, 2, 2, 2)
    assert small[2].groups == 4
    assert isinstance(mg.graph.plan_of(small).kept["2.weight"]["1"][0], list)
    assert mg.graph.plan_of(small).error < EXACT


class Shuffled(nn.Module):
    """Rows of channels change places: what is removed has to be the same in all."""

    def __init__(self, **options):
        super().__init__()
        self.enter, self.mix, self.leave = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, groups=4), nn.Conv2d(12, 3, 1)
        self.twice = options.get("twice", False)

    def forward(self, x):
        x = self.mix(self.enter(x))
        if self.twice:
            return self.leave(nn.functional.conv2d(x, self.mix.weight, groups=4))
        return self.leave(x.view(x.shape[0], 4, 3, 6, 6).transpose(1, 2).reshape(x.shape[0], 12, 6, 6))


@pytest.mark.parametrize(("twice", "free"), [(False, ["enter"]), (True, [])])
def test_rows_that_are_told_apart_choose_alike(twice, free):
    """Behind a shuffle the outputs are one for all groups, and the inputs are not; with a weight read twice neither is free."""
    model = stir(Shuffled(twice=twice))
    analysis = Analysis(trace(model, image()))
    makers = [n for n in ("enter", "mix") for a in analysis.algebra.leaves(analysis.parameter_dims[f"{n}.weight"][0])
              if a in analysis.rows]  # fmt: skip
    assert makers == free
    assert mg.graph.plan_of(mg.prune_channels(model, image(), HALF, round_to=1, within_groups=True)).error < EXACT


class Written(nn.Module):
    """A forward with its sizes written in comes back as a graph."""

    def __init__(self):
        super().__init__()
        self.body, self.head = bottleneck(), nn.Linear(5 * 36, 2).double()

    def forward(self, x):
        x = self.body[:4](x)
        return self.head(self.body[4:](x.view(-1, 32, 6, 6)).flatten(1))


def test_a_graph(tmp_path):
    model = Written()
    small = mg.prune_channels(model, image(), HALF, round_to=1, within_groups=True)
    plan = mg.graph.plan_of(small)
    assert plan.kind == "graph"
    assert small.get_parameter("body.3.weight").shape == (16, 3, 3, 3)
    mg.save(small, tmp_path / "small")
    assert torch.equal(mg.load(tmp_path / "small", Written())(image(1)), small(image(1)))


def test_groups_of_different_numbers_are_refused():
    model = bottleneck()
    analysis = Analysis(trace(model, image()))
    atom = next(iter(analysis.rows))
    units = torch.ones(4, analysis.algebra.sizes[atom], dtype=torch.bool)
    units[0, 0] = False
    with pytest.raises(ValueError, match="equally many channels"):
        Cut(analysis, {atom: units})
    plan = mg.graph.plan_of(mg.prune_channels(model, image(), HALF, round_to=1, within_groups=True))
    kept = deepcopy(plan.kept)
    kept["3.weight"]["1"][0] = [0]
    with pytest.raises(FileError, match="does not fit"):
        replay(bottleneck(), replace(plan, kept=kept))
