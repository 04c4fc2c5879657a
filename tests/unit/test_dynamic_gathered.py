"""Gathered execution: equal to the masked network for layers of every kind, computing just what the honest count says."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gated import NETWORKS, SHAPE, bias, counter_of, gated, images, network, plan_of, same, state_of
from microglia.core.errors import MicrogliaError
from microglia.dynamic import Counter, GatePlan, Gathered, attach_gates, detach_gates, gates_of, record
from microglia.zoo.external import import_torchvision

HEADS = [{"pool": "avg", "softmax": True}, {"pool": "max", "softmax": True}, {"pool": "avg", "softmax": False}]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@functools.cache
def counter(name: str) -> Counter:
    return counter_of(network(name), images(1))


def double(name: str, seed: int = 0, **settings: Any) -> nn.Module:
    """A gated network in float64."""
    model = network(name, seed).double()
    return gated(model, images(1).double(), seed=seed, plan=plan_of(network(name), images(1), **settings))


@functools.cache
def compiled(name: str) -> Gathered:
    return Gathered(double(name), images(1).double())


def with_heads_of(model: nn.Module, name: str) -> Gathered:
    """Returns the compiled network with the heads of a twin of it: a trace takes long."""
    fast = compiled(name)
    for layer, gate in gates_of(model).items():
        fast._gates[layer].load_state_dict(gate.state_dict())
    return fast


def assert_equal_and_counted(name: str, model: nn.Module, x: Tensor, fast: Gathered | None = None) -> None:
    """The same output; executed, by the library's own count and by torch's of the real calls, what the honest count says."""
    fast = fast or Gathered(model, x[:1])
    with FlopCounterMode(display=False) as flops:
        out = fast(x)
    torch.testing.assert_close(out, model(x), **EXACT)
    costs = counter(name)(record(model, [(x, torch.zeros(len(x)))]).masks)
    expected = int(costs.honest.sum())
    assert fast.macs == expected - len(x) * counter(name).rest
    assert flops.get_total_flops() == 2 * expected


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, HEADS[0]) for name in NETWORKS), *(("residual", s) for s in HEADS[1:]), ("depthwise", HEADS[1])],
)
def test_equal_to_the_masked_network(name: str, settings: dict[str, Any]) -> None:
    assert_equal_and_counted(name, double(name, **settings), images(3, seed=4).double())


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["plain", "residual", "branches", "depthwise", "signals"])
def test_other_weights_and_inputs(name: str, seed: int) -> None:
    assert_equal_and_counted(name, double(name, seed), images(4, seed=10 + seed).double())


@pytest.mark.parametrize("name", ["plain", "residual", "branches", "depthwise", "signals", "resnet8"])
def test_layers_that_are_off_altogether(name: str) -> None:
    """Each layer in turn, then all, keeps nothing; depthwise filters whose input went are constants, not zeros."""
    x = images(2).double()
    layers = list(gates_of(double(name)))
    for off in [*([layer] for layer in layers), layers, layers[1:]]:
        model = double(name)
        bias(model, -100.0, *off)
        assert_equal_and_counted(name, model, x, with_heads_of(model, name))


@pytest.mark.parametrize("name", ["plain", "residual", "branches", "depthwise", "signals"])
def test_layers_that_are_on_altogether(name: str) -> None:
    x = images(2).double()
    for on in [list(gates_of(double(name))), list(gates_of(double(name)))[::2]]:
        model = double(name)
        bias(model, 100.0, *on)
        assert_equal_and_counted(name, model, x, with_heads_of(model, name))
    model = double(name)
    bias(model, 100.0)
    torch.testing.assert_close(with_heads_of(model, name)(x), network(name).double()(x), **EXACT)


@pytest.mark.parametrize("name", ["depthwise", "residual"])
def test_a_filter_more_or_less(name: str) -> None:
    """One filter on of each layer, and all but one."""
    x = images(2).double()
    for on in (True, False):
        model = double(name)
        bias(model, -100.0 if on else 100.0)
        with torch.no_grad():
            for i, gate in enumerate(gates_of(model).values()):
                gate.bias[(3 * i) % len(gate.bias)] *= -1
        assert_equal_and_counted(name, model, x, with_heads_of(model, name))


@pytest.mark.parametrize("name", ["depthwise", "residual", "plain"])
def test_fixed_numbers_of_filters(name: str) -> None:
    model, x = network(name).double(), images(3).double()
    plan = plan_of(network(name), images(1))
    keep = {site.layer: max(1, site.outputs // 3) for site in plan.sites}
    gated(model, x, plan=GatePlan(plan.sites, r=plan.r, keep=keep))
    assert_equal_and_counted(name, model, x)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "mobilenet-v2"])
def test_single_precision(name: str) -> None:
    """Equal to 1e-5 for every input whose masks did not flip by rounding, and few do."""
    model, x = gated(network(name), images(1)), images(8, seed=2)
    fast, out = Gathered(model, x[:1]), model(x)
    close = [torch.allclose(fast(x[i : i + 1]), out[i : i + 1], rtol=1e-5, atol=1e-5) for i in range(len(x))]
    assert sum(close) >= len(x) - 1
    if all(close):
        torch.testing.assert_close(fast(x), out, rtol=1e-5, atol=1e-5)


def test_one_input_at_a_time_is_a_batch() -> None:
    model, x = double("residual"), images(5).double()
    fast = Gathered(model, x[:1])
    together, macs = fast(x), 0
    for i in range(5):
        torch.testing.assert_close(fast(x[i : i + 1]), together[i : i + 1], **EXACT)
        macs += fast.macs
    fast(x)
    assert fast.macs == macs


def test_the_model_stays_as_it_is_and_may_change_later() -> None:
    model, x = double("residual").train(), images(2).double()
    before = state_of(model)
    fast = Gathered(model, x)
    assert same(state_of(model), before)
    assert len(gates_of(model)) == 7
    assert all(module.training for module in model.modules())
    expected = model.eval()(x)
    bias(model, -100.0)
    torch.testing.assert_close(fast(x), expected, **EXACT)


def test_inputs_are_not_written_to() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.next, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y = y + y.abs().neg()
            y.relu_()
            return self.head(torch.relu(self.next(y)).mean((2, 3)))

    model, x = First().eval().double(), images(2).double()
    gated(model, x)
    kept = x.clone()
    fast = Gathered(model, x)
    torch.testing.assert_close(fast(x), model(x), **EXACT)
    assert torch.equal(x, kept)
    torch.testing.assert_close(fast(x), model(x), **EXACT)


class Stated(nn.Module):
    """Sums and activations in place whose result is read by the old name."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        self.relu(x)
        y = self.two(x)
        y.add_(x)
        self.relu(y)
        return self.head(torch.relu(self.three(y)).mean((2, 3)))


def test_in_place_statements() -> None:
    model, x = Stated().eval().double(), images(3).double()
    gated(model, x)
    torch.testing.assert_close(Gathered(model, x)(x), model(x), **EXACT)


class Preactivated(nn.Module):
    """Norms in front: a gate hangs on the convolution itself, and the norm behind the sum reads the full width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.second, self.outer = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.last, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + 0.5 * self.outer(torch.relu(self.second(self.inner(torch.relu(self.norm(x))))))
        x = torch.add(x, self.inner.weight.new_ones(()), alpha=2)
        return self.head(torch.nn.functional.interpolate(torch.relu(self.last(x)), scale_factor=2).amax((2, 3)))


def test_scaled_sums_and_norms_in_front() -> None:
    model, x = Preactivated().double(), images(3).double()
    with torch.no_grad():
        model.train()(images(16).double())
    gated(model.eval(), x)
    torch.testing.assert_close(Gathered(model, x)(x), model(x), **EXACT)


@pytest.mark.parametrize("excluded", ["3", "6", "0", "8"])
def test_layers_without_a_gate_in_between(excluded: str) -> None:
    plan = plan_of(network("depthwise"), images(1))
    plan = GatePlan(tuple(site for site in plan.sites if site.layer != excluded)).with_r(0.8)
    model, plain, x = network("depthwise").double(), network("depthwise"), images(3).double()
    gated(model, x, plan=plan)
    fast = Gathered(model, x)
    with FlopCounterMode(display=False) as flops:
        out = fast(x)
    torch.testing.assert_close(out, model(x), **EXACT)
    honest = Counter(plain, counter("depthwise").flow, plan, images(1))(record(model, [(x, torch.zeros(3))]).masks).honest
    assert flops.get_total_flops() == 2 * int(honest.sum())
    assert fast.macs == int(honest.sum()) - 3 * counter("depthwise").rest


@pytest.mark.parametrize("name", ["googlenet", "densenet121"])
def test_concatenations_of_torchvision(name: str) -> None:
    import_torchvision()
    import torchvision

    torch.manual_seed(0)
    settings = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    if name == "densenet121":
        model = torchvision.models.DenseNet(growth_rate=6, block_config=(2, 2), num_init_features=8, num_classes=5)
    else:
        model = torchvision.models.googlenet(num_classes=5, **settings)
    x = torch.randn(1, 3, 33, 33, dtype=torch.float64)
    gated(model.double().eval(), x)
    torch.testing.assert_close(Gathered(model, x[:1])(x), model(x), rtol=1e-10, atol=1e-10)


def test_another_size_of_image() -> None:
    model = gated(network("resnet8").double(), images(1).double(), plan=plan_of(network("resnet8"), images(1)))
    x = torch.randn(2, 3, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(Gathered(model, images(1).double())(x), model(x), **EXACT)


def test_a_model_without_gates() -> None:
    with pytest.raises(MicrogliaError, match=r"has no gates.*'ftwt'"):
        Gathered(network("plain"), images(1))
    model = gated(network("plain"), images(1))
    with pytest.raises(MicrogliaError, match="has no gates"):
        Gathered(detach_gates(model), images(1))


def test_random_gates_straight_from_the_plan() -> None:
    """As attached, without heads made to differ by input."""
    model = network("residual").double()
    attach_gates(model, plan_of(network("residual"), images(1)), torch.Generator().manual_seed(3))
    assert_equal_and_counted("residual", model, images(2, seed=5, shape=SHAPE).double())
