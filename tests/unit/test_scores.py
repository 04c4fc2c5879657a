"""Scores: values against closed forms and finite differences, and the purity contract for every one of them."""

import random as python_random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from microglia.core.errors import ScoreError
from microglia.core.layers import prunable_layers
from microglia.core.masks import mask
from microglia.scores import Evidence, scores, untouched
from microglia.scores.base import score


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 10))


def evidence(batches: int = 2, size: int = 6) -> Evidence:
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(batches)
    ]
    return Evidence(data, functional.cross_entropy, torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", list(scores))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_scores_leave_everything_as_it_was(name: str, training: bool, masked: bool) -> None:
    model = network().train(training)
    model[5].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    layers = prunable_layers(model)
    if masked:
        mask(model, {n: torch.rand(layer.shape) > 0.5 for n, layer in layers.items()})
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    globals_ = torch.get_rng_state(), python_random.getstate(), np.random.get_state()[1].tolist()

    values = scores[name](model, prunable_layers(model), evidence())

    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert wants == [p.requires_grad for p in model.parameters()]
    for before, p in zip(grads, model.parameters(), strict=True):
        assert (before is None) == (p.grad is None)
        assert before is None or torch.equal(before, p.grad)
    assert torch.equal(globals_[0], torch.get_rng_state())
    assert globals_[1] == python_random.getstate()
    assert globals_[2] == np.random.get_state()[1].tolist()
    assert {n: v.shape for n, v in values.items()} == {n: layer.shape for n, layer in layers.items()}
    assert not any(v.requires_grad for v in values.values())


@pytest.mark.parametrize("name", list(scores))
def test_scores_are_deterministic(name: str) -> None:
    model = network()
    first = scores[name](model, prunable_layers(model), evidence())
    again = scores[name](model, prunable_layers(model), evidence())
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_magnitude_sees_the_mask() -> None:
    model = nn.Linear(3, 2)
    keep = torch.tensor([[True, False, True], [False, True, True]])
    before = model.weight.detach().abs()
    mask(model, {"weight": keep})
    assert torch.equal(scores["magnitude"](model, prunable_layers(model), Evidence())["weight"], before * keep)


def test_gradient_magnitude_is_the_change_of_the_mean_loss_to_first_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    given = evidence()
    data = [(x.double(), y) for x, y in given.batches]
    value = scores["gradient"](model, prunable_layers(model), Evidence(data, given.loss))["1.weight"]
    inputs, targets = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    weight = model[1].weight

    def loss_with(entry: tuple[int, int], factor: float) -> float:
        changed = weight.detach().clone()
        changed[entry] *= factor
        return float(functional.cross_entropy(functional.linear(inputs.flatten(1), changed, model[1].bias), targets))

    for entry in [(0, 0), (3, 17), (9, 63)]:
        slope = (loss_with(entry, 1 + 1e-6) - loss_with(entry, 1 - 1e-6)) / 2e-6  # dL/dlog w = w dL/dw
        assert float(value[entry]) == pytest.approx(abs(slope), rel=1e-4, abs=1e-9)


def test_gradient_weighs_batches_by_their_size() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    whole = evidence(1, 9)
    inputs, targets = next(iter(whole.batches))
    split = Evidence([(inputs[:2], targets[:2]), (inputs[2:], targets[2:])], whole.loss)
    layers = prunable_layers(model)
    torch.testing.assert_close(scores["gradient"](model, layers, whole), scores["gradient"](model, layers, split))


def test_gradient_filter_sums_vanish_before_train_mode_batch_norm() -> None:
    # The loss is invariant to the scale of a filter that feeds a batch norm (survey 0.7), up to its epsilon.
    model = network()
    model[1].eps = 1e-12
    model[3].p = 0.0
    layers = prunable_layers(model)
    from microglia.scores import loss_gradient

    with untouched(model):
        gradient = loss_gradient(model.train(), layers, evidence())["0.weight"]
    products = (gradient * model[0].weight.detach()).flatten(1)
    assert products.sum(1).abs().max() < 1e-5 * products.abs().sum(1).max()


def test_gradient_needs_batches_and_a_finite_loss() -> None:
    model = network()
    layers = prunable_layers(model)
    with pytest.raises(ScoreError, match="give batches"):
        scores["gradient"](model, layers, Evidence())
    with pytest.raises(ScoreError, match="at least one batch"):
        scores["gradient"](model, layers, Evidence((), functional.cross_entropy))
    nan = [(torch.full((2, 1, 8, 8), torch.nan), torch.tensor([0, 1]))]
    with pytest.raises(ScoreError, match="loss is nan"):
        scores["gradient"](model, layers, Evidence(nan, functional.cross_entropy))


def test_random_draws_from_its_generator_only() -> None:
    model = nn.Linear(50, 50)
    layers = prunable_layers(model)
    one = scores["random"](model, layers, Evidence(generator=torch.Generator().manual_seed(3)))["weight"]
    same = scores["random"](model, layers, Evidence(generator=torch.Generator().manual_seed(3)))["weight"]
    other = scores["random"](model, layers, Evidence(generator=torch.Generator().manual_seed(4)))["weight"]
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert 0 <= one.min() < 0.01 < 0.99 < one.max() < 1


def test_guard_refuses_a_score_that_writes() -> None:
    model = network()

    def writes(kind: str) -> None:
        with untouched(model), torch.no_grad():
            if kind == "weight":
                model[0].weight.mul_(2)
            elif kind == "gradient":
                model[0].weight.grad.mul_(2)
            else:
                model[0].register_forward_hook(lambda *_: None)

    model[0].weight.grad = torch.ones_like(model[0].weight)
    for kind, text in [("weight", r"wrote to 0\.weight"), ("gradient", r"0\.weight\.grad"), ("hook", "hooks")]:
        with pytest.raises(ScoreError, match=text):
            writes(kind)


def test_a_score_of_the_wrong_shape_is_refused() -> None:
    name = "wrong-shape-for-this-test"
    wrong = score(name)(lambda model, layers, given: {n: torch.ones(1) for n in layers})
    try:
        with pytest.raises(ScoreError, match="wrong shape"):
            wrong(network(), prunable_layers(network()), Evidence())
    finally:
        del scores._items[name]
