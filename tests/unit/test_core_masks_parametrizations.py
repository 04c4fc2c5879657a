"""Masks beside other parametrizations: what is folded, enforced and restored computes what the masked model did."""

from copy import deepcopy

import pytest
import torch
from parametrized import KINDS, add, build, channel_mask, inputs
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from microglia.core.masks import bake, enforce, fold, mask, masks_of, parametrized
from microglia.core.restore import restore


def masked(kind: str, order: str, *, train: bool = False) -> nn.Sequential:
    net = build() if order == "mask first" else build(kind)
    mask(net, channel_mask())
    if order == "mask first":
        add(net[0], kind)
        net.double()
    net.train()(inputs())  # moves a power iteration on
    return net.train(train)


ORDERS = pytest.mark.parametrize("order", ["mask first", "mask last"])


@ORDERS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [False, True])
def test_fold_keeps_the_outputs(kind: str, order: str, train: bool) -> None:
    net = masked(kind, order, train=train)
    wanted = deepcopy(net).eval()(inputs())
    assert fold(net) is net
    assert all(m.training == train for m in net.modules())
    assert torch.equal(net.eval()(inputs()), wanted)
    assert not masks_of(net)
    assert parametrize.is_parametrized(net[0]) == (order == "mask first")
    if order == "mask last":
        assert torch.equal(net[0].weight.detach() == 0, ~channel_mask()["0.weight"])


def test_what_comes_after_the_mask_goes_on_after_fold() -> None:
    net = masked("spectral", "mask first", train=True)
    other = fold(deepcopy(net))
    assert "0.parametrizations.weight.0._u" in other.state_dict()
    for _ in range(3):
        assert torch.equal(net(inputs()), other(inputs()))


@pytest.mark.parametrize("trainable", ["original", "adapter"])
def test_a_baked_weight_is_trainable_where_anything_below_was(trainable: str) -> None:
    net = masked("adapter", "mask last")
    steps = net[0].parametrizations.weight
    for name, parameter in steps.named_parameters():
        parameter.requires_grad_((name == "original") == (trainable == "original"))
    assert fold(net)[0].weight.requires_grad
    frozen = masked("adapter", "mask last").requires_grad_(False)
    assert not fold(frozen)[0].weight.requires_grad


@ORDERS
@pytest.mark.parametrize("kind", KINDS)
def test_enforce_does_not_change_what_the_model_computes(kind: str, order: str) -> None:
    net = masked(kind, order)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    net(inputs()).square().sum().backward()
    optimizer.step()
    wanted = net(inputs())
    enforce(net, optimizer)
    assert torch.equal(net(inputs()), wanted)
    original = net[0].parametrizations.weight.original
    if order == "mask first":
        assert not original[~channel_mask()["0.weight"]].any()


@ORDERS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("already", ["dense", "masked"])
def test_restore_into_a_fresh_model(kind: str, order: str, already: str) -> None:
    net = masked(kind, order)
    fresh = build(kind, seed=9)
    if already == "masked":
        mask(fresh, {"0.weight": torch.ones(8, 6)})
    restore(fresh, net.state_dict())
    assert masks_of(fresh).same(masks_of(net))
    assert list(fresh.state_dict()) == list(net.state_dict())
    assert torch.equal(fresh.eval()(inputs()), net.eval()(inputs()))
    assert torch.equal(fresh.train()(inputs()), net.train()(inputs()))


@ORDERS
@pytest.mark.parametrize("kind", KINDS)
def test_restore_of_a_folded_state_and_of_a_dense_one(kind: str, order: str) -> None:
    net = fold(masked(kind, order))
    assert torch.equal(restore(build(kind, seed=9), net.state_dict()).eval()(inputs()), net.eval()(inputs()))
    dense, used = build(kind), masked(kind, "mask last")
    restore(used, dense.state_dict())
    assert not masks_of(used)
    assert parametrized(used) == ["0.weight"]
    assert torch.equal(used.eval()(inputs()), dense.eval()(inputs()))


def test_a_mask_does_not_move_a_power_iteration_on() -> None:
    net = build("spectral").train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mask(net, channel_mask())
    after = net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_fold_of_tied_weights_of_which_one_has_another_parametrization() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).double()
    net[2].weight = net[0].weight
    mask(net, {"0.weight": torch.rand(6, 6) > 0.5})
    add(net[2], "inverse")
    net = net.eval()
    wanted = net(inputs())
    assert torch.equal(fold(net)(inputs()), wanted)


def test_bake_writes_every_parametrization_down() -> None:
    net = masked("spectral", "mask last")
    parametrizations.weight_norm(net[2])
    net.double()
    wanted, copy = net(inputs()), deepcopy(net)
    assert bake(net) == ["0.weight", "2.weight"]
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(net(inputs()), wanted)
    assert torch.equal(copy(inputs()), wanted), "a copy of the same class still works"
