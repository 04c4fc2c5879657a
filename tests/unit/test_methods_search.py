"""SMART, PDP, PaS, AWG and AC/DC: what their papers promise, step by step, on small networks."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import BudgetError, PatternError, SelectorError
from microglia.core.patterns import NM, Block, parse_pattern
from microglia.graph import ShrinkError
from microglia.methods import Acdc, Awg, Pas, Pdp, Smart, UnitPruner
from microglia.methods.block_scale import scale_blocks
from microglia.scores.inputs import mean_inputs
from microglia.train.optim import FitConfig, make_optimizers

EVERY = [Smart, Pdp, Pas, Awg, Acdc]
STEPS = 40


def images(n: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """Two layers of a stream that is summed, so that their channels are coupled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.inner_norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(x + self.inner_norm(self.inner(x))).mean((2, 3)))


def pruner_of(kind: type[UnitPruner], model: nn.Module, **settings: Any) -> UnitPruner:
    x, y = images()
    known: dict[str, Any] = {"total_steps": STEPS, "example_inputs": x[:2], "pattern": "block:8x4", "density": 0.4}
    known |= {"evidence": mg.scores.Evidence([(x, y)], functional.cross_entropy)}
    settings = known | settings
    if settings["pattern"].startswith("nm"):
        settings.pop("density")
    return kind(model, **settings)


def optimizers_of(model: nn.Module, pruner: UnitPruner) -> list[torch.optim.Optimizer]:
    config = FitConfig(lr=0.05, weight_decay=1e-3)
    return make_optimizers(config, [{"params": pruner.weights_to_train()}], pruner.optimizers())


def steps(model: nn.Module, pruner: UnitPruner, count: int, optimizers: list[torch.optim.Optimizer] | None = None) -> Any:
    optimizers = optimizers or optimizers_of(model, pruner)
    x, y = images()
    for _ in range(count):
        loss = functional.cross_entropy(model(x), y) + pruner.penalty()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        pruner.step(optimizers[0])
    return optimizers


# ------------------------------------------------------------------------------------------------------------ the masks
@pytest.mark.parametrize("pattern", ["block:8x4", "block:16x8", "unstructured", "nm:2:4"])
@pytest.mark.parametrize("kind", EVERY)
def test_exact_masks_that_last(kind: type[UnitPruner], pattern: str) -> None:
    model = network()
    pruner = pruner_of(kind, model, pattern=pattern)
    optimizers = steps(model, pruner, STEPS)
    masks = pruner.finish()
    assert set(masks) == set(mg.core.layers.prunable_layers(model))
    for name, layer in mg.core.layers.prunable_layers(model).items():
        units = parse_pattern(pattern).reduce(masks[name].float())
        if pattern == "nm:2:4":
            real = parse_pattern(pattern).sizes(layer.shape).sum(1)
            assert torch.equal(units.sum(1).long(), real.clamp(max=2))
        else:
            assert torch.isin(units, torch.tensor([0.0, 1.0])).all()
    if pattern != "nm:2:4":
        largest = max(
            int(parse_pattern(pattern).sizes(layer.shape).max()) for layer in mg.core.layers.prunable_layers(model).values()
        )
        assert abs(masks.kept - round(0.4 * masks.total)) <= (0 if pattern == "unstructured" else largest)
    fresh = network()
    mg.mask(fresh, masks)
    assert list(model.state_dict()) == list(fresh.state_dict())  # nothing of the search is left in it
    x, y = images()
    for _ in range(5):  # momentum and decay bring nothing back
        optimizers[0].zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizers[0].step()
    for name, layer in mg.core.layers.prunable_layers(model).items():
        assert not layer.raw[~masks[name]].any()


@pytest.mark.parametrize("build", [network, Residual])
@pytest.mark.parametrize("kind", EVERY)
def test_channels_shrink_and_stay_equal(kind: type[UnitPruner], build: Any) -> None:
    model = build()
    pruner = pruner_of(kind, model, pattern="channel", density=0.5)
    steps(model, pruner, STEPS)
    total = pruner.units.count
    pruner.finish()
    assert pruner.freeze_report["kept"] == round(0.5 * total)
    model.eval()
    small = mg.shrink(model, images()[0][:2])
    torch.testing.assert_close(small(images()[0]), model(images()[0]), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(p.numel() for p in model.parameters())
    assert not mg.graph.plan_of(small).notes  # every masked channel went


def test_a_stream_that_padding_cuts_in_pieces_is_several_groups() -> None:
    """The shortcuts of CIFAR ResNets pad channels on both sides: one layer makes the units of three groups."""
    x = torch.randn(2, 3, 16, 16)
    model = mg.tasks.build("resnet8", classes=10, shape=(3, 16, 16)).eval()
    pruner = Smart(model, pattern="channel", density=0.5, total_steps=4, example_inputs=x)
    assert len(set(pruner.units.names)) == len(pruner.units.names)
    assert sum(pruner.units.lengths) == pruner.units.count == int(pruner.units.costs.sum())
    assert any("#" in name for name in pruner.units.names)
    pruner.finish()
    assert pruner.freeze_report["kept"] == round(0.5 * pruner.units.count)
    small = mg.shrink(model, x)
    torch.testing.assert_close(small(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", EVERY)
def test_nothing_pruned_is_the_dense_network(kind: type[UnitPruner]) -> None:
    x, _ = images()
    model, dense = network(), network()
    pruner = pruner_of(kind, model, density=1.0)
    torch.testing.assert_close(model(x), dense(x), atol=1e-4 if kind is Pdp else 0, rtol=0)
    pruner.finish()
    assert pruner.masks.density == 1
    assert all(
        torch.equal(layer.weight, mg.core.layers.prunable_layers(dense)[n].weight)
        for n, layer in mg.core.layers.prunable_layers(model).items()
    )


@pytest.mark.parametrize("kind", EVERY)
def test_at_least_one_unit_of_each_layer_stays(kind: type[UnitPruner]) -> None:
    model = network()
    pruner = pruner_of(kind, model, density=0.04)
    pruner.finish()
    assert all(bool(mask.any()) for mask in pruner.masks.values())


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("pattern", ["block:8x4", "channel"])
def test_resumed_in_the_middle_ends_in_the_same_bits(kind: type[UnitPruner], pattern: str) -> None:
    settings = {"pattern": pattern, **({"search": 0.6} if kind is not Acdc else {})}
    model, saved, done, optimizers = network(), {}, 0, None
    pruner = pruner_of(kind, model, **settings)
    for at in (4, 19, 31):
        optimizers = steps(model, pruner, at - done, optimizers)
        saved[at] = copy.deepcopy((model.state_dict(), [o.state_dict() for o in optimizers], pruner.state_dict()))
        done = at
    steps(model, pruner, STEPS - done, optimizers)
    expected = pruner.finish()

    for at, (weights, states, own) in saved.items():
        again = network()
        resumed = pruner_of(kind, again, **settings)
        others = optimizers_of(again, resumed)
        resumed.load_state_dict(own)
        again.load_state_dict(weights)
        for optimizer, state in zip(others, states, strict=True):
            optimizer.load_state_dict(state)
        steps(again, resumed, STEPS - at, others)
        assert resumed.finish().same(expected), at
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items()), at


# ---------------------------------------------------------------------------------------------------------------- SMART
def test_temperature_falls_by_one_ratio_from_first_to_last() -> None:
    pruner = pruner_of(Smart, network(), search=0.5)
    seen = []
    for _ in range(20):
        seen.append(pruner.temperature)
        pruner.steps += 1
    assert seen[0] == 10.0
    assert seen[-1] == pytest.approx(1e-4, rel=1e-12)
    ratios = [b / a for a, b in itertools.pairwise(seen)]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-12)


def test_the_sum_of_the_soft_mask_is_the_budget_at_every_step() -> None:
    for cost in ("weights", "units", "macs"):
        model = network()
        pruner = pruner_of(Smart, model, search=0.5, cost=cost)
        optimizers = None
        for _ in range(20):
            total = float((pruner.factors().detach().double() * pruner.units.costs).sum())
            assert total == pytest.approx(pruner.keep, rel=1e-5)
            optimizers = steps(model, pruner, 1, optimizers)


def test_gradients_are_those_of_the_formula() -> None:
    """dL/dw_b = f_b G_b and dL/dm_b = v_b (u_b - mean) / tau with u_b = <G_b, w_b> (spec 2.3)."""
    model, x = nn.Sequential(nn.Linear(16, 16, bias=False)).double(), torch.randn(5, 16, dtype=torch.float64)
    pruner = Smart(model, pattern="block:8x4", density=0.5, total_steps=10, init_temp=0.5)
    f = pruner.factors().detach()
    model(x).square().sum().backward()
    layer = mg.core.layers.prunable_layers(model)["0.weight"]
    effective = (layer.raw * Block(8, 4).expand(f, (16, 16))).detach().requires_grad_()
    (big,) = torch.autograd.grad(functional.linear(x, effective).square().sum(), effective)
    torch.testing.assert_close(layer.raw.grad, Block(8, 4).expand(f, (16, 16)) * big)
    u = Block(8, 4).reduce(big * layer.raw.detach(), "sum").flatten()
    v = f * (1 - f)
    torch.testing.assert_close(pruner.soft.scores.grad, (v * (u - (v @ u) / v.sum()) / pruner.temperature).to(torch.float64))


def test_plain_gradient_descent_keeps_the_mean_score() -> None:
    model = network()
    pruner = pruner_of(Smart, model, search=1.0, mask_optimizer="sgd", mask_lr=0.5, cost="units")
    optimizers = optimizers_of(model, pruner)
    before = pruner.soft.scores.detach().double().clone()
    steps(model, pruner, 10, optimizers)
    after = pruner.soft.scores.detach().double()
    assert float((after - before).abs().max()) > 1e-4
    assert float(after.mean()) == pytest.approx(float(before.mean()), abs=1e-6)


def test_undecided_units_vanish_as_the_temperature_falls() -> None:
    model = network()
    pruner = pruner_of(Smart, model, search=1.0, density=0.3)
    steps(model, pruner, STEPS)
    undecided = [row["undecided"] for row in pruner.history]
    assert undecided[0] == sum(pruner.history[0]["histogram"]) - len(pruner.units.names)  # but for the best of each layer
    assert undecided[-1] <= 3
    assert pruner.freeze_report["mean"] < 0.02


@pytest.mark.parametrize("init", ["magnitude", "normalized", "layerwise", "activation"])
def test_the_first_ranking_is_what_the_initialization_says(init: str) -> None:
    model = network()
    pruner = pruner_of(Smart, model, init=init, density=0.3)
    values = {n: layer.raw.abs() for n, layer in mg.core.layers.prunable_layers(model).items()}
    if init == "activation":
        dense = network()
        inputs = mean_inputs(dense, mg.core.layers.prunable_layers(dense), mg.scores.Evidence([images()]))
        values = {n: v * inputs[n] for n, v in values.items()}
    means = [Block(8, 4).reduce(v, "mean").flatten() for v in values.values()]
    if init == "layerwise":
        means = [m / m.mean() for m in means]
    expected = torch.cat(means)
    scores = pruner.soft.scores.detach()
    torch.testing.assert_close(scores / scores.max(), expected / expected.max())
    assert init in ("magnitude", "layerwise") or float(scores.std()) == pytest.approx(1)


def test_mean_inputs_are_those_of_each_layer() -> None:
    model, (x, y) = nn.Sequential(nn.Conv2d(3, 6, 1, groups=3), nn.Flatten(), nn.Linear(6 * 64, 2)), images()
    found = mean_inputs(model, mg.core.layers.prunable_layers(model), mg.scores.Evidence([(x, y), (x * 3, y)]))
    torch.testing.assert_close(found["0.weight"][::2, 0, 0, 0], 2 * x.abs().mean((0, 2, 3)))
    torch.testing.assert_close(found["2.weight"][0], 2 * model[:2](x).abs().mean(0), atol=1e-1, rtol=0.5)
    assert found["2.weight"].shape == (2, 384)


def test_useful_blocks_with_small_weights_are_kept_where_magnitude_removes_them() -> None:
    """The magnitude trap: what matters has weights a tenth of the noise's (spec 2.9, test 8)."""
    torch.manual_seed(0)
    useful = torch.arange(0, 64, 8)
    x = torch.randn(256, 64)
    x[:, [i for i in range(64) if i not in useful]] *= 0.02  # their large weights do nothing
    true = torch.zeros(1, 64)
    true[0, useful] = 1.0
    start = torch.where(true > 0, 0.05, 0.5) * torch.sign(torch.randn(1, 64))
    start[0, useful] = 0.05
    y = x @ true.T

    def run(smart: bool) -> int:
        model = nn.Linear(64, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(start)
        settings = {"pattern": "unstructured", "density": 8 / 64}
        if not smart:
            return int(mg.methods.OneShot(model, **settings).masks["weight"][0, useful].sum())
        pruner = Smart(model, total_steps=200, search=1.0, init="noise", init_temp=1.0, mask_lr=0.05, **settings)
        own = pruner.param_groups()
        optimizer = torch.optim.Adam([{"params": [mg.core.layers.prunable_layers(model)["weight"].raw], "lr": 1e-3}, *own])
        for _ in range(200):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pruner.step(optimizer)
        return int(pruner.finish()["weight"][0, useful].sum())

    assert run(smart=False) == 0
    assert run(smart=True) == 8


def test_a_falling_temperature_escapes_the_minima_that_are_not_sparse() -> None:
    """With tau fixed nothing pushes the mask to 0 or 1, and the freeze costs; falling, soft and hard agree (spec 2.2)."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, generator=generator)

    def run(first: float, last: float) -> tuple[int, float, float]:
        model = nn.Linear(64, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(target + 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(1)))
        pruner = Smart(
            model, pattern="unstructured", density=0.25, total_steps=400, search=1.0, init="noise", init_temp=first,
            final_temp=last, mask_lr=0.03,
        )  # fmt: skip
        losses: dict[str, float] = {}

        def loss() -> Tensor:
            return (model.weight[0] - target).square().sum()

        pruner.at_freeze = lambda moment: losses.update({moment: float(_fresh(pruner, loss))}) or {}
        optimizer = torch.optim.Adam([{"params": pruner.weights_to_train(), "lr": 0.02}, *pruner.param_groups()])
        for _ in range(400):
            pruner.soft.forget()
            value = loss()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            pruner.step(optimizer)
        return pruner.freeze_report["undecided"], losses["soft"], losses["hard"]

    fixed, falling = run(1.0, 1.0), run(10.0, 1e-4)
    assert fixed[0] > 32
    assert fixed[2] > 10 * fixed[1] + 1  # the mask was no mask: making it one ruins the network
    assert falling[0] <= 1
    assert falling[2] == pytest.approx(falling[1], rel=0.05)
    assert falling[2] < fixed[2]


def _fresh(pruner: UnitPruner, loss: Any) -> Tensor:
    pruner.soft.forget()
    return loss()


def test_a_channel_mask_before_batch_norm_would_get_no_gradient() -> None:
    """Scaling a filter in front of a norm is divided out again; where a channel is read it is not (spec 2.6)."""
    x, y = images(32)
    model = network()
    pruner = pruner_of(Smart, model, pattern="channel", density=0.5)
    functional.cross_entropy(model(x), y).backward()
    first = pruner.soft.scores.grad[:16]
    torch.manual_seed(0)
    dense = network()
    gate = torch.full((16,), 0.5, requires_grad=True)
    inner = dense[0](x) * gate[:, None, None]
    functional.cross_entropy(dense[1:](inner), y).backward()
    assert float(gate.grad.abs().max()) < 1e-4
    slopes = pruner.factors().detach() * (1 - pruner.factors().detach()) / pruner.temperature
    soft = slopes[:16] > 0  # the best channel of the group stays, hence has no slope
    assert int(soft.sum()) == 15
    assert float((first[soft] / slopes[:16][soft]).abs().max()) > 1e-3


def test_nm_ranks_the_weights_themselves() -> None:
    """dL/dw_i = f_i G_i + sign(w_i) v_i (u_i - mean) / tau (spec 3.2)."""
    torch.manual_seed(0)
    model, x = nn.Linear(8, 4, bias=False).double(), torch.randn(5, 8, dtype=torch.float64)
    pruner = Smart(model, pattern="nm:2:4", total_steps=10, init_temp=0.3)
    assert pruner.param_groups() == []
    f = pruner.factors().detach().view(4, 8)
    torch.testing.assert_close(f.view(-1, 4).sum(1), torch.full((8,), 2.0, dtype=torch.float64))
    model(x).square().sum().backward()
    raw = mg.core.layers.prunable_layers(model)["weight"].raw
    effective = (raw * f).detach().requires_grad_()
    (big,) = torch.autograd.grad(functional.linear(x, effective).square().sum(), effective)
    v, u = (f * (1 - f)).view(-1, 4), (big * raw.detach()).view(-1, 4)
    mean = (v * u).sum(1, keepdim=True) / v.sum(1, keepdim=True)
    expected = f * big + raw.detach().sign() * (v * (u - mean)).view(4, 8) / 0.3
    torch.testing.assert_close(raw.grad, expected)


@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (40, 16, 3, 3), (10, 16), (16, 3, 3, 3), (8, 16, 1, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # compiled kernels compute float32
def test_scaled_blocks_are_the_expanded_product(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype)
    if channels_last and len(shape) == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    weight.requires_grad_()
    factors = torch.rand(Block(16, 8).sizes(shape).numel(), dtype=dtype, requires_grad=True)
    found, expected = scale_blocks(weight, factors, Block(16, 8)), weight * Block(16, 8).expand(factors, shape)
    assert torch.equal(found, expected)
    assert found.stride() == weight.stride()
    arrived = torch.randn_like(expected)
    for mine, theirs in zip(*(torch.autograd.grad(v, [weight, factors], arrived) for v in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


# ------------------------------------------------------------------------------------------------------------------ PDP
def test_pdp_mask_is_one_half_at_the_threshold_and_follows_its_formula() -> None:
    for pattern in ("unstructured", "nm:2:4"):
        model = nn.Linear(64, 8, bias=False)
        settings = {} if pattern == "nm:2:4" else {"density": 0.25}
        pruner = Pdp(model, pattern=pattern, total_steps=10, ramp=0, temperature=1e-3, relative=False, **settings)
        w = mg.core.layers.prunable_layers(model)["weight"].raw
        m = pruner.factors().view(8, 64)
        assert int((m > 0.5).sum()) == (256 if pattern == "nm:2:4" else 128)
        order = w.abs().flatten().argsort()
        if pattern == "unstructured":
            assert bool((m.flatten()[order].diff() >= 0).all())
            t = (w.abs().flatten()[order][-128] + w.abs().flatten()[order][-129]) / 2
            torch.testing.assert_close(m, torch.sigmoid((w.square() - t.square()) / 1e-3), atol=1e-5, rtol=1e-4)
        big = torch.randn(8, 64)
        (m * w * big).sum().backward()
        expected = big * (m + 2 * w.square() * m * (1 - m) / 1e-3)  # t held constant
        torch.testing.assert_close(w.grad, expected.detach(), atol=1e-5, rtol=1e-4)


def test_pdp_shares_out_the_budget_by_magnitude_and_ends_in_the_magnitude_mask() -> None:
    model = network()
    pruner = pruner_of(Pdp, model, pattern="unstructured", search=1.0)
    expected = {n: int(m.sum()) for n, m in mg.methods.OneShot(network(), density=0.4).masks.items()}
    assert pruner.shares == expected
    seen = []
    for _ in range(STEPS):
        seen.append(int((pruner.factors() > 0.5).sum()))
        steps(model, pruner, 1)
    assert seen[0] == sum(mask.numel() for mask in pruner.masks.values())
    assert seen == sorted(seen, reverse=True)
    weights = {n: layer.raw.detach().clone() for n, layer in mg.core.layers.prunable_layers(model).items()}
    for name, mask in pruner.finish().items():
        assert int(mask.sum()) == expected[name]
        assert weights[name][mask].abs().min() >= weights[name][~mask].abs().max()


# ------------------------------------------------------------------------------------------------------------------ PaS
def test_pas_gates_are_binary_with_a_straight_gradient_and_a_penalty_toward_the_budget() -> None:
    model = network()
    pruner = pruner_of(Pas, model, search=1.0)
    scores = pruner.soft.scores
    with torch.no_grad():
        scores[::2] = 0.3
    gates = pruner.factors()
    assert torch.equal(gates, (scores > 0.5).float())
    (gradient,) = torch.autograd.grad((gates * torch.arange(len(gates))).sum(), scores)
    assert torch.equal(gradient, torch.arange(len(gates)).float())
    with torch.no_grad():
        scores.fill_(1.0)
    penalty = pruner.penalty()
    whole = int(pruner.units.costs.sum())
    assert penalty.item() == pytest.approx((whole / pruner.keep - 1) ** 2, rel=1e-4)
    assert bool((torch.autograd.grad(penalty, scores)[0] > 0).all())  # down: too much is kept
    with torch.no_grad():
        scores.fill_(0.0)
    assert bool((torch.autograd.grad(pruner.penalty(), scores)[0] < 0).all())
    optimizers = steps(model, pruner, 3)
    assert 0 <= float(scores.detach().min()) <= float(scores.detach().max()) <= 1
    assert optimizers


def test_pas_with_n_m_has_a_budget_for_every_row() -> None:
    torch.manual_seed(0)
    pruner = Pas(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), pattern="nm:2:4", total_steps=4, search=1.0)
    scores = pruner.soft.scores
    rows = scores.detach().view(-1, 4)
    with torch.no_grad():
        rows[:] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert pruner.penalty() == 0
    with torch.no_grad():
        rows[0] = 1.0  # four of two in one row, and no other row can make it up
        rows[1] = 0.0
    penalty = pruner.penalty()
    assert penalty.item() == pytest.approx(2 / len(rows))
    gradient = torch.autograd.grad(penalty, scores)[0].view(-1, 4)
    assert bool((gradient[0] > 0).all())
    assert bool((gradient[1] < 0).all())
    assert not gradient[2:].any()


def test_pas_counts_the_product_of_widths() -> None:
    model = Residual()
    pruner = pruner_of(Pas, model, pattern="channel", density=0.5, cost="macs")
    kept = torch.ones(pruner.units.count)
    assert float(pruner.units.macs(kept)) == 1
    half = torch.cat([(torch.arange(n) < n // 2).float() for n in pruner.units.lengths])
    mask = {n: 64 * (3 * 8 * 9) if "stem" in n else 64 * 8 * 8 * 9 for n in ("stem", "inner")}
    dense = 64 * (3 * 16 * 9) + 64 * 16 * 16 * 9 + 160
    assert float(pruner.units.macs(half)) == pytest.approx((sum(mask.values()) + 80) / dense, rel=1e-5)


# -------------------------------------------------------------------------------------------------------- AWG and AC/DC
def test_awg_prunes_in_equal_steps_and_never_takes_back() -> None:
    model = network()
    pruner = pruner_of(Awg, model, pattern="unstructured", search=1.0, updates=4, density=0.2)
    total, before = pruner.weights, pruner.masks
    optimizers, seen = None, []
    for _ in range(STEPS):
        optimizers = steps(model, pruner, 1, optimizers)
        assert pruner.masks.nested_in(before)
        before = pruner.masks
        seen.append(before.kept)
    counts = [total - round((total - pruner.keep) * u / 4) for u in (1, 2, 3, 4)]
    # prune first, then train: updates at steps 0, 10, 20, 30 of 40, the first right after the step that starts the loop
    assert seen == [*counts[:1] * 9, *counts[1:2] * 10, *counts[2:3] * 10, *counts[3:] * 11]
    assert counts[-1] == round(0.2 * total)
    assert pruner.freeze_report["step"] == 30


def test_awg_leaves_the_weights_alone_and_does_not_see_the_scale_of_the_loss() -> None:
    x, y = images()
    kept = []
    for scale in (1.0, 2.0):
        model = network()
        before = copy.deepcopy(model.state_dict())
        evidence = mg.scores.Evidence([(x, y), (x * 0.5, y)], lambda o, t, s=scale: s * functional.cross_entropy(o, t))
        pruner = pruner_of(Awg, model, evidence=evidence, updates=1)
        pruner.ranking()
        assert all(torch.equal(value, pruner.model.state_dict()[_soft(name, pruner)]) for name, value in before.items())
        kept.append(pruner.finish())
    assert kept[0].same(kept[1])


def _soft(name: str, pruner: UnitPruner) -> str:
    path, _, attribute = name.rpartition(".")
    return f"{path}.parametrizations.{attribute}.original" if name in pruner.units.scaled_names else name


def test_no_layer_is_sparser_than_the_most_it_may_be() -> None:
    for kind in (Awg, Acdc, Smart):
        model = network()
        with torch.no_grad():
            model[5].weight.mul_(1e-6)  # the layer every score would empty
        pruner = pruner_of(kind, model, pattern="unstructured", density=0.2, max_sparsity=0.9)
        steps(model, pruner, 1)
        pruner.finish()
        assert int(pruner.masks["5.weight"].sum()) >= math.ceil(0.1 * 512) - 1


def test_acdc_alternates_and_ends_compressed() -> None:
    model = network()
    pruner = pruner_of(Acdc, model, pattern="unstructured", compress=(0.25, 0.75), decompress=(0.5,))
    optimizers, kept, zeros = None, [], []
    for step in range(1, STEPS + 1):
        optimizers = steps(model, pruner, 1, optimizers)
        kept.append(pruner.masks.kept)
        raw = torch.cat([layer.raw.flatten() for layer in mg.core.layers.prunable_layers(model).values()])
        zeros.append(int((raw == 0).sum()))
        if step == 20:
            momenta = [s["momentum_buffer"] for s in optimizers[0].state.values()]
            assert not any(bool(m.any()) for m in momenta)
    total, goal = pruner.weights, round(0.4 * pruner.weights)
    assert kept == [*[total] * 9, *[goal] * 10, *[total] * 10, *[goal] * 11]
    assert zeros[18] == zeros[19] == total - goal  # the dense phase begins with what was removed at zero
    assert zeros[28] == 0
    assert pruner.finish().kept == goal


def test_acdc_lets_channels_return_with_their_filters_and_reads_them_from_zero() -> None:
    torch.manual_seed(0)
    model, (x, _) = Residual(), images()
    pruner = pruner_of(Acdc, model, pattern="channel", compress=(0.25, 0.75), decompress=(0.5,))
    optimizers = steps(model, pruner, 19)
    gone = ~pruner.masks["stem.weight"].flatten(1).any(1)
    outputs = model.eval()(x)
    state = copy.deepcopy((model.state_dict(), pruner.state_dict()))
    pruner.step(optimizers[0])
    assert torch.allclose(model(x), outputs, atol=1e-6)  # the returned channels add nothing yet
    assert gone.any()
    assert not model.head.weight[:, gone].any()
    size = float(model.stem.weight.detach()[gone].norm())
    assert size == float(state[1]["former"]["stem.weight"][gone].norm()) > 0
    steps(model, pruner, 4, optimizers)
    assert model.head.weight[:, gone].any()
    assert model.stem.weight[gone].norm() < 1.5 * size

    resumed = Residual()
    again = pruner_of(Acdc, resumed, pattern="channel", compress=(0.25, 0.75), decompress=(0.5,))
    again.load_state_dict(state[1])
    resumed.load_state_dict(state[0])
    again.step()
    assert float(resumed.stem.weight.detach()[gone].norm()) == size


def test_acdc_refuses_a_training_in_which_phases_collide() -> None:
    """Of 15 phases from 10 to 85 % those at 10, 15 and 20 % of 9 steps begin at steps 1, 1 and 2."""
    with pytest.raises(BudgetError, match=r"9 steps.*15 phases"):
        pruner_of(Acdc, network(), total_steps=9)
    model = network()
    pruner = pruner_of(Acdc, model, pattern="unstructured", total_steps=20)
    optimizers, kept = None, []
    for _ in range(20):
        optimizers = steps(model, pruner, 1, optimizers)
        kept.append(pruner.masks.density < 1)
    assert kept == [False, *[step % 2 == 0 for step in range(2, 16)], False, *[True] * 4]


@pytest.mark.parametrize("total", [20, 100, 133])
def test_acdc_ends_compressed_for_any_length(total: int) -> None:
    model = network()
    pruner = pruner_of(Acdc, model, total_steps=total)
    steps(model, pruner, total)
    assert pruner.freeze_report["step"] <= total
    assert pruner.masks.density == pytest.approx(0.4, abs=0.02)
    assert pruner.finish().density == pytest.approx(0.4, abs=0.02)


# ---------------------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    ("kind", "settings", "error", "text"),
    [
        (Smart, {"scope": "layer"}, SelectorError, "scope is global"),
        (Smart, {"protect": ("0.weight",)}, SelectorError, "takes exclude"),
        (Smart, {"search": 0.0}, BudgetError, "fractions of the training"),
        (Smart, {"begin": 0.6, "search": 0.6}, BudgetError, "together at most 1"),
        (Smart, {"final_temp": 20.0}, BudgetError, "falls from init_temp"),
        (Smart, {"pattern": "channel", "example_inputs": None}, PatternError, "give example_inputs"),
        (Smart, {"cost": "macs", "example_inputs": None}, PatternError, "counted on example_inputs"),
        (Smart, {"density": None}, BudgetError, "needs"),
        (Smart, {"pattern": "channel", "layers": ("0",)}, SelectorError, "choose them with exclude"),
        (Smart, {"flops": 0.5}, BudgetError, "flops"),
        (Pdp, {"temperature": 0.0}, BudgetError, "temperature is above 0"),
        (Pas, {"strength": -1.0}, BudgetError, "strength"),
        (Awg, {"updates": 0}, BudgetError, "updates"),
        (Acdc, {"compress": (0.1,), "decompress": (0.2,)}, BudgetError, "take turns"),
        (Acdc, {"compress": (0.1, 0.2), "decompress": (0.3,)}, BudgetError, "take turns"),
    ],
)
def test_wrong_settings_are_explained(kind: type[UnitPruner], settings: dict[str, Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        pruner_of(kind, network(), **settings)


def test_a_masked_model_is_refused_and_so_is_one_without_channels() -> None:
    model = network()
    mg.methods.OneShot(model, density=0.5)
    with pytest.raises(PatternError, match="without masks"):
        pruner_of(Smart, model)
    with pytest.raises(ShrinkError, match="No channels"):
        Smart(nn.Sequential(nn.Linear(4, 3)), pattern="channel", density=0.5, total_steps=3, example_inputs=torch.ones(1, 4))


def test_nm_of_n_equal_to_m_is_the_identity() -> None:
    assert NM(4, 4).fixed_density == 1
    model = network()
    pruner = pruner_of(Smart, model, pattern="nm:4:4")
    assert pruner.factors()[pruner.units.costs > 0].min().item() == 1
    assert pruner.finish().density == 1
