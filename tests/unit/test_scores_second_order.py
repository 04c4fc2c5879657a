"""Wanda, OBS, Fisher and OBD against closed forms."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from microglia.core.errors import ScoreError
from microglia.core.layers import prunable_layers
from microglia.scores import Evidence, scores


def linear(batch=40, columns=6):
    torch.manual_seed(0)
    x = torch.randn(batch, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)
    return nn.Linear(columns, 5).double(), x, torch.randint(5, (batch,))


def value(name, model, batches, loss=functional.cross_entropy):
    return scores[name](model, prunable_layers(model), Evidence(batches, loss))["weight"]


def test_wanda_is_the_magnitude_times_the_norm_of_the_input():
    model, x, y = linear()
    found = value("wanda", model, [(x[:15], y[:15]), (x[15:], y[15:])])
    torch.testing.assert_close(found, model.weight.detach().abs() * x.square().mean(0).sqrt())
    unit = torch.eye(6, dtype=torch.float64)
    plain = value("wanda", model, [(unit, y[:6])]) * 6**0.5
    torch.testing.assert_close(plain, model.weight.detach().abs())  # identity covariance: the magnitude


def test_obs_is_the_rise_of_the_squared_error_if_the_others_compensate():
    model, x, y = linear()
    found, weight = value("obs", model, [(x, y)]), model.weight.detach()
    hessian = 2 * x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    for q in range(6):
        rest = [j for j in range(6) if j != q]
        delta = torch.zeros_like(weight)
        delta[:, q] = -weight[:, q]
        delta[:, rest] = (torch.linalg.solve(hessian[rest][:, rest], hessian[rest, q][:, None]) * weight[:, q]).T
        torch.testing.assert_close(found[:, q], ((delta @ hessian) * delta).sum(1) / 2)
    assert bool((found <= weight.square() * hessian.diagonal() / 2 + 1e-9).all())  # never worse than deletion alone


def test_fisher_is_the_mean_squared_gradient_of_single_examples():
    model, x, y = linear(batch=9)
    found, weight = value("fisher", model, [(x[:4], y[:4]), (x[4:], y[4:])]), model.weight
    squares = torch.zeros_like(weight)
    for one, label in zip(x, y, strict=True):
        loss = functional.cross_entropy(model(one[None]), label[None])
        squares += torch.autograd.grad(loss, weight)[0].square()
    torch.testing.assert_close(found, (weight.square() * squares / 9 / 2).detach())


def test_obd_is_the_diagonal_of_the_hessian_where_the_network_is_linear():
    model, x, y = linear(batch=12)
    found = value("obd", model, [(x, y)])

    def loss(weight):
        return functional.cross_entropy(functional.linear(x, weight, model.bias), y)

    hessian = torch.func.hessian(loss)(model.weight.detach())
    diagonal = torch.einsum("ijij->ij", hessian)
    torch.testing.assert_close(found, (model.weight.square() * diagonal / 2).detach())
    assert bool((found >= 0).all())


@pytest.mark.parametrize("name", ["wanda", "obs", "fisher", "obd", "hutchinson", "mlprune"])
def test_without_batches_one_sentence_says_so(name):
    model, _, _ = linear()
    with pytest.raises(ScoreError, match="batches="):
        value(name, model, [])


def test_obd_needs_logits():
    model = nn.Conv1d(2, 3, 1)
    with pytest.raises(ScoreError, match="take fisher"):
        value("obd", model, [(torch.randn(4, 2, 3), torch.zeros(4, 3, 3))], functional.mse_loss)


# --------------------------------------------------------------------------------------------------------------- K-FAC
def test_mlprune_is_obs_with_the_exact_fisher_of_one_linear_layer():
    """With a loss that is linear in the outputs the gradients are the same for all examples, and A (x) G is exact."""
    model, x, _ = linear()
    c = torch.arange(1.0, 6.0, dtype=torch.float64)
    found = value("mlprune", model, [(x[:15], x[:15]), (x[15:], x[15:])], lambda outputs, targets: (outputs @ c).mean())
    rows = torch.einsum("o,bi->boi", c, x).flatten(1)
    fisher = rows.T @ rows / len(rows)
    a, g = x.T @ x / len(x), torch.outer(c, c)
    torch.testing.assert_close(torch.kron(g, a), fisher)
    damped = [m + 0.01 * m.diagonal().mean() * torch.eye(len(m), dtype=torch.float64) for m in (g, a)]
    inverse = torch.linalg.inv(torch.kron(*damped)).diagonal().view(5, 6)
    torch.testing.assert_close(found, (model.weight.square() / (2 * inverse)).detach())


def test_mlprune_takes_convolutions_with_groups_and_scales_with_the_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)).double()
    images, labels = torch.randn(8, 4, 4, 4, dtype=torch.float64), torch.randint(3, (8,))
    layers = prunable_layers(model)
    one, three = (
        scores["mlprune"](model, layers, Evidence([(images, labels)], lambda o, t, k=k: k * functional.cross_entropy(o, t)))
        for k in (1, 3)
    )
    assert one["0.weight"].shape == (6, 2, 3, 3)
    for name, values in one.items():
        assert bool((values >= 0).all())
        torch.testing.assert_close(three[name], 9 * values)  # of the squared gradients
    whole = scores["mlprune"](
        model, layers, Evidence([(images[:3], labels[:3]), (images[3:], labels[3:])], functional.cross_entropy)
    )
    torch.testing.assert_close(whole["0.weight"], one["0.weight"])
