"""What `prune_channels` refuses before it traces, and what it takes from NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

import microglia as mg
from microglia.core.errors import BudgetError, MicrogliaError, UnknownNameError
from microglia.graph.channels.costs import Costs
from microglia.graph.channels.groups import channel_groups
from microglia.graph.channels.widths import choose_widths
from microglia.graph.cutting.remove import Subject


class Untouched(nn.Module):
    """Fails the test where it is traced or run."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        raise AssertionError("the model was run before what was asked was looked at")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)).eval()


HALF = mg.Budget(density=0.5)


def refused(kind, text, *, budget=HALF, **options):
    with pytest.raises(kind, match=text):
        mg.prune_channels(Untouched(), torch.randn(2, 4), budget, **options)


@pytest.mark.parametrize("budget", [0.5, np.float64(0.5), {"params": 0.5}, None, mg.Budget])
def test_what_is_no_budget_is_refused_before_anything_is_traced(budget):
    refused(BudgetError, r"The budget is a Budget, such as Budget\(params=0.5\)", budget=budget)


@pytest.mark.parametrize("round_to", [0, -8, 1.5, "16", None, True])
def test_a_rounding_below_one_is_refused(round_to):
    refused(MicrogliaError, "round_to is a whole number, at least 1", round_to=round_to)


@pytest.mark.parametrize("dynamic", [(-1,), (0, 1.5), "0", 0, None])
def test_dimensions_that_are_none_are_refused(dynamic):
    refused(MicrogliaError, "dynamic names dimensions, each 0 or above", dynamic=dynamic)


def test_an_unknown_scope_or_reduction_is_refused_in_a_sentence():
    refused(UnknownNameError, r"no scope of channels named 'globl'. Did you mean 'global'\?", scope="globl")
    refused(UnknownNameError, r"no reduction of channels named 'median'.*Known: l2, max, mean, sum", reduction="median")
    refused(UnknownNameError, "no scope of channels named 'layer'", scope="layer")


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5)])
def test_numbers_of_numpy_are_taken(number):
    small = mg.prune_channels(net(), torch.randn(2, 8), mg.Budget(density=number), round_to=np.int64(1))
    assert [type(v) for v in mg.graph.plan_of(small).asked.values()] == [float]
    assert small[0].out_features == 6


def test_numbers_of_numpy_are_saved(tmp_path):
    small = mg.prune_channels(net(), torch.randn(2, 8), mg.Budget(density=np.float32(0.5)), round_to=np.int64(1))
    mg.save(small, tmp_path / "s")
    x = torch.randn(2, 8)
    torch.testing.assert_close(mg.load(tmp_path / "s", net())(x), small(x), rtol=0, atol=0)


def chosen(ms, milliseconds, round_to=16):
    model, x = net(), torch.randn(2, 8)
    subject = Subject.of(model, x)
    groups = channel_groups(subject.parts[0].analysis)
    scores = {g.atom: torch.rand(g.size) for g in groups}
    costs = Costs(subject.parts, groups, 1)
    return choose_widths(costs, groups, mg.Budget(ms=ms), scores, round_to=round_to, milliseconds=milliseconds)


def test_a_time_that_no_width_reaches_is_refused_after_two_models_are_timed():
    timed = []

    def milliseconds(counts):
        timed.append(dict(counts))
        return 1.0 + sum(counts.values())

    with pytest.raises(BudgetError, match=r"ms 1e-05\) cannot be met: with every group at its narrowest the model takes 3 ms"):
        chosen(1e-5, milliseconds)
    assert len(timed) == 2
    assert sorted(timed[1].values()) == [1, 1]


@pytest.mark.parametrize(("ms", "noted"), [(22.0, True), (30.0, False)])
def test_a_time_that_leaves_hardly_any_channels_is_noted(ms, noted):
    """A floor of 20 ms: 22 ms with one channel in each of the two groups, 20 + channels with more."""
    found = chosen(ms, lambda counts: 20.0 + sum(counts.values()), round_to=1)
    assert found.got["ms"] <= ms
    assert any("leaves hardly any channels" in note and "22 ms with every group" in note for note in found.notes) == noted


def test_a_time_that_is_reached_only_without_rounding_is_met():
    found = chosen(5.0, lambda counts: 1.0 + sum(counts.values()))
    assert found.got["ms"] <= 5.0
    assert found.round_to < 16
