"""SNIP, GraSP and SynFlow: closed forms, identities and finite differences; paths from input to output (survey T7.1-T7.4)."""

import importlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from microglia.core.errors import BudgetError, ScoreError
from microglia.core.iterative import Alive
from microglia.core.layers import prunable_layers
from microglia.core.masks import mask
from microglia.core.patterns import NM, Block, Unstructured
from microglia.core.shuffle import shuffled
from microglia.methods import AtInit
from microglia.scores import Evidence, PositiveFlow, effective_masks, hessian_gradient, scores, shares
from microglia.zoo import build

BATCH, CLASSES = 12, 4


def data(batches=1, shape=(6,), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [
        (
            torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(batches)
    ]
    return Evidence(made, functional.cross_entropy)


def mlp(*, norm=False, activation=nn.ReLU, bias=False, widths=(6, 9, 7, CLASSES), seed=1):
    torch.manual_seed(seed)
    parts = []
    for number, (ins, outs) in enumerate(pairwise(widths)):
        parts += [nn.Linear(ins, outs, bias=bias)]
        if number < len(widths) - 2:
            parts += [nn.BatchNorm1d(outs), activation()] if norm else [activation()]
    return nn.Sequential(*parts).double()


class Gated(nn.Linear):
    """A linear layer with a gate on every weight, for the other route to SNIP's score."""

    def forward(self, x):
        return functional.linear(x, self.weight * self.gate, self.bias)


# ------------------------------------------------------------------------------------------------------------------- SNIP
def test_snip_adds_up_to_one_and_equals_the_gradient_of_gates():
    model = mlp()
    evidence = data(2)
    found = scores["snip"](model, prunable_layers(model), evidence)
    gates = []
    for module in model:
        if isinstance(module, nn.Linear):
            module.__class__ = Gated
            module.gate = nn.Parameter(torch.ones_like(module.weight))
            gates.append(module.gate)
    loss = sum(evidence.loss(model(x), y) for x, y in evidence.batches) / 2
    sensitivities = [g.abs() for g in torch.autograd.grad(loss, gates)]
    total = sum(s.sum() for s in sensitivities)
    assert sum(float(v.sum()) for v in found.values()) == pytest.approx(1, abs=1e-6)
    for value, expected in zip(found.values(), sensitivities, strict=True):
        assert torch.allclose(value.double(), expected / total, atol=1e-6)
        assert (value >= 0).all()


def test_snip_is_the_finite_difference_of_a_gate():
    model = mlp(activation=nn.Tanh)
    evidence = data()
    (x, y), epsilon = evidence.batches[0], 1e-6
    found = scores["snip"](model, prunable_layers(model), evidence)["0.weight"].double()
    slopes = torch.zeros_like(found)
    weight = model[0].weight
    for place in [(0, 0), (3, 5), (8, 2)]:
        with torch.no_grad():
            kept = weight[place].clone()
            weight[place] = kept * (1 + epsilon)
            above = evidence.loss(model(x), y)
            weight[place] = kept * (1 - epsilon)
            below = evidence.loss(model(x), y)
            weight[place] = kept
        slopes[place] = ((above - below) / (2 * epsilon)).abs()
    ratio = slopes[0, 0] / found[0, 0]
    assert torch.allclose(slopes[slopes > 0], ratio * found[slopes > 0], rtol=1e-4)


def test_snip_does_not_see_the_scale_of_the_loss():
    model = mlp()
    one = scores["snip"](model, prunable_layers(model), data())
    scaled = Evidence(data().batches, lambda outputs, targets: 7 * functional.cross_entropy(outputs, targets))
    other = scores["snip"](model, prunable_layers(model), scaled)
    assert all(torch.allclose(one[name], other[name], rtol=1e-5) for name in one)


def test_signed_sensitivities_cancel_within_a_filter_before_batch_norm():
    # The loss does not see the scale of a filter that feeds train-mode batch norm (survey 0.7).
    model = mlp(norm=True)
    for part in model:
        if isinstance(part, nn.BatchNorm1d):
            part.eps = 1e-14
    evidence = data()
    model.train()
    (x, y) = evidence.batches[0]
    (gradient,) = torch.autograd.grad(evidence.loss(model(x), y), [model[0].weight])
    assert (model[0].weight * gradient).sum(1).abs().max() < 1e-12
    assert (model[0].weight * gradient).abs().max() > 1e-4


def test_signed_sensitivities_are_conserved_at_hidden_units_without_biases():
    model = mlp()
    evidence = data()
    x, y = evidence.batches[0]
    gradients = torch.autograd.grad(evidence.loss(model(x), y), [model[0].weight, model[2].weight])
    incoming, outgoing = (model[0].weight * gradients[0]).sum(1), (model[2].weight * gradients[1]).sum(0)
    assert torch.allclose(incoming, outgoing, atol=1e-14)


def test_snip_refuses_a_network_that_feels_nothing():
    model = mlp()
    mask(model, {"2.weight": torch.zeros(7, 9)})
    layers = {name: layer for name, layer in prunable_layers(model).items() if name == "0.weight"}
    with pytest.raises(ScoreError, match="depends on none of these weights"):
        scores["snip"](model, layers, data())


# ------------------------------------------------------------------------------------------------------------------ GraSP
def test_grasp_product_is_the_central_difference_of_gradients():
    model = mlp(activation=nn.Tanh, bias=True)
    layers, evidence = prunable_layers(model), data()
    product = hessian_gradient(model, layers, evidence, temperature=1.0)
    x, y = evidence.batches[0]
    raw = [layer.raw for layer in layers.values()]

    def gradient():
        return torch.autograd.grad(evidence.loss(model(x), y), raw)

    flow, epsilon = gradient(), 1e-5
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, g in zip(raw, flow, strict=True):
                p.add_(g, alpha=sign * epsilon)
        sides.append(gradient())
        with torch.no_grad():
            for p, g in zip(raw, flow, strict=True):
                p.add_(g, alpha=-sign * epsilon)
    for name, above, below in zip(layers, *sides, strict=True):
        expected = (above - below) / (2 * epsilon)
        assert (product[name] - expected).norm() <= 1e-5 * expected.norm()


def test_grasp_multiplies_the_sums_of_chunks():
    model = mlp(activation=nn.Tanh)
    layers, evidence = prunable_layers(model), data(3)
    together = Evidence([tuple(torch.cat(parts) for parts in zip(*evidence.batches, strict=True))], evidence.loss)
    chunked = hessian_gradient(model, layers, evidence)
    whole = hessian_gradient(model, layers, together)
    assert all(torch.allclose(chunked[name], whole[name], rtol=1e-10, atol=0) for name in layers)
    alone = [hessian_gradient(model, layers, Evidence([b], evidence.loss)) for b in evidence.batches]
    assert not torch.allclose(sum(a["0.weight"] for a in alone) / 9, whole["0.weight"], rtol=1e-3, atol=0)


def test_grasp_layer_sum_is_the_gradient_norm_under_batch_norm():
    # Scale invariance gives H w_l = -g_l on the block of a layer before batch norm, so that sum S = |g_l|^2 (survey 7.2).
    model = mlp(norm=True)
    for part in model:
        if isinstance(part, nn.BatchNorm1d):
            part.eps = 1e-14
    model.train()
    layers, evidence = prunable_layers(model), data()
    product = hessian_gradient(model, layers, evidence, temperature=1.0)
    x, y = evidence.batches[0]
    gradients = torch.autograd.grad(evidence.loss(model(x), y), [layer.raw for layer in layers.values()])
    for (name, layer), gradient in list(zip(layers.items(), gradients, strict=True))[:-1]:
        total = -(layer.weight * product[name]).sum()
        assert float(total) == pytest.approx(float((gradient**2).sum()), rel=1e-6)


def test_grasp_scores_add_up_to_minus_theta_hg_and_ranks_do_not_see_scale():
    model = mlp(activation=nn.Tanh)
    layers, evidence = prunable_layers(model), data()
    product = hessian_gradient(model.train(), layers, evidence)
    score = scores["grasp"](model, layers, evidence)
    magnitude = scores["grasp-magnitude"](model, layers, evidence)
    for name, layer in layers.items():
        assert torch.allclose(score[name], layer.weight * product[name])
        assert torch.equal(magnitude[name], score[name].abs())
    doubled = Evidence(evidence.batches, lambda o, t: 2 * functional.cross_entropy(o, t))
    twice = scores["grasp"](model, layers, doubled)
    assert all(torch.allclose(twice[name], 4 * score[name], rtol=1e-9) for name in layers)


def test_grasp_says_what_has_no_second_derivative():
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(context, gradient):
            return gradient * 2

        @staticmethod
        def backward(context, gradient):
            raise RuntimeError("derivative for fused_backward is not implemented")

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x * 2

        @staticmethod
        def backward(context, gradient):
            return Backward.apply(gradient)

    class Fused(nn.Module):
        def forward(self, x):
            return Doubled.apply(x)

    model = nn.Sequential(nn.Linear(6, 5), Fused(), nn.Linear(5, CLASSES)).double()
    with pytest.raises(ScoreError, match="second derivatives"):
        scores["grasp"](model, prunable_layers(model), data())


# ---------------------------------------------------------------------------------------------------------------- SynFlow
@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    seed=st.integers(0, 10_000),
    sparsity=st.floats(0, 0.6),
    dtype=st.sampled_from([torch.float64, None]),
)
def test_synflow_is_its_closed_form(widths, seed, sparsity, dtype):
    """S_l[i, j] = b_l[i] |W_l[i, j]| a_(l-1)[j] with a = forward, b = backward products of |W|."""
    model = mlp(widths=widths, seed=seed)
    linears = [module for module in model if isinstance(module, nn.Linear)]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in linears:
            layer.weight[torch.rand(layer.weight.shape, generator=generator) < sparsity] = 0.0
    weights = [layer.weight.detach().abs() for layer in linears]
    forward = [torch.ones(widths[0], dtype=torch.float64)]
    for weight in weights:
        forward.append(weight @ forward[-1])
    backward = [torch.ones(widths[-1], dtype=torch.float64)]
    for weight in reversed(weights):
        backward.insert(0, weight.T @ backward[0])
    flow = float(forward[-1].sum())
    example = torch.randn(1, widths[0])
    if flow == 0:
        with pytest.raises(ScoreError, match="Nothing flows"):
            shares(model, prunable_layers(model), example)
        return
    found = shares(model, prunable_layers(model), example, dtype=dtype)
    tolerance = 1e-12 if dtype else 1e-5
    for number, value in enumerate(found.values()):
        expected = backward[number + 1][:, None] * weights[number] * forward[number] / flow
        assert torch.allclose(value.double(), expected, rtol=tolerance, atol=tolerance * 1e-3)
        assert float(value.sum()) == pytest.approx(1, rel=tolerance)  # network-wise conservation
    for one, other in pairwise(found.values()):
        assert torch.allclose(one.sum(1), other.sum(0), rtol=tolerance, atol=1e-7)  # neuron-wise


def test_synflow_counts_biases_as_incoming():
    model = mlp(bias=True)
    found = shares(model, prunable_layers(model), torch.randn(1, 6), dtype=torch.float64)
    sums = [float(value.sum()) for value in found.values()]
    assert sums[0] < sums[1] < sums[2] < 1  # what enters by biases further on is missing in earlier cuts
    forward = torch.ones(6, dtype=torch.float64)
    for layer in (m for m in model if isinstance(m, nn.Linear)):
        forward = layer.weight.detach().abs() @ forward + layer.bias.detach().abs()
    last = float((forward - model[4].bias.detach().abs()).sum() / forward.sum())
    assert sums[2] == pytest.approx(last, rel=1e-12)


def test_synflow_needs_no_data_and_no_signs():
    model, layers = mlp(), None
    layers = prunable_layers(model)
    one = scores["synflow"](model, layers, data(seed=1))
    other = scores["synflow"](model, layers, data(seed=2))
    with torch.no_grad():
        model[0].weight.neg_()
    third = scores["synflow"](model, layers, data())
    assert all(torch.equal(one[n], other[n]) and torch.equal(one[n], third[n]) for n in layers)


@pytest.mark.parametrize("factor", [1e-3, 40.0])
def test_synflow_shares_do_not_see_the_scale_of_a_layer(factor):
    model = mlp()
    before = shares(model, prunable_layers(model), torch.randn(1, 6), dtype=torch.float64)
    with torch.no_grad():
        model[2].weight.mul_(factor)
    after = shares(model, prunable_layers(model), torch.randn(1, 6), dtype=torch.float64)
    assert all(torch.allclose(before[n], after[n], rtol=1e-12) for n in before)


def test_synflow_ignores_norms_and_clipped_activations_and_puts_them_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Flatten(), nn.Linear(4 * 36, 5)).double()
    with torch.no_grad():
        model[0].weight.mul_(1e3)
        model[1].running_mean.uniform_(-3, 3)
        model[1].weight.uniform_(-2, 2)
    model.requires_grad_(True)
    found = scores["synflow"](model, prunable_layers(model), Evidence([(torch.randn(2, 3, 8, 8).double(), None)]))
    plain = nn.Sequential(*(part for part in model if not isinstance(part, nn.BatchNorm2d | nn.ReLU6)))
    expected = list(scores["synflow"](plain, prunable_layers(plain), Evidence([(torch.randn(2, 3, 8, 8), None)])).values())
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(found.values(), expected, strict=True))
    assert "forward" not in vars(model[1])


@pytest.mark.parametrize(("depth", "gain"), [(40, 1e4), (60, 1e6), (12, 1e-9)])
def test_synflow_holds_flows_that_float32_cannot(depth, gain):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(depth)))
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(gain)
    found = shares(model, prunable_layers(model), torch.randn(1, 5))
    with torch.no_grad():
        for layer in model:
            layer.weight.div_(gain)
    plain = shares(model, prunable_layers(model), torch.randn(1, 5), dtype=torch.float64)
    assert all(torch.allclose(found[n].double(), plain[n].double(), rtol=1e-5) for n in found)
    assert all(float(value.sum()) == pytest.approx(1, rel=1e-5) for value in found.values())


@pytest.mark.parametrize(("name", "shape"), [("resnet56", (3, 32, 32)), ("mobilenet-v2", (3, 32, 32))])
def test_synflow_of_deep_networks_is_finite_and_cuts_carry_everything(name, shape):
    model = build(name, classes=10, shape=shape)
    found = shares(model, prunable_layers(model), torch.zeros(1, *shape))
    first = next(iter(found.values()))
    assert all(torch.isfinite(v).all() and (v >= 0).all() for v in found.values())
    assert float(first.sum()) == pytest.approx(1, rel=1e-3)


def test_synflow_reaches_the_maximal_compression_without_emptying_a_layer():
    """N / L: 100 rounds leave a connected chain, one round empties layers (survey 7.3, item 6)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(30, 200, bias=False), nn.ReLU(), nn.Linear(200, 200, bias=False), nn.ReLU(), nn.Linear(200, 10, bias=False)
    )
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    evidence = Evidence([(torch.zeros(1, 30), None)])

    def kept(rounds, score="synflow"):
        plain = nn.Sequential(
            *(type(m)(m.in_features, m.out_features, bias=False) if isinstance(m, nn.Linear) else nn.ReLU() for m in model)
        )
        plain.load_state_dict(fresh)
        pruner = AtInit(plain, density=3 / 48000, score=score, rounds=rounds, allow_empty=True, evidence=evidence)
        return [int(m.sum()) for m in pruner.masks.values()], effective_masks(plain, torch.zeros(1, 30)).kept

    assert kept(1) == ([0, 0, 3], 0)
    assert kept(100) == ([1, 1, 1], 3)
    assert kept(1, "magnitude")[1] == 0


# ------------------------------------------------------------------------------------------------------- paths, ablations
@settings(max_examples=25, deadline=None)
@given(widths=st.lists(st.integers(1, 7), min_size=3, max_size=5), seed=st.integers(0, 10_000), density=st.floats(0.05, 0.9))
def test_effective_weights_are_those_on_a_path(widths, seed, density):
    model = mlp(widths=widths, seed=seed, bias=True)
    generator = torch.Generator().manual_seed(seed)
    masks = {n: torch.rand(layer.shape, generator=generator) < density for n, layer in prunable_layers(model).items()}
    mask(model, masks)
    found = effective_masks(model, torch.zeros(1, widths[0]))
    reached = [torch.ones(widths[0], dtype=torch.bool)]
    for kept in masks.values():
        reached.append((kept & reached[-1]).any(1))
    leads = [torch.ones(widths[-1], dtype=torch.bool)]
    for kept in reversed(list(masks.values())):
        leads.insert(0, (kept & leads[0][:, None]).any(0))
    for number, (name, kept) in enumerate(masks.items()):
        assert torch.equal(found[name], kept & reached[number] & leads[number + 1][:, None])


def test_kernel_positions_that_only_read_padding_are_dead():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(3, 2))
    found = effective_masks(model, torch.zeros(1, 2, 1, 1))
    assert int(found["0.weight"].sum()) == 3 * 2
    assert found["0.weight"][:, :, 1, 1].all()


@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 2), NM(2, 4)])
@pytest.mark.parametrize("shape", [(8, 8), (7, 6, 3, 3)])
def test_shuffling_keeps_the_counts_of_every_layer_and_moves_units(pattern, shape):
    generator = torch.Generator().manual_seed(0)
    units = torch.rand(pattern.sizes(shape).shape, generator=generator)
    masks = {}
    for number, name in enumerate("ab"):
        kept = (units + number / 10) > 0.6
        if pattern.fixed_density is not None:
            kept = units.argsort(1).argsort(1) < 2
        masks[name] = pattern.expand(kept & (pattern.sizes(shape) > 0), shape)
    moved = shuffled(masks, pattern, 3)
    assert all(moved[n].sum() == masks[n].sum() for n in masks)
    assert any(not torch.equal(moved[n], masks[n]) for n in masks)
    assert all(torch.equal(pattern.expand(pattern.reduce(m.float(), "max") > 0, shape), m) for m in moved.values())
    assert moved.same(shuffled(masks, pattern, 3))
    assert torch.equal(shuffled({"a": masks["a"], "c": masks["b"]}, pattern, 3)["a"], moved["a"])  # no layer sees another


def test_inverted_and_normal_masks_of_half_are_complements():
    evidence = data(shape=(6,))
    made = []
    for ablation in ("none", "invert"):
        model = mlp(activation=nn.Tanh, widths=(6, 8, 7, CLASSES))  # no dead units, so no ties
        made.append(AtInit(model, density=0.5, score="snip", ablation=ablation, allow_empty=True, evidence=evidence).masks)
    total = made[0].total
    assert made[0].kept == made[1].kept == total // 2
    assert all(torch.equal(made[0][name], ~made[1][name]) for name in made[0])


@pytest.mark.parametrize("score", ["synflow", "snip", "random", "grasp"])
@pytest.mark.parametrize("norm", [True, False])
def test_rounds_over_what_is_left_are_rounds_with_masks(score, norm):
    """The narrowed rounds keep what `prune_to` with masks keeps, round by round."""
    evidence = data(shape=(6,))
    fast = mlp(norm=norm, activation=nn.Tanh)
    narrowed = AtInit(fast, density=0.1, score=score, rounds=7, evidence=evidence)
    slow = mlp(norm=norm, activation=nn.Tanh)
    mask(slow, {name: torch.ones(layer.shape) for name, layer in prunable_layers(slow).items()})
    masked = AtInit(slow, density=0.1, score=score, rounds=7, evidence=data(shape=(6,)))
    assert narrowed.masks.same(masked.masks)
    assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), slow.state_dict().values(), strict=True))


def test_what_is_left_counts_exactly_with_ties_and_refuses_nonsense():
    model = mlp()
    layers = prunable_layers(model)
    before = {name: layer.raw.detach().clone() for name, layer in layers.items()}
    left = Alive({name: layer.raw for name, layer in layers.items()})
    equal = {name: torch.ones(layer.shape) for name, layer in layers.items()}
    total = left.count
    left.keep(left.of(equal), 60)
    assert left.masks()["0.weight"].all()  # ties by position
    assert left.masks().kept == left.count == 60
    sixty = left.masks()
    left.keep(left.of(equal), 7)
    assert left.masks().nested_in(sixty)
    for name, kept in left.masks().items():
        assert torch.equal(layers[name].raw, before[name] * kept)
    with pytest.raises(BudgetError, match="only 7"):
        left.keep(left.of(equal), total)
    with pytest.raises(ScoreError, match="NaN"):
        left.keep(left.of({name: value * torch.nan for name, value in equal.items()}), 3)
    left.keep(left.of(equal), 0)
    assert left.count == 0


@pytest.mark.parametrize("functional_form", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_path_through_any_entry_of_a_pooled_window_counts(functional_form, adaptive):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
            self.pool = nn.AdaptiveMaxPool2d(1) if adaptive else nn.MaxPool2d(2)
            self.head = nn.Linear(1, 2)

        def forward(self, x):
            x = self.conv(x)
            if functional_form:
                x = functional.adaptive_max_pool2d(x, 1) if adaptive else functional.max_pool2d(x, 2)
            else:
                x = self.pool(x)
            return self.head(x.flatten(1))

    found = effective_masks(Pooled(), torch.zeros(1, 1, 2, 2))
    assert found["conv.weight"].all()  # each kernel position meets an image of 2 x 2 somewhere
    assert found["head.weight"].all()


def test_dropout_is_off_while_gradients_are_scored():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, CLASSES)).double()
    plain = nn.Sequential(model[0], model[1], nn.Identity(), model[3])
    for name in ("snip", "grasp", "gradient"):
        one, other = (scores[name](m, prunable_layers(m), data()) for m in (model, plain))
        assert all(torch.equal(one[n], other[n]) for n in one)


def test_shares_of_tokens_count_biases_like_the_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double().train()
    tokens = torch.tensor([[1, 3]])
    found = shares(model, prunable_layers(model), tokens)
    assert model.training
    hidden = model[0].weight.detach().abs()[tokens[0]]
    into = hidden @ model[1].weight.detach().abs().T
    after = into + model[1].bias.detach().abs()
    through = after @ model[3].weight.detach().abs().T
    flow = float((through + model[3].bias.detach().abs()).sum())
    assert float(found["3.weight"].sum()) == pytest.approx(float(through.sum()) / flow, rel=1e-5)
    assert float(found["1.weight"].sum()) == pytest.approx(
        float((into @ model[3].weight.detach().abs().T).sum()) / flow, rel=1e-5
    )


def test_a_budget_of_no_weight_is_refused():
    with pytest.raises(BudgetError, match="Nothing would be left"):
        AtInit(mlp(), density=1e-4, score="snip", evidence=data())


def test_a_type_that_overflowed_is_not_tried_again_until_the_flow_fits(monkeypatch):
    """A deep network of large weights flows beyond float32; once enough is gone it fits, and hardly a try is in vain."""
    model = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(40)))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) * 8)
    own = importlib.import_module("microglia.scores.synflow")
    passed, tried = own._factors_in, []

    def counted(*given, **more):
        found = passed(*given, **more)
        tried.append((given[4], found[1] <= {kind: most for kind, _, (_, most) in own.TRIES}[given[4]]))
        return found

    monkeypatch.setattr(own, "_factors_in", counted)
    flow = PositiveFlow(model, prunable_layers(model), torch.ones(1, 12))
    left = Alive(flow.weights)
    total = left.count
    for share in (0.9, 0.8, 0.6, 0.4, 0.25, 0.25):
        factors = flow.slopes()
        of_layers = [float((slope * weight).sum()) for slope, weight in zip(*(each.values() for each in factors), strict=True)]
        assert of_layers == pytest.approx([of_layers[0]] * len(of_layers), rel=1e-3)
        left.keep(left.of(*factors), round(share * total))
    assert tried[0] == (torch.float32, False)
    types = [kind for kind, fits in tried if fits]
    assert types == [torch.float64] * types.count(torch.float64) + [torch.float32] * types.count(torch.float32)
    assert 2 <= types.count(torch.float64) <= len(types) - 1 == 5
    assert sum(not fits for _, fits in tried[1:]) <= 1


def test_rounds_go_on_where_the_flow_is_beyond_float64():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False, dtype=torch.float64) for _ in range(4)))
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(1e78)
    one = torch.ones(1, 8, dtype=torch.float64)
    pruned = AtInit(model, density=0.5, score="synflow", rounds=3, evidence=Evidence([(one, torch.zeros(1))]))
    assert pruned.masks.kept == 128


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_the_score_of_a_removed_weight_does_not_matter(value):
    left = Alive({"a": torch.tensor([-1.0, -torch.inf, *range(1, 9)])})
    left.keep(left.of({"a": torch.arange(10.0)}), 8)
    assert left.weights["a"].tolist() == [0, 0, *range(1, 9)]
    assert not left.weights["a"].signbit().any()
    left.keep(left.of({"a": torch.arange(10.0).index_fill_(0, torch.tensor([0]), value)}), 7)
    assert left.masks()["a"].tolist() == [False] * 3 + [True] * 7
