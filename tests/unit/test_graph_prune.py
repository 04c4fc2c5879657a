"""prune_channels, its plan and its budgets, as a user meets them."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from microglia import (
    Budget,
    accelerate,
    fold,
    load,
    mask,
    masks_of,
    prune_channels,
    save,
)
from microglia.core.errors import BudgetError, FileError, MicrogliaError, ScoreError, SelectorError
from microglia.core.layers import prunable_layers
from microglia.graph import Plan, ShrinkError, plan_of, replay, shrink
from microglia.graph import prune as prune_room
from microglia.graph.channels.costs import Costs
from microglia.graph.channels.groups import channel_groups, why
from microglia.graph.channels.latency_table import LatencyTable
from microglia.graph.channels.widths import choose_widths, granularity
from microglia.graph.cutting.remove import Subject
from microglia.graph.dims.analysis import Analysis
from microglia.graph.dims.trace import TraceError, trace
from microglia.methods import Smart
from microglia.scores import Evidence
from microglia.scores.inputs import mean_inputs
from microglia.zoo import build


class Residual(nn.Module):
    """A stem, a block with a sum, a classifier."""

    def __init__(self, width=16, inner=24, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.one = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(inner)
        self.drop = nn.Dropout(0.3)
        self.two = nn.Conv2d(inner, width, 1)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.two(self.drop(F.relu(self.inner_norm(self.one(x)))))
        return self.head(x.mean((2, 3)))


class Sized(nn.Module):
    """Attention whose forward writes its sizes out: the classes cannot follow a cut of the stream or the heads."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.width, self.heads = width, heads
        self.stem = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(7)
        self.qkv = nn.Linear(width, 3 * width)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        n = x.shape[0]
        x = self.norm(self.stem(x))
        q, k, v = (z.view(n, 7, self.heads, self.width // self.heads).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, 7, self.width)
        return self.head(x + self.out(self.drop(y)))


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, i):
        x = self.embed(i)
        return self.head(x + self.down(F.gelu(self.up(x))))


class Opaque(nn.Module):
    """An operator that no rule knows between two layers."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.three(F.relu(self.two(torch.fft.fft(self.one(x)).real)))


class Undecided(nn.Module):
    """Its forward depends on the values of its input."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return x @ self.one @ self.two if x.sum() > 0 else x @ self.two


def built(kind, seed=0, **options):
    torch.manual_seed(seed)
    model = kind(**options)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape) + 0.5 if name.endswith("var") else torch.randn(buffer.shape))
    return model


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))
NUMBERS = torch.arange(10).view(2, 5)


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def pruned():
    """(the model, its half), traced once."""
    model = built(Residual).eval()
    return model, prune_channels(model, IMAGES, Budget(density=0.5), round_to=1)


@pytest.fixture(scope="module")
def as_graph():
    """(the model, its half), which comes back as a graph."""
    model = built(Sized).eval()
    return model, prune_channels(model, TOKENS, Budget(density=0.5), round_to=1)


@pytest.fixture(scope="module")
def residual_costs():
    """What choose_widths needs of the residual net."""
    subject = Subject.of(built(Residual, width=32, inner=64), IMAGES)
    (part,) = subject.parts
    groups = channel_groups(part.analysis)
    generator = torch.Generator().manual_seed(0)
    scores = {g.atom: torch.rand(g.size, generator=generator, dtype=torch.float64) for g in groups}
    return Costs(subject.parts, groups, sum(p.numel() for p in subject.model.parameters())), groups, scores


# ------------------------------------------------------------------------------------------------------------ what goes
def test_half_of_every_group_and_nothing_of_the_interface(pruned):
    model, small = pruned
    assert shapes(small) == {
        "stem.weight": (8, 3, 3, 3), "norm.weight": (8,), "norm.bias": (8,), "one.weight": (12, 8, 3, 3),
        "inner_norm.weight": (12,), "inner_norm.bias": (12,), "two.weight": (8, 12, 1, 1), "two.bias": (8,),
        "head.weight": (5, 8), "head.bias": (5,),
    }  # fmt: skip
    assert small(IMAGES).shape == model(IMAGES).shape
    assert small.stem.out_channels == small.norm.num_features == small.head.in_features == 8
    plan = plan_of(small)
    assert (plan.kind, plan.found, plan.pruned) == ("module", 2, 2)
    assert plan.got == {"density": 0.5, "round_to": 1}
    assert plan.asked == {"density": 0.5}
    assert plan.error < 1e-10
    assert plan.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert plan.shapes["head.weight"] == ([5, 16], [5, 8])
    assert plan.notes == ()


def test_the_least_weights_go(pruned):
    model, small = pruned
    kept = plan_of(small).kept
    with torch.no_grad():
        values = sum(
            w.square().sum([k for k in range(w.ndim) if k != d]) for w, d in [(model.one.weight, 0), (model.two.weight, 1)]
        )
    assert kept["one.weight"]["0"] == sorted(values.argsort(descending=True)[:12].tolist())
    assert torch.equal(small.one.weight, model.one.weight[kept["one.weight"]["0"]][:, kept["one.weight"]["1"]])


def test_outputs_are_those_of_the_masked_model(pruned):
    model, small = pruned
    masked = deepcopy(model).double()
    with torch.no_grad():
        for name, by_dim in plan_of(small).kept.items():
            tensor = masked.state_dict()[name]
            for dim, stay in by_dim.items():
                gone = [i for i in range(tensor.shape[int(dim)]) if i not in stay]
                tensor.index_fill_(int(dim), torch.tensor(gone), 0)
        wanted = masked(IMAGES.double())
    assert torch.allclose(small.double()(IMAGES.double()), wanted, rtol=0, atol=1e-12)
    small.float()


def test_the_model_passed_in_is_untouched():
    model = built(Residual).train()
    model.head.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    identities = {n: id(p) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    prune_channels(model, IMAGES, Budget(density=0.5))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert {n: id(p) for n, p in model.named_parameters()} == identities
    assert model.training
    assert not model.head.training
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(MicrogliaError, match="carries no plan"):
        plan_of(model)


def test_twice_the_same(pruned):
    model, small = pruned
    again = prune_channels(model, IMAGES, Budget(density=0.5), round_to=1)
    assert plan_of(again) == plan_of(small)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))


def test_modes_and_what_requires_gradients_are_kept():
    model = built(Residual).train()
    model.norm.eval()
    model.one.weight.requires_grad_(False)
    small = prune_channels(model, IMAGES, Budget(density=0.5))
    assert small.training
    assert not small.norm.training
    assert {n: p.requires_grad for n, p in small.named_parameters()} == {n: n != "one.weight" for n in shapes(model)}
    small(IMAGES).sum().backward()
    assert small.one.weight.grad is None
    assert all(p.grad is not None for n, p in small.named_parameters() if n != "one.weight")


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_any_batch(pruned, as_graph, batch):
    for (model, small), images in ((pruned, IMAGES), (as_graph, TOKENS)):
        more = torch.cat([images, images, images, images])[:batch]
        assert small(more).shape == model(more).shape
        assert torch.allclose(small(more)[:1], small(images)[:1], atol=1e-5)


def test_an_example_of_one(pruned):
    model, small = pruned
    assert shapes(prune_channels(model, IMAGES[:1], Budget(density=0.5), round_to=1)) == shapes(small)


def test_tied_parameters_stay_tied():
    small = prune_channels(built(Tied), NUMBERS, Budget(density=0.5), round_to=1)
    assert small.head.weight is small.embed.weight
    assert small.head.weight.shape == (11, 8)
    assert small.up.weight.shape == (16, 8)
    assert small(NUMBERS).shape == (2, 5, 11)


def test_excluded_layers_stay_whole():
    small = prune_channels(built(Residual), IMAGES, Budget(density=0.5), round_to=1, exclude=["stem"])
    assert small.stem.weight.shape == (16, 3, 3, 3)
    assert small.one.weight.shape == (12, 16, 3, 3)


@pytest.mark.parametrize(
    ("selectors", "widths"),
    [
        (["two.bias"], (16, 12)), (["inner_norm"], (8, 24)), (["type:Linear"], (16, 12)),
        (["stem", "*n*", "!inner_norm", "!one"], (16, 12)),
    ],
)  # fmt: skip
def test_selectors_mean_what_they_mean_elsewhere(selectors, widths):
    """A bias or a norm alone keeps outputs; classes and negations are understood."""
    small = prune_channels(built(Residual), IMAGES, Budget(density=0.5), round_to=1, exclude=selectors)
    assert (small.stem.out_channels, small.one.out_channels) == widths


def test_an_excluded_tensor_is_meant_under_all_its_names():
    small = prune_channels(built(Tied), NUMBERS, Budget(density=0.5), round_to=1, exclude=["head"])
    assert shapes(small)["embed.weight"] == (11, 16)
    assert shapes(small)["up.weight"] == (16, 16)


def test_a_selector_that_meets_nothing():
    with pytest.raises(SelectorError, match="conv9"):
        prune_channels(built(Residual), IMAGES, Budget(density=0.5), exclude=["conv9*"])


def test_at_least_one_unit_stays():
    narrow = prune_channels(built(Residual), IMAGES, Budget(density=0.05), round_to=1)
    assert min(narrow.stem.out_channels, narrow.one.out_channels) >= 1
    assert torch.isfinite(narrow(IMAGES)).all()


def test_less_than_the_narrowest():
    with pytest.raises(BudgetError, match="narrowest"):
        prune_channels(built(Residual), IMAGES, Budget(density=0.01), round_to=1)


# ------------------------------------------------------------------------------------------------------------- budgets
BUDGETS = [
    {"density": 0.7}, {"density": 0.3}, {"params": 0.5}, {"params": 0.1}, {"flops": 0.5}, {"flops": 0.2},
    {"density": 0.5, "params": 0.4}, {"params": 0.5, "flops": 0.3}, {"density": 0.9, "params": 0.8, "flops": 0.25},
]  # fmt: skip


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("asked", BUDGETS, ids=str)
def test_the_tightest_term_is_met(residual_costs, asked, scope):
    costs, groups, scores = residual_costs
    widths = choose_widths(costs, groups, Budget(**asked), scores, scope=scope, round_to=1)
    got = {term: costs.fraction(term, widths.counts) for term in asked}
    assert got == pytest.approx(widths.got)
    ratios = [got[term] / value for term, value in asked.items()]
    if widths.notes:  # one unit here is more than 1 %
        assert "nearest" in widths.notes[0]
        assert max(ratios) == pytest.approx(1, abs=0.06)
    else:
        assert max(ratios) == pytest.approx(1, abs=0.01)
    assert all(1 <= widths.counts[g.atom] <= g.size for g in groups)


def test_no_budget_is_asked_for_less_than_everything(residual_costs):
    costs, groups, scores = residual_costs
    widths = choose_widths(costs, groups, Budget(density=1.0), scores)
    assert widths.counts == {g.atom: g.size for g in groups}


@pytest.mark.parametrize("round_to", [1, 2, 4, 8])
def test_widths_are_multiples(residual_costs, round_to):
    costs, groups, scores = residual_costs
    for density in (0.25, 0.5, 0.75):
        widths = choose_widths(costs, groups, Budget(density=density), scores, round_to=round_to)
        assert widths.round_to <= round_to
        assert all(count % widths.round_to == 0 for count in widths.counts.values())


def test_rounding_gives_way_to_the_budget(residual_costs):
    costs, groups, scores = residual_costs
    widths = choose_widths(costs, groups, Budget(params=0.37), scores, round_to=16)
    assert widths.round_to < 16
    assert widths.got["params"] == pytest.approx(0.37, rel=0.01) or widths.notes


@pytest.mark.parametrize(
    ("size", "round_to", "step"), [(16, 16, 16), (64, 16, 16), (24, 16, 16), (12, 16, 8), (6, 16, 4), (1, 16, 1), (10, 1, 1)]
)
def test_the_units_of_a_step(residual_costs, size, round_to, step):
    assert granularity(replace(residual_costs[1][0], size=size, cofactor=1), round_to) == step


def small_network(name):
    return build(name, shape=(3, 32, 32), classes=10), torch.randn(1, 3, 32, 32)


@pytest.mark.parametrize("flops", [0.7, 0.6, 0.4])
def test_a_budget_between_two_steps_is_met_by_a_smaller_step_of_another_group(flops):
    plan = plan_of(prune_channels(*small_network("resnet20"), Budget(flops=flops), verified=False))
    assert plan.got["round_to"] == 8  # the steps in their order alone meet it with single channels only
    assert plan.got["flops"] == pytest.approx(flops, rel=0.01)


def test_groups_that_rounding_leaves_whole_do_not_empty_the_others():
    small = prune_channels(*small_network("resnet56"), Budget(flops=0.6), verified=False)
    dense = [16] * 19 + [32] * 18 + [64] * 18
    kept = [conv.out_channels / width for conv, width in zip(convolutions(small), dense, strict=True)]
    assert plan_of(small).got["round_to"] == 8
    assert min(kept) >= 0.5


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def test_costs_are_those_of_the_pruned_model(residual_costs):
    costs, _, _ = residual_costs
    model = built(Residual, width=32, inner=64)
    small = prune_channels(model, IMAGES, Budget(flops=0.4), round_to=1)
    plan = plan_of(small)
    assert plan.parameters[1] == sum(p.numel() for p in small.parameters())
    w, i, n = small.stem.out_channels, small.one.out_channels, 2
    assert plan.macs[1] == n * 64 * (27 * w + 9 * w * i + i * w) + n * 5 * w
    assert plan.macs[0] == costs.dense["flops"]
    assert plan.got["flops"] == pytest.approx(plan.macs[1] / plan.macs[0])


def test_the_scopes():
    model = built(Residual)
    with torch.no_grad():  # the last half of the inner channels is worth nothing
        model.one.weight[12:] *= 1e-3
        model.two.weight[:, 12:] *= 1e-3
    small = prune_channels(model, IMAGES, Budget(density=28 / 40), round_to=1, scope="global")
    assert (small.stem.out_channels, small.one.out_channels) == (16, 12)
    small = prune_channels(model, IMAGES, Budget(density=0.5), round_to=1, scope="uniform")
    assert (small.stem.out_channels, small.one.out_channels) == (8, 12)


class Clock:
    """A timer that charges each width a known time, and remembers what it was asked."""

    def __init__(self, *_, **__):
        self.asked = []

    def __call__(self, counts):
        self.asked.append(dict(counts))
        return 0.25 * sum(counts.values())


def test_a_budget_in_milliseconds(monkeypatch):
    clock = Clock()
    timed = []
    monkeypatch.setattr(prune_room, "LatencyTable", lambda *_, executions: timed.append(executions) or clock)
    small = prune_channels(built(Residual), IMAGES, Budget(ms=5.0), round_to=1, executions=["eager"])
    assert timed == [("eager",)]
    assert small.stem.out_channels + small.one.out_channels == 20
    assert plan_of(small).got["ms"] == 5.0
    assert len(clock.asked) < 15  # bisection, not a walk


def test_milliseconds_and_a_fraction(monkeypatch):
    monkeypatch.setattr(prune_room, "LatencyTable", Clock)
    small = prune_channels(built(Residual), IMAGES, Budget(ms=8.0, density=0.5), round_to=1)
    assert plan_of(small).got == {"density": 0.5, "ms": 5.0, "round_to": 1}


def test_milliseconds_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr(prune_room, "LatencyTable", Clock)
    with pytest.raises(BudgetError, match="ms"):
        prune_channels(built(Residual), IMAGES, Budget(ms=0.1), round_to=1)


def test_an_engine_that_does_not_exist_is_refused_before_the_trace():
    with pytest.raises(MicrogliaError, match=r"opnvino.*openvino"):
        prune_channels(nn.Identity(), IMAGES, Budget(ms=0.1), executions=["opnvino"])


def test_times_are_measured_once_and_kept(tmp_path, monkeypatch):
    import microglia.graph.channels.latency_table as room

    model, calls = nn.Linear(3, 3), []

    def measured(models, example, **_):
        calls.append(models)
        return SimpleNamespace(best=lambda name: ("eager", SimpleNamespace(median=1.5)))

    monkeypatch.setattr(room, "measure_latency", measured)
    file = tmp_path / "deep" / "latency.json"
    assert LatencyTable(torch.zeros(1, 3), lambda _: model, file)({0: 3}) == 1.5
    assert LatencyTable(torch.zeros(1, 3), lambda _: model, file)({0: 3}) == 1.5
    assert len(calls) == 1
    assert list(json.loads(file.read_text()).values()) == [1.5]
    assert LatencyTable(torch.zeros(2, 3), lambda _: model, file)({0: 3}) == 1.5  # another batch
    assert len(calls) == 2
    file.write_text("{")
    assert LatencyTable(torch.zeros(1, 3), lambda _: model, file)({0: 3}) == 1.5  # a broken file is an empty one


@pytest.mark.parametrize(
    "wrong", [{}, {"density": 0}, {"density": 1.5}, {"params": -1}, {"flops": "half"}, {"ms": 0}, {"ms": math.inf}]
)
def test_wrong_budgets(wrong):
    with pytest.raises(BudgetError):
        Budget(**wrong)


def test_nothing_to_prune():
    with pytest.raises(BudgetError, match="no channels"):
        prune_channels(nn.Linear(4, 3), torch.zeros(2, 4), Budget(density=0.5))


def test_parameters_outside_the_channels_bound_the_budget():
    with pytest.raises(BudgetError, match="params"):
        prune_channels(built(Tied), NUMBERS, Budget(params=0.001))


# -------------------------------------------------------------------------------------------------------------- scores
def test_a_score_of_ones_own():
    model = built(Residual)
    scores = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    scores["one.weight"][[1, 5, 7]] = 1.0
    scores["stem.weight"][[0, 2]] = 1.0
    small = prune_channels(model, IMAGES, Budget(density=5 / 40), round_to=1, score=scores, scope="global")
    kept = plan_of(small).kept
    assert {1, 5, 7} & set(kept["one.weight"]["0"])
    assert set(kept["one.weight"]["0"]) <= set(range(24))


def test_a_group_without_a_score_is_kept_and_named():
    model = built(Residual)
    small = prune_channels(model, IMAGES, Budget(density=0.5), round_to=1, score={"stem.weight": model.stem.weight.abs()})
    assert small.one.out_channels == 24
    assert small.stem.out_channels == 8
    assert any("no scored weight" in note for note in plan_of(small).notes)


def test_a_score_with_nan():
    model = built(Residual)
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] = math.nan
    with pytest.raises((ScoreError, ShrinkError)):
        prune_channels(model, IMAGES, Budget(density=0.5))


@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "l2"])
def test_reductions(reduction):
    model = built(Residual)
    with torch.no_grad():
        for layer, dim in ((model.one, 0), (model.two, 1)):
            layer.weight.copy_(layer.weight.abs() + 0.1)
            layer.weight.movedim(dim, 0)[::2] *= 5
    small = prune_channels(model, IMAGES, Budget(density=0.5), round_to=1, reduction=reduction)
    assert plan_of(small).kept["one.weight"]["0"] == list(range(0, 24, 2))


# ----------------------------------------------------------------------------------------------- what cannot be pruned
def test_an_operator_without_a_rule_is_named():
    small = prune_channels(built(Opaque), torch.randn(3, 6), Budget(density=0.5), round_to=1)
    assert shapes(small)["one.weight"] == (8, 6)
    assert shapes(small)["two.weight"] == (5, 8)
    assert any("fft" in note for note in plan_of(small).notes)


def test_a_model_that_cannot_be_traced():
    with pytest.raises(TraceError, match="Undecided") as caught:
        prune_channels(Undecided(), torch.randn(3, 6), Budget(density=0.5))
    text = str(caught.value)
    assert "torch.export cannot trace" in text
    assert "forward" in text
    assert len(text) < 1000


def test_an_example_that_does_not_fit():
    with pytest.raises(TraceError):
        prune_channels(built(Residual), torch.randn(2, 4, 8, 8), Budget(density=0.5))


def test_why_a_dimension_stays():
    model = built(Residual).double().eval()
    analysis = Analysis(trace(model, IMAGES.double(), dynamic=()))
    assert "output of the model" in why(analysis, "head.weight", 0)
    assert "input of the model" in why(analysis, "stem.weight", 1)
    assert "positions" in why(analysis, "stem.weight", 2)
    assert "can be pruned" in why(analysis, "one.weight", 0)


# --------------------------------------------------------------------------------------------------- classes and graphs
def test_sizes_written_into_a_forward_give_a_graph(as_graph):
    model, small = as_graph
    plan = plan_of(small)
    assert plan.kind == "graph"
    assert any("graph" in note for note in plan.notes)
    assert set(shapes(small)) == set(shapes(model))
    assert shapes(small)["stem.weight"] == (8, 6)
    assert shapes(small)["qkv.weight"] == (24, 8)
    assert shapes(small)["head.weight"] == (5, 8)
    assert not small.training


def test_keep_class_takes_what_the_class_can_follow():
    small = prune_channels(built(Sized).eval(), TOKENS, Budget(density=0.5), round_to=1, keep_class=True)
    assert type(small) is Sized
    assert plan_of(small).kind == "module"
    assert shapes(small)["qkv.weight"] == (48, 8)  # the stream, and no heads


def test_keep_class_of_a_class_that_cannot_follow():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.two(F.layer_norm(self.one(x), (16,)))

    model = built(Normed)
    with pytest.raises(ShrinkError, match="cannot keep its class"):
        prune_channels(model, TOKENS, Budget(density=0.5), round_to=1, keep_class=True)
    small = prune_channels(model, TOKENS, Budget(density=0.5), round_to=1)
    assert plan_of(small).kind == "graph"
    assert shapes(small)["two.weight"] == (4, 8)


def test_a_graph_trains_as_its_class_does():
    model = built(Sized).eval()
    torch.manual_seed(0)
    small = prune_channels(model, TOKENS, Budget(density=0.75), round_to=1)
    assert plan_of(small).kind == "graph"
    before = {n: b.clone() for n, b in small.named_buffers()}
    first = small(TOKENS)
    assert torch.equal(first, small(TOKENS))  # evaluation: nothing random, nothing learned
    assert all(torch.equal(before[n], b) for n, b in small.named_buffers())
    small.train()
    assert not torch.equal(small(TOKENS), small(TOKENS))  # dropout
    x = F.linear(TOKENS, small.get_parameter("stem.weight"), small.get_parameter("stem.bias"))
    wanted = before["norm.running_mean"] * 0.81 + x.mean((0, 2)) * (0.1 + 0.09)  # two batches
    assert torch.allclose(small.get_buffer("norm.running_mean"), wanted, atol=1e-5)
    small.eval()
    assert torch.equal(small(TOKENS), small(TOKENS))


def test_a_graph_learns(as_graph):
    small = deepcopy(as_graph[1]).train()
    optimizer = torch.optim.SGD(small.parameters(), 0.05)
    target = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(30):
        loss = F.mse_loss(small(TOKENS), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in small.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_model_in_train_mode_comes_back_so():
    assert prune_channels(built(Sized).train(), TOKENS, Budget(density=0.5)).training
    assert not prune_channels(built(Sized).eval(), TOKENS, Budget(density=0.5)).training


# ------------------------------------------------------------------------------------------------------ masks on graphs
def half_masked(model):
    """A copy with random masks on all layers, and the masks."""
    model, generator = deepcopy(model), torch.Generator().manual_seed(0)
    layers = prunable_layers(model)
    return model, mask(model, {n: torch.rand(layer.shape, generator=generator) < 0.5 for n, layer in layers.items()})


def test_a_graph_has_the_layers_of_its_class(as_graph):
    model, small = as_graph
    assert list(prunable_layers(small)) == list(prunable_layers(model))
    assert list(prunable_layers(small, ["type:Linear"], ["type:Linear", "!head"])) == ["head.weight"]
    with pytest.raises(SelectorError, match="Conv2d"):
        prunable_layers(small, ["type:Conv2d"])


def test_masks_on_a_graph_are_in_its_forward(as_graph):
    small, masks = half_masked(as_graph[1])
    zeroed = deepcopy(as_graph[1])
    with torch.no_grad():
        for name, kept in masks.items():
            zeroed.get_parameter(name).mul_(kept)
    assert torch.equal(small(TOKENS), zeroed(TOKENS))
    small.train()
    small(TOKENS).square().sum().backward()
    for name, layer in prunable_layers(small).items():
        assert not layer.raw.grad[~masks[name]].any()
        assert layer.raw.grad[masks[name]].any()


def test_copies_and_folds_of_a_masked_graph(as_graph):
    small, masks = half_masked(as_graph[1])
    copy = deepcopy(small)
    assert masks_of(copy).same(masks)
    with torch.no_grad():
        prunable_layers(copy)["out.weight"].raw.add_(1)
    assert not torch.equal(copy(TOKENS), small(TOKENS))
    folded = fold(deepcopy(small))
    assert torch.equal(folded(TOKENS), small(TOKENS))
    assert [n for n, _ in folded.named_parameters()] == [n for n, _ in as_graph[1].named_parameters()]
    assert list(folded.state_dict()) == list(as_graph[1].state_dict())


def test_a_masked_graph_is_saved(as_graph, tmp_path):
    small, masks = half_masked(as_graph[1])
    again = load(save(small, tmp_path / "small"), built(Sized, seed=7)).eval()
    assert masks_of(again).same(masks)
    assert torch.equal(again(TOKENS), small(TOKENS))


def test_a_graph_with_code_of_its_own_for_training():
    class Random(Sized):
        def forward(self, x):
            return super().forward(x * torch.rand(()) if self.training else x)

    small, _ = half_masked(prune_channels(built(Random).eval(), TOKENS, Budget(density=0.5), round_to=1))
    assert small.microglia_graphs is not None
    small.train()
    copy = deepcopy(small)
    torch.manual_seed(0)
    wanted = small(TOKENS)
    assert not torch.equal(small(TOKENS), wanted)
    torch.manual_seed(0)
    assert torch.equal(copy(TOKENS), wanted)
    assert masks_of(copy).same(masks_of(small))


def test_smart_goes_on_with_a_graph(as_graph):
    small = deepcopy(as_graph[1]).train()
    optimizer = torch.optim.SGD(small.parameters(), 0.01)
    pruner = Smart(small, pattern="block:4x2", density=0.3, total_steps=4, example_inputs=TOKENS)
    for group in pruner.param_groups():
        optimizer.add_param_group(group)
    for _ in range(4):
        loss = small(TOKENS).square().mean() + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
    pruner.finish()
    assert masks_of(small).density == pytest.approx(0.3, abs=0.01)
    fast = accelerate(small.eval(), TOKENS, against="eager", cache=None, rounds=1)
    assert torch.allclose(fast(TOKENS), small(TOKENS), atol=1e-5)


def test_what_a_graph_cannot_do_is_said(as_graph):
    small, _ = half_masked(as_graph[1])
    with pytest.raises(ScoreError, match="came back from shrinking as a graph"):
        mean_inputs(small, prunable_layers(small), Evidence(batches=[(TOKENS, TOKENS)]))
    with pytest.raises(MicrogliaError, match="cannot be shrunk again"):
        shrink(small, TOKENS)


# --------------------------------------------------------------------------------------------------------------- plans
@pytest.mark.parametrize("kind", ["pruned", "as_graph"])
def test_copies_carry_the_plan(kind, request):
    _, small = request.getfixturevalue(kind)
    copy = deepcopy(small)
    assert plan_of(copy) == plan_of(small)
    inputs = IMAGES if kind == "pruned" else TOKENS
    assert torch.equal(copy(inputs), small(inputs))
    copy.train()
    assert copy.training
    assert not small.training
    with torch.no_grad():
        next(iter(copy.parameters())).add_(1)
    assert not torch.equal(next(iter(copy.parameters())), next(iter(small.parameters())))


@pytest.mark.parametrize("kind", ["pruned", "as_graph"])
def test_a_plan_is_json_and_replays_on_a_new_model(kind, request):
    _, small = request.getfixturevalue(kind)
    text = json.dumps(plan_of(small).to_dict())
    plan = Plan.from_dict(json.loads(text))
    again = replay(built(Residual if kind == "pruned" else Sized, seed=7).eval(), plan)
    assert shapes(again) == shapes(small)
    assert list(again.state_dict()) == list(small.state_dict())
    again.load_state_dict(small.state_dict())
    inputs = IMAGES if kind == "pruned" else TOKENS
    assert torch.equal(again(inputs), small(inputs))
    assert json.dumps(plan_of(again).to_dict()) == text


def test_a_plan_of_another_model():
    plan = plan_of(prune_channels(built(Residual), IMAGES, Budget(density=0.5)))
    with pytest.raises(FileError, match="does not fit"):
        replay(built(Residual, width=4), plan)


@pytest.mark.parametrize("broken", [{}, {"kind": "module"}, {"kind": "module", "kept": {}, "color": "red"}])
def test_a_plan_that_is_none(broken):
    with pytest.raises(FileError):
        Plan.from_dict(broken)


def test_a_model_can_be_pruned_again(pruned):
    _, small = pruned
    smaller = prune_channels(small, IMAGES, Budget(density=0.5), round_to=1)
    assert smaller.stem.out_channels == 4
    assert plan_of(smaller).pruned == 2


# ------------------------------------------------------------------------------------------------------- other inputs
def test_inputs_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(4, 12), nn.Linear(12, 5)

        def forward(self, left, right):
            return {"sum": self.c(self.a(left) + self.b(right)), "both": (left, right)}

    example = {"left": torch.randn(3, 6), "right": torch.randn(3, 4)}
    model = Named()
    for given in (example, tuple(example.values())):
        small = prune_channels(model, given, Budget(density=0.5), round_to=1)
        assert small.c.in_features == 6
        assert small(**example)["sum"].shape == (3, 5)


def test_half_precision_and_double():
    for dtype in (torch.float64, torch.bfloat16):
        small = prune_channels(built(Residual).to(dtype), IMAGES.to(dtype), Budget(density=0.5))
        assert {p.dtype for p in small.parameters()} == {dtype}
        assert small(IMAGES.to(dtype)).dtype == dtype


def test_shrink_of_a_model_without_masks_changes_nothing():
    model = built(Residual).eval()
    small = shrink(model, IMAGES)
    assert shapes(small) == shapes(model)
    assert torch.equal(small(IMAGES), model(IMAGES))
    assert any("No channel is masked whole" in note for note in plan_of(small).notes)


class Shared(nn.Module):
    """One convolution that two blocks hold under their own names, as CoaT does."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.mix = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.first = nn.ModuleDict({"mix": self.mix, "out": nn.Conv2d(16, 16, 1)})
        self.second = nn.ModuleDict({"mix": self.mix, "out": nn.Conv2d(16, 16, 1)})
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in (self.first, self.second):
            x = x + block["out"](F.relu(block["mix"](x)))
        return self.head(x.mean((2, 3)))


def test_a_module_held_under_several_names_is_cut_once(tmp_path):
    torch.manual_seed(0)
    model = Shared().eval()
    small = prune_channels(model, torch.randn(2, 3, 8, 8), Budget(density=0.5), round_to=1)
    assert small.mix is small.first["mix"] is small.second["mix"]
    assert small.mix.weight.shape[0] == small.mix.groups == 8
    again = replay(Shared(), Plan.from_dict(json.loads(json.dumps(plan_of(small).to_dict()))))
    assert [p.shape for p in again.parameters()] == [p.shape for p in small.parameters()]


class Lazy(nn.Module):
    """Makes its table of positions when it first sees how long its input is, as ConViT does."""

    def __init__(self):
        super().__init__()
        self.table = torch.zeros(1)
        self.one = nn.Linear(8, 16)
        self.two = nn.Linear(16, 8)

    def forward(self, x):
        if len(self.table) != x.shape[1]:
            self.table = torch.arange(x.shape[1]) / x.shape[1]
        return self.two(torch.relu(self.one(x).view(len(x), -1, 16)).mul(1 + self.table[None, :, None]))


@pytest.mark.parametrize("ran", [True, False])
def test_what_a_model_makes_at_its_first_run_does_not_change_the_trace(ran):
    torch.manual_seed(0)
    model, x = Lazy().eval(), torch.randn(2, 6, 8)
    if ran:
        model(x)
    one, other = trace(model, x), trace(Lazy().eval(), x)
    assert one.tensors.keys() == other.tensors.keys()
    assert [node.name for node in one.graph.nodes] == [node.name for node in other.graph.nodes]


class Divided(nn.Module):
    """Channels divided by learned scales and by periods that a buffer holds; zero in their place is not a number."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 16)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 16))
        self.register_buffer("periods", torch.linspace(1, 9, 16), persistent=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.one(x) / self.scale * (1 / self.periods).sin())


def test_what_divides_channels_goes_with_them(tmp_path):
    torch.manual_seed(0)
    model, x = Divided().eval(), torch.randn(7, 6)
    small = prune_channels(model, x, Budget(density=0.5), round_to=1)
    stay = plan_of(small).kept["one.weight"]["0"]
    assert len(stay) == len(small.scale) == len(small.periods) == 8
    with torch.no_grad():
        head = (model.one(x) / model.scale * (1 / model.periods).sin())[:, stay] @ model.head.weight[:, stay].T
        assert torch.allclose(small(x), head + model.head.bias, atol=1e-6)
    again = load(save(small, tmp_path / "small"), Divided()).eval()
    assert torch.equal(again(x), small(x))
