"""The built path between two networks: never above its bound, constant where it says so, on chains alone (survey T2.2)."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import MicrogliaError
from microglia.studies.dropout_paths.dropout_path import _Way, check_keep, dropout_path, dropped, keep_sets
from microglia.studies.dropout_paths.dropout_stability import (
    NetworkGauge,
    best_keep_sets,
    best_rescale,
    dropout_stability,
    examine_path,
    losses_along,
)
from microglia.studies.dropout_paths.unit_chain import UnitChain, UnitLayer, between, enter, network_of
from microglia.studies.dropout_paths.unit_trace import unit_chain
from microglia.studies.space.gauge import Gauge
from microglia.tasks.classification import image_task

SLACK = 1e-9


def mlp(widths, seed, *, bias=True):
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double().eval()


class ConvChain(nn.Module):
    """Convolutions with batch norm, pooling, flattening to blocks of four pixels, a hidden linear layer."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.one = nn.Conv2d(2, 5, 3, padding=1, bias=False)
        self.norm_one = nn.BatchNorm2d(5)
        self.two = nn.Conv2d(5, 6, 3, padding=1)
        self.norm_two = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(24, 7)
        self.norm_hidden = nn.BatchNorm1d(7)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(7, 3)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.weight.data, module.bias.data, module.running_mean):
                    tensor.normal_()
                module.running_var.uniform_(0.3, 3)
        self.double().eval()

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.norm_one(self.one(x))), 2)
        x = functional.avg_pool2d(functional.gelu(self.norm_two(self.two(x))), 2)
        return self.out(self.drop(functional.relu(self.norm_hidden(self.hidden(x.flatten(1))))))


def problem(models, shape, classes, seeds=(0, 1)):
    """The gauge, both networks and their keep sets."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(24, *shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (24,), generator=generator)
    chain = unit_chain(models[0], inputs[:1])
    gauge = NetworkGauge(models[0], chain, lambda model: functional.cross_entropy(model(inputs), labels).item())
    ends = tuple(network_of(model, chain) for model in models)
    return gauge, ends, tuple(keep_sets(chain, seed=seed) for seed in seeds), inputs


@torch.no_grad()
def outputs_of(model, network, inputs):
    enter(model, network)
    return model(inputs)


def check_path(gauge, ends, keeps, inputs, rescale=None, points=8):
    """The bound, the labels, the ends and the number of segments."""
    before = network_of(gauge.model, gauge.chain)
    found = examine_path(gauge, ends, keeps, rescale=rescale, points=points)
    assert found["maximum"] <= found["bound"] + SLACK
    assert (
        found["maximum"] <= max(found["ends"]) + max(0.0, *found["epsilon"]) + max(found["ends"]) - min(found["ends"]) + SLACK
    )
    path = dropout_path(gauge.chain, ends, keeps, rescale)
    for place, end in ((0, ends[0]), (-1, ends[1])):
        assert all(torch.equal(path.points[place][name], value) for name, value in end.items())
    depth = len(gauge.chain.layers)
    assert len(path.kinds) == len(path.points) - 1 == found["segments"]
    assert len(path.kinds) <= 2 * (2 + 5 * (depth - 2)) + 3 + 3 * (depth - 1)
    for number, kind in enumerate(path.kinds):
        one, other = path.points[number], path.points[number + 1]
        if kind == "linear":  # the last layer alone
            assert {name for name in one if not torch.equal(one[name], other[name])} <= set(gauge.chain.top.tensors)
            continue
        start = outputs_of(gauge.model, one, inputs)
        for share in (0.4, 1.0):
            assert torch.allclose(outputs_of(gauge.model, path.within(number, share), inputs), start, rtol=0, atol=1e-9)
    enter(gauge.model, before)
    return path


@settings(max_examples=5, deadline=None)
@given(
    widths=st.lists(st.integers(2, 9), min_size=2, max_size=4),
    seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    rescale=st.sampled_from([None, 2.0, (1.0, 1.7)]),
    bias=st.booleans(),
)
def test_random_networks_stay_below_the_bound(widths, seeds, rescale, bias):
    models = [mlp([4, *widths, 3], seed, bias=bias) for seed in (1, 2)]
    gauge, ends, keeps, inputs = problem(models, (4,), 3, seeds)
    check_path(gauge, ends, keeps, inputs, rescale, points=4)


def test_convolutions_with_batch_norm_stay_below_the_bound():
    models = [ConvChain(1), ConvChain(2)]
    gauge, ends, _, inputs = problem(models, (2, 8, 8), 3)
    assert gauge.chain.hidden == (5, 6, 7)
    assert "norm_hidden.running_var" in gauge.chain.layers[2].tensors
    keeps = (keep_sets(gauge.chain, seed=3, share=0.35), keep_sets(gauge.chain, seed=4))
    check_path(gauge, ends, keeps, inputs)


def test_equal_and_disjoint_keep_sets():
    models = [mlp([4, 6, 8, 3], seed) for seed in (1, 2)]
    gauge, ends, keeps, inputs = problem(models, (4,), 3)
    same = check_path(gauge, ends, (keeps[0], keeps[0]), inputs)
    first = [torch.arange(3), torch.arange(4)]
    apart = check_path(gauge, ends, (first, [torch.arange(3, 6), torch.arange(4, 8)]), inputs)
    # Nobody has to go home where no place is taken: three segments in the middle. Else three more a hidden layer.
    assert len(apart.kinds) == 2 * 7 + 3
    assert len(same.kinds) == 2 * 7 + 3 + 3 * 2


def test_the_middle_leads_to_the_other_network_with_dropped_units():
    models = [ConvChain(1), ConvChain(2)]
    gauge, ends, keeps, _ = problem(models, (2, 8, 8), 3)
    start, goal = (dropped(end, gauge.chain, keep) for end, keep in zip(ends, keeps, strict=True))
    way = _Way([start], [])
    way.cross(gauge.chain, goal, *keeps)
    assert len(way.kinds) > 3
    assert all(torch.equal(way.points[-1][name], value) for name, value in goal.items())


def test_dropped_units_are_silent_and_kept_ones_louder():
    model = ConvChain(1)
    gauge, ends, keeps, inputs = problem([model, ConvChain(2)], (2, 8, 8), 3)
    keep, name = keeps[0], "two"
    network = dropped(ends[0], gauge.chain, keep, 1, 2.0)
    silent = torch.ones(6, dtype=torch.bool)
    silent[keep[1]] = False
    assert not network["hidden.weight"].reshape(7, 6, 4)[:, silent].any()
    expected = 2 * ends[0]["hidden.weight"].reshape(7, 6, 4)[:, keep[1]][keep[2]]
    assert torch.equal(network["hidden.weight"].reshape(7, 6, 4)[:, keep[1]][keep[2]], expected)
    assert not network["two.weight"][silent].any()
    assert not network["norm_two.weight"][silent].any()
    assert torch.equal(network["one.weight"], ends[0]["one.weight"])

    with torch.no_grad():  # by hooks, as dropout would do it
        enter(model, ends[0])
        keeping = {layer: torch.isin(torch.arange(units), keep[i]) for i, (layer, units) in enumerate(
            [("one", 5), (name, 6), ("hidden", 7)])}  # fmt: skip
        model.hidden.register_forward_pre_hook(
            lambda _, args: (args[0].reshape(-1, 6, 4) * 2 * keeping["two"][None, :, None]).flatten(1)
        )
        model.out.register_forward_pre_hook(lambda _, args: args[0] * 2 * keeping["hidden"])
        wanted = model(inputs)
    assert torch.allclose(outputs_of(ConvChain(3), network, inputs), wanted, atol=1e-12)


def test_the_usual_factor_is_all_units_over_kept_ones():
    gauge, ends, _, _ = problem([mlp([4, 9, 3], 1)] * 2, (4,), 3)
    keep = keep_sets(gauge.chain)
    assert len(keep[0]) == 4
    found = dropped(ends[0], gauge.chain, keep)["2.weight"][:, keep[0]]
    assert torch.equal(found, ends[0]["2.weight"][:, keep[0]] * (9 / 4))


def test_more_than_half_of_the_units_is_refused():
    gauge, ends, keeps, _ = problem([mlp([4, 5, 6, 3], seed) for seed in (1, 2)], (4,), 3)
    for wrong, text in (
        ([torch.arange(3), keeps[0][1]], "layer 1 keeps 3 of 5 units; expected 1 to 2"),
        ([keeps[0][0], torch.arange(0)], "layer 2 keeps 0 of 6"),
        ([torch.tensor([1, 1]), keeps[0][1]], "different units of 0 to 4"),
        ([torch.tensor([1, 5]), keeps[0][1]], "different units of 0 to 4"),
        ([keeps[0][0]], "1 keep sets for 2 hidden layers"),
    ):
        with pytest.raises(MicrogliaError, match=text):
            dropout_path(gauge.chain, ends, (wrong, keeps[1]))
    with pytest.raises(MicrogliaError, match="at most 0"):
        keep_sets(gauge.chain, share=0.6)


@given(st.integers(2, 40), st.floats(0.01, 0.5), st.integers(0, 5))
@settings(deadline=None)
def test_keep_sets_are_drawn_by_seed_and_fit(units, share, seed):
    chain = UnitChain((UnitLayer("0.weight", (), units), UnitLayer("1.weight", (), 3)))
    keep = keep_sets(chain, seed=seed, share=share)
    check_keep(chain, keep)
    assert [k.tolist() for k in keep] == [k.tolist() for k in keep_sets(chain, seed=seed, share=share)]
    assert len(keep[0]) == max(1, int(share * units))


def test_searches_find_better_units_and_factors():
    gauge, ends, keeps, _ = problem([mlp([4, 12, 10, 3], seed) for seed in (1, 2)], (4,), 3)
    first = dropout_stability(gauge, ends[0], keep_sets(gauge.chain, seed=0), 2.0)
    best = best_keep_sets(gauge, ends[0], tries=6, by="network", rescale=2.0)
    assert dropout_stability(gauge, ends[0], best, 2.0).epsilon <= first.epsilon
    layered = best_keep_sets(gauge, ends[0], tries=6, rescale=2.0)
    drawn = [keep_sets(gauge.chain, seed=number) for number in range(6)]
    last = [gauge(dropped(ends[0], gauge.chain, keep, 1, 2.0)) for keep in drawn]
    assert gauge(dropped(ends[0], gauge.chain, layered, 1, 2.0)) == min(last)
    factor = best_rescale(gauge, ends[0], keeps[0])
    assert (
        dropout_stability(gauge, ends[0], keeps[0], factor).epsilon <= dropout_stability(gauge, ends[0], keeps[0], 2.0).epsilon
    )
    with pytest.raises(MicrogliaError, match="at least once"):
        best_keep_sets(gauge, ends[0], tries=0)


def test_a_place_on_the_path():
    gauge, ends, keeps, _ = problem([mlp([4, 6, 3], seed) for seed in (1, 2)], (4,), 3)
    path = dropout_path(gauge.chain, ends, keeps)
    assert all(torch.equal(path.at(0)[name], value) for name, value in ends[0].items())
    assert all(torch.equal(path.at(1)[name], value) for name, value in ends[1].items())
    middle = path.at(1.5 / len(path.kinds))
    assert torch.allclose(middle["2.weight"], between(path.points[1], path.points[2], 0.5)["2.weight"])
    with pytest.raises(MicrogliaError, match=r"in \[0, 1\]"):
        path.at(1.1)
    with pytest.raises(MicrogliaError, match="1 place of each segment or more"):
        losses_along(gauge, path, points=0)


def test_networks_of_the_zoo_are_read_or_refused():
    for name, hidden in (
        ("lenet-300-100", (300, 100)),
        ("conv-4", (64, 64, 128, 128, 256, 256)),
    ):
        assert unit_chain(mg.tasks.build(name, shape=(1, 8, 8)), torch.zeros(1, 1, 8, 8)).hidden == hidden
    vgg = unit_chain(mg.tasks.build("vgg16-bn", shape=(3, 16, 16), hidden="norm"), torch.zeros(1, 3, 16, 16))
    assert vgg.hidden == (64, 64, 128, 128, 256, 256, 256, *[512] * 7)
    with pytest.raises(MicrogliaError, match="as in a residual network"):
        unit_chain(mg.tasks.build("resnet8", shape=(1, 8, 8)), torch.zeros(1, 1, 8, 8))


class Weighted(nn.Sequential):
    """Its inputs are multiplied with something computed from themselves."""

    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.Linear(5, 3))

    def forward(self, x):
        return functional.linear(self[0](x), self[1].weight * 2)


REFUSED = {
    "no hidden layer": nn.Linear(4, 3),
    "not those of a linear layer": nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.ReLU()),
    "outputs are not those": nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.BatchNorm1d(3)),
    "whether layer_norm acts": nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
    "batch norm follows no layer": nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5), nn.Linear(5, 3)),
    "statistics of the batch": nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)),
    "joins two values": Weighted(),
    "whether prelu acts": nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3)),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_chain_is_refused(text):
    model = REFUSED[text]
    with pytest.raises(MicrogliaError, match=text) as caught:
        unit_chain(model, torch.zeros(1, 4))
    assert "find a curve by training" in str(caught.value)


def test_grouped_convolutions_are_refused():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(MicrogliaError, match="grouped convolution"):
        unit_chain(model, torch.zeros(1, 2, 2, 2))


def test_shared_and_masked_weights_are_refused():
    shared = nn.Linear(4, 4)
    with pytest.raises(MicrogliaError, match="share a tensor"):
        unit_chain(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 3)), torch.zeros(1, 4))
    masked = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    mg.mask(masked, {"0.weight": torch.ones(6, 4, dtype=torch.bool)})
    with pytest.raises(MicrogliaError, match="folded"):
        unit_chain(masked, torch.zeros(1, 4))
    assert unit_chain(mg.fold(masked), torch.zeros(1, 4)).hidden == (6,)


def test_on_real_data_with_a_gauge_and_put_back():
    task = image_task("lenet-300-100", "digits")
    model, other = task.build(), task.fresh(1)
    chain = unit_chain(model, task.example)
    gauge = Gauge(task, ("train",), recalibrate=0, batch_size=16, limit=1)
    measuring = NetworkGauge(model, chain, lambda here: gauge(here)["train_loss"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    keeps = (keep_sets(chain, seed=0), keep_sets(chain, seed=1))
    found = examine_path(measuring, (network_of(model, chain), network_of(other, chain)), keeps, points=1)
    assert found["maximum"] <= found["bound"] + 1e-5  # float32
    assert found["epsilon"][0] == max(found["dropped"][0]) - found["ends"][0]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(MicrogliaError, match="has the shape"):
        enter(image_task("lenet-300-100", "digits", image_size=4).build(), network_of(model, chain))
